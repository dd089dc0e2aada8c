"""What a prefill costs: counted (`flops.py`, no weights needed) and timed (`latency.py`)."""
