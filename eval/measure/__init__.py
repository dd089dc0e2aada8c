"""What is measured besides answers: latency, multiply-adds, ranks per layer, half precision, the cost of a sweep.

Each module has a function that returns rows and a command, `python -m eval.measure.<name>`, that keeps them.
"""
