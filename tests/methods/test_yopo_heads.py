"""Which heads visual tokens keep: ratios, votes, shares, and the command that calibrates."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sparsevlm
from sparsevlm.methods._heads import exceeded, head_ratios, keep_share, load_heads, votes
from sparsevlm.mini import heads as command
from sparsevlm.runtime.families import locate
from tests.tiny import IMAGE, inputs, llava

RATIOS = np.random.RandomState(0).rand(100, 6, 4) * np.random.RandomState(1).rand(6, 4)


@torch.no_grad()
def test_ratios_are_those_of_the_attention_that_the_model_returns():
    model = llava(impl="eager")
    x, _ = inputs("multi", model)
    visual = x["input_ids"][0] == IMAGE
    rows = torch.stack(model(**x, output_attentions=True).attentions)[:, 0, :, -1]
    want = rows[..., visual].sum(-1) / rows[..., ~visual].sum(-1)
    np.testing.assert_allclose(head_ratios(model, [x, x]), torch.stack([want, want]), rtol=1e-4)


def test_a_head_needs_more_than_40_of_100_votes():
    ratios = np.zeros((100, 4, 2))
    ratios[:40, 2], ratios[:41, 3] = 1, 1
    assert votes(ratios, 0.5).tolist() == [[True, True], [True, True], [False, False], [True, True]]


@pytest.mark.parametrize("share", [0.2, 8 / 24, 0.5, 0.77, 1.0])
def test_one_threshold_gives_a_share_by_vote(share: float):
    limits = exceeded(RATIOS)
    mask = keep_share(limits, share)
    assert mask.sum() == round(share * 24)
    threshold = limits[~mask].max() if not mask.all() else 0
    by_vote = votes(RATIOS, threshold)
    assert (by_vote[2:] == mask[2:]).all() and by_vote[:2].all()  # which keeps the first two layers whole
    assert (mask[:2] == (limits[:2] > threshold)).all()


@pytest.fixture(scope="module")
def mini():
    return sparsevlm.load("mini")[0]


def test_mini_comes_with_its_calibration(mini):
    family = locate(mini)
    half, quarter = (load_heads(share, family) for share in (0.5, 0.25))
    assert half.shape == (12, 4) and half.sum() == 24 and quarter.sum() == 12
    assert (half | ~quarter).all()  # a quarter are among the half
    moved = sparsevlm.load("mini")[0]
    with torch.no_grad():
        moved.model.language_model.layers[7].self_attn.q_proj.weight *= 1.1
    with pytest.raises(ValueError, match="known for the embedded model mini only"):
        load_heads(0.5, locate(moved))


def test_the_command_writes_a_mask_that_the_method_takes(tmp_path, capsys, mini):
    path = tmp_path / "heads.npy"
    command.main(["--share", "0.5", "--samples", "2", "--out", str(path)])
    assert "24 of 48 heads stay" in capsys.readouterr().out
    assert np.load(path).shape == (12, 4)
    with sparsevlm.build("yopo", heads=str(path))(mini):
        pass
    with pytest.raises(SystemExit):
        command.main(["--share", "0.5", "--samples", "0", "--out", str(path)])
    assert "at least one sample" in capsys.readouterr().err
