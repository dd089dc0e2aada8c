"""The report on trained modules."""

import numpy as np
import pytest

from scripts.trained_modules import correlation, main
from tests.scripts.test_reference import REFERENCE


def test_correlation_is_pearsons_with_its_interval():
    random = np.random.default_rng(0)
    x = random.normal(size=200)
    value, low, high = correlation(x, x + random.normal(size=200))
    assert value == pytest.approx(np.sqrt(0.5), abs=0.1) and 0.5 < low < value < high < 0.85
    _, low, high = correlation(x, random.normal(size=200))
    assert low < 0 < high


def test_the_reference_says_what_its_runs_say(tmp_path):
    (tmp_path / "runs").symlink_to(REFERENCE / "modules" / "runs")
    assert main(["--results", str(tmp_path)]) == 0
    assert (tmp_path / "trained_modules.md").read_text() == (REFERENCE / "modules" / "trained_modules.md").read_text()
