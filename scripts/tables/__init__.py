"""Tables of run folders and published numbers; `scripts/make_tables.py` writes them."""
