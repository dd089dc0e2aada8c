"""Figures of run folders; `scripts/make_figures.py` draws them."""
