"""From results to tables and figures; each script is one job. Run one as `python scripts/make_tables.py`."""
