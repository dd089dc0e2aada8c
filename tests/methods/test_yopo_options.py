"""Options of YOPO that exclude each other, and what a budget solves."""

from __future__ import annotations

import pytest

import sparsevlm
from sparsevlm.methods.yopo import solve_cut


@pytest.mark.parametrize(
    "options,message",
    [
        ({"window": 4}, "window 4 must be odd.* Use 3"),
        ({"window": 0}, "must be odd"),
        ({"causal_window": True}, "needs a window"),
        ({"heads": 0.0}, "heads 0.0 must be a share"),
        ({"heads": 1.5}, "heads 1.5 must be a share"),
        ({"ffn": 0}, "ffn 0 must be a share"),
        ({"cut": 0}, "cut 0 must be 1 or more"),
        ({"removal": "half"}, "removal 'half' is unknown; known: real, masked"),
        ({"budget": 12, "cut": 3}, "budget=12 and cut exclude each other"),
        ({"budget": 12, "ffn": 0.5, "window": 3}, "budget=12 and window, ffn exclude each other"),
        ({"budget": 12, "removal": "masked"}, "computes everything and can meet no budget"),
    ],
    ids=str,
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        sparsevlm.build("yopo", **options)


def test_budgets_are_solved_by_counting():
    shape = (1.0, 0.2, 0.001)

    def cost(cut: int) -> float:
        return 8 * (100 + 10) if cut == 8 else (cut - 1) * (100 + 10) + 20

    for budget in range(1, 101):
        found = solve_cut(budget, 100, 8, shape)
        wanted = 8 * (budget + budget**2 / 1000)
        assert abs(cost(found) - wanted) == min(abs(cost(cut) - wanted) for cut in range(1, 9))
    assert solve_cut(100, 100, 8, shape) == 8
    assert not sparsevlm.build("yopo", budget=40).plan(36, 8).layers  # more than there are: nothing goes
