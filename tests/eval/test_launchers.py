"""Jobs of a sweep as processes of Hydra's launchers."""

import json
import os
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from eval.run import CONFIGS, main


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [["joblib", "hydra.launcher.n_jobs=2"], ["submitit_local"]])
def test_jobs_run_apart_and_their_statuses_come_back(launcher, tmp_path):
    command = [sys.executable, "-m", "eval.run", "-m", f"hydra/launcher={launcher[0]}", *launcher[1:]]
    command += ["method=random", "budget=16,0,24", "limit=3"]
    env = {**os.environ, "PYTHONPATH": str(CONFIGS.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=550)
    assert done.returncode == 2, done.stderr
    assert "job method=random budget=0 limit=3 ended with status 2; logs: " in done.stderr
    budgets = sorted(json.loads(p.read_text())["budget"] for p in tmp_path.glob("results/runs/*/metrics.json"))
    assert budgets == [16, 24]
    assert sorted(os.listdir(tmp_path)) == ["results"]


def test_a_launcher_that_is_not_installed_is_named(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["-m", "hydra/launcher=ray", "method=random", "budget=16"]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "ray" in err and "joblib" in err


def test_our_slurm_settings_are_the_launchers_own():
    """Every key of configs/hydra/launcher/slurm.yaml is one that submitit's launcher takes."""
    from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf

    ours = OmegaConf.load(CONFIGS / "hydra" / "launcher" / "slurm.yaml")
    ours.pop("defaults")
    assert OmegaConf.merge(OmegaConf.structured(SlurmQueueConf), ours).max_num_timeout > 0
