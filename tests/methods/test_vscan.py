"""VScan: identities, what defines it, and where it departs from its authors' code."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import sparsevlm
from sparsevlm.methods import vscan
from tests.goldens.frontier import Signals
from tests.methods.test_before_model import attentions, deep, features, handed_on
from tests.methods.test_frontier import kept
from tests.tiny import IMAGE, PATCHES, inputs, llava, same


def test_merging_leaves_nobody_out():
    signals = Signals(0, projected=True)
    order = torch.randperm(576, generator=torch.Generator().manual_seed(0))[None, :96].sort(1).values
    rows = vscan.merge(signals.features, order)[0]
    unit = F.normalize(signals.features[0], dim=-1)
    groups: list[list[int]] = [[int(i)] for i in order[0]]
    for i in {*range(576)} - {*order[0].tolist()}:
        groups[int((unit[order[0]] @ unit[i]).argmax())].append(i)
    assert sum(map(len, groups)) == 576
    same(rows, torch.stack([signals.features[0, g].mean(0) for g in groups]))
    everything = torch.arange(576)[None]
    assert torch.equal(vscan.merge(signals.features, everything), signals.features)


def test_looks_at_a_shallow_block_first():
    model = deep(layers=5)  # the block is round(5 / 24 * 5) = 1
    x, _ = inputs("one", model)
    tower = model.model.vision_tower
    model.set_attn_implementation({"vision_config": "eager"})
    shallow = tower(x["pixel_values"], output_attentions=True).attentions[1][:, :, 0, 1:].mean(1)
    model.set_attn_implementation({"vision_config": "sdpa"})
    last = attentions(model, x["pixel_values"])[:, :, 0, 1:].mean(1)
    want = vscan.choose(shallow, last, 6, 34)
    assert kept(model, sparsevlm.build("vscan", keep=(34, 34)), x)[0] == want[0].tolist()
    assert want.tolist() != vscan.choose(last, last, 6, 34).tolist()


def test_with_all_patches_is_one_stage_of_pyramiddrop():
    model = llava()
    x, _ = inputs("batch", model)
    with sparsevlm.build("vscan", keep=(PATCHES, 9), layer=4)(model) as trace:
        out = model(**x).logits
    with sparsevlm.build("pyramiddrop", layers=(3,), ratios=(0.25,))(model) as other:
        same(model(**x).logits, out)
    stages = trace.prefills[0].stages
    assert stages[-1].kept[1].tolist() == other.prefills[0].stages[0].kept[1].tolist()


def test_with_no_second_stage_is_the_first_alone():
    model = deep()
    x, _ = inputs("one", model)
    seen, trace, out = handed_on(model, sparsevlm.build("vscan", keep=(20, 20), layer=1), x)
    patch = trace.prefills[0].stages[0].kept[0]
    states = features(model, x["pixel_values"])[:, 1:]
    rows = vscan.merge(model.model.multi_modal_projector(states), patch[None])
    embeds, start = model.get_input_embeddings()(x["input_ids"]), x["input_ids"][0].tolist().index(IMAGE)
    short = torch.cat([embeds[:, :start], rows, embeds[:, start + PATCHES :]], 1)
    same(model(inputs_embeds=short).logits[:, -1], out[:, -1])


@pytest.mark.parametrize("total", [48, 87, 96])
def test_gives_the_remainder_to_the_second_half(total):
    local, far = (torch.rand(2, 576, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    lost, whole = (vscan.choose(local, far, 24, total, remainder=r) for r in (False, True))
    assert whole.shape[1] == total and lost.shape[1] == 16 * (total // 32) + total - total // 2
    assert all({*a.tolist()} <= {*b.tolist()} for a, b in zip(lost, whole, strict=True))


def test_budgets():
    assert vscan.stages(64, 576, 16, 32, "entering") == (96, 32)
    assert vscan.stages(192, 576, 16, 32, "entering") == (288, 96)
    assert vscan.stages(64, 576, 16, 32, "leaving") == (99, 33)
    assert vscan.stages(500, 576, 16, 32, "entering") == (576, 424)
    for options, message in [
        ({"keep": (9,)}, "two numbers of tokens"),
        ({"keep": (9, 3), "budget": 9}, "exclude each other"),
        ({"match": "both"}, "match 'both' is unknown"),
    ]:
        with pytest.raises(ValueError, match=message):
            sparsevlm.build("vscan", **options)


def test_without_text_behind_the_picture_skips_the_second_stage():
    model = llava()
    x, _ = inputs("one", model)
    ids = torch.tensor([[5, 6] + [IMAGE] * PATCHES])
    with sparsevlm.build("vscan", keep=(20, 5))(model) as trace:
        model(input_ids=ids, pixel_values=x["pixel_values"])
    assert [s.tokens_out for s in trace.prefills[0].stages][-1] == [20]
