"""How pictures share a budget."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sparsevlm.runtime.vision import share


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 3000), st.lists(st.integers(1, 300), min_size=1, max_size=9))
def test_share(budget, sizes):
    budget = min(budget, sum(sizes))
    counts = share(budget, sizes)
    assert sum(counts) == budget and all(0 <= c <= s for c, s in zip(counts, sizes, strict=True))
    if len({*sizes}) == 1:
        assert counts == sorted(counts, reverse=True) and max(counts) - min(counts) <= 1
