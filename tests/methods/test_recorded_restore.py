"""RESTORE around its bases against recordings of its authors' code (tests/goldens/frontier); float32, ours float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import sparsevlm
from sparsevlm.methods import restore
from tests.goldens import frontier
from tests.goldens.load import SHIPPED, files, recording, stem

pytestmark = pytest.mark.recordings
LOGITS, ROWS = 1e-5, 5e-6


def run(path: Path, **options) -> frontier.Run:
    meta, _ = recording(path)
    options = {"base": meta["base"], "share": meta["gamma"], "c": meta["c"]} | options
    return frontier.run(meta["config"], meta["seed"], sparsevlm.build("restore", budget=meta["budget"], **options))


def check(path: Path, method_module) -> None:
    """Compare groups of made-up tokens, all of which are merged."""
    meta, want = recording(path)
    signals = frontier.Signals(meta["seed"], projected=True)
    counts = [int(key.removeprefix("group_")) for key in want if key.startswith("group_")]
    assert counts
    for count in (n for n in counts if want[f"stable_{n}"]):
        member = method_module.groups(signals.features, count, "code")[0]
        assert member.int().argmax(0).tolist() == want[f"group_{count}"].tolist()
        assert member.sum(1).tolist() == want[f"size_{count}"].tolist()
        if f"merged_{count}" in want:
            rows = member.double() @ signals.features[0] / member.sum(1, keepdim=True)
            np.testing.assert_allclose(rows.numpy(), want[f"merged_{count}"], rtol=0, atol=ROWS)


@pytest.mark.parametrize("path", files("frontier", "restore_*.npz"), ids=stem)
def test_restore(path: Path):
    meta, want = recording(path)
    if meta["level"] != "model":
        return check(path, restore)
    r = run(path)
    if not meta["stable"]:
        assert len(r.projected) == meta["budget"]
        return None
    assert r.record.stages[0].kept[0].tolist() == want["position"].tolist()
    assert {*want["retained"].tolist()} <= {*want["position"].tolist()}
    assert r.ids == want["gen_ids"].tolist()
    np.testing.assert_allclose(r.logits.numpy(), want["gen_logits"], rtol=0, atol=LOGITS)
    if "projected" in want:
        np.testing.assert_allclose(r.projected.numpy(), want["projected"], rtol=0, atol=ROWS)
    return None


@pytest.mark.parametrize("options", [{"anchors": "paper"}, {"c": 3.0}, {"calibrate": False}], ids=str)
def test_what_the_recordings_tell_apart(options: dict):
    path = SHIPPED / "frontier" / "restore_model_holov_64_s0.npz"
    want = recording(path)[1]["gen_logits"]
    assert not np.allclose(run(path, **options).logits.numpy(), want, rtol=0, atol=LOGITS)
