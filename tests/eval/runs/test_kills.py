"""Runs killed at random moments; `python -m tests.eval.runs.kills 20 <folder>` does it more often."""

import json
import os
import subprocess
import sys

import pytest

from eval.run import CONFIGS


@pytest.mark.slow
def test_killed_at_random_moments_the_results_are_those_of_an_undisturbed_run(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(CONFIGS.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.eval.runs.kills", "4", str(tmp_path)]
    done = subprocess.run(command, cwd=CONFIGS.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["answers_at_each"]) == 4
