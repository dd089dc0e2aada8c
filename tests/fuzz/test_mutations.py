"""Each of the mistakes put into the library is found within a few hundred cases."""

from __future__ import annotations

import pytest

from tests.fuzz.mutations import MUTATIONS, cases_until_found


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_found(name):
    assert cases_until_found(name) is not None


@pytest.mark.parametrize(
    "name", ["The shift of positions has the wrong sign", "The cache does not learn that its later layers are shorter"]
)
def test_gross_mistakes_are_found_at_once(name):
    assert cases_until_found(name, 100) is not None
