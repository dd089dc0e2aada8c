"""Models whose visual tokens depend on the picture: cutting tokens out equals the unmodified model that hides them.

The reference knows nothing of the runtime. It runs the whole sequence, prompt and answer, without a cache, and adds to
each layer's logits a bias that hides what the record says was dropped; positions are the model's own.
"""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from torch import Tensor

import sparsevlm
from sparsevlm.runtime.families import RECORDS
from tests.families import (
    END,
    HAS_VIDEO,
    IMAGE,
    LAYERS,
    LAYOUTS,
    NAMES,
    QWEN,
    START,
    VIDEO,
    inputs,
    layouts,
    of_rows,
    tiny,
)
from tests.restatement import density_peaks, merged_tokens
from tests.tiny import PAD, same

STEPS = 4
GENERATE = dict(
    max_new_tokens=STEPS, do_sample=False, suppress_tokens=[IMAGE, VIDEO, START, END, PAD],
    return_dict_in_generate=True, output_logits=True,
)  # fmt: skip
METHODS = {
    "random": {"budget": 5},
    "fastv": {"budget": 5},
    "fastv, plain": {"budget": 5, "early_drop": False},
    "fastv, k=1": {"k": 1, "keep": 4},
    "sparsevlm": {"layers": (1, 3), "keep": (6, 3)},
    "sparsevlm, centre": {
        "layers": (0, 1, 2, 4),
        "keep": (8, 6, 4, 2),
        "recycled_at": "centre",
        "positions": "original",
    },
    "sparsevlm, plain": {"layers": (-1, 1, 2), "keep": (7, 4, 2), "recycle": 0.0, "early_drop": False},
    "sparsevlm_plus": {"layers": (1, 2, 3), "keep": (8, 5, 2)},
    "pyramiddrop": {"budget": 7},
    "dart": {"budget": 5},
    "random_layer": {"budget": 6},
    "divprune": {"budget": 5},
}


@cache
def model_of(name: str, impl: str = "sdpa"):
    return tiny(name, impl)


class MaskedRun:
    """Hooks on the unmodified model that hide dropped tokens and write merged ones into their centre's row.

    Attributes:
        alive: [B, L] bool, what the layers from now on may look at.
        order: [B, L], a row sees the alive rows of no larger order.
        visual: per sample the rows of the visual tokens, in order.
    """

    def __init__(self, model, x: dict, answers: Tensor, record, method):
        self.model, self.method = model, method
        ids = torch.cat([x["input_ids"], answers], 1)
        real = torch.cat([x["attention_mask"], torch.ones_like(answers)], 1)
        self.x = {**x, "input_ids": ids, "attention_mask": real, "use_cache": False}
        if model.config.model_type in QWEN:
            self.x["mm_token_type_ids"] = torch.cat([x["mm_token_type_ids"], torch.zeros_like(answers)], 1)
            known = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
            own = {k: v for k, v in self.x.items() if k in (*known, "attention_mask")}
            self.x["position_ids"] = model.model.get_rope_index(**own)[0]
        else:
            self.x["position_ids"] = (real.cumsum(1) - 1).clamp(min=0)
        self.alive, self.hidden = real.bool().clone(), []
        self.order = torch.arange(ids.shape[1], dtype=torch.float64).repeat(len(ids), 1)
        self.visual = [((row == IMAGE) | (row == VIDEO)).nonzero()[:, 0].tolist() for row in ids]
        self.stages = {stage.layer: stage for stage in record.stages}
        self.renumbered = False

    def logits(self) -> Tensor:
        layers = self.model.model.language_model.layers
        handles = [
            layer.register_forward_pre_hook(partial(self._before, i), with_kwargs=True)
            for i, layer in enumerate(layers)
        ]
        try:
            with torch.no_grad():
                return self.model(**self.x).logits
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, i: int, layer, args: tuple, kwargs: dict):
        hidden = args[0]
        if i - 1 in self.stages:
            hidden = hidden.clone()
            for b in range(len(self.visual)):
                self._cut(b, self.stages[i - 1], hidden)
            self._number(i - 1)
        seen = self.alive[:, None] & (self.order[:, None] <= self.order[..., None])
        seen = seen | torch.eye(seen.shape[1], dtype=torch.bool)
        bias = torch.zeros(seen.shape, dtype=hidden.dtype).masked_fill(~seen, torch.finfo(hidden.dtype).min)
        kwargs = {**kwargs, "attention_mask": bias[:, None]}
        if self.renumbered:
            kwargs["position_embeddings"] = self.model.model.language_model.rotary_emb(hidden, self.x["position_ids"])
        return (hidden, *args[1:]), kwargs

    def _number(self, layer: int) -> None:
        """Where positions have one axis, methods may count survivors anew."""
        several = self.model.config.model_type in QWEN
        renumber = not several and self.method.positions_after(layer) == "renumber"
        assert self.stages[layer].positions == ("renumber" if renumber else "original")
        if not renumber:
            return
        self.renumbered = True
        for b, alive in enumerate(self.alive):
            rows = sorted(alive.nonzero()[:, 0].tolist(), key=lambda r: self.order[b, r])
            self.x["position_ids"][b, rows] = torch.arange(len(rows))

    def _cut(self, b: int, stage, hidden: Tensor) -> None:
        rows, kept = self.visual[b], stage.kept[b].tolist()
        assert stage.tokens_in[b] == len(rows)
        if len(kept) == len(rows):
            return
        dropped = [i for i in range(len(rows)) if i not in kept]
        scores = stage.scores[b].tolist()
        assert min(scores[i] for i in kept) >= max(scores[i] for i in dropped)
        self.alive[b, [rows[i] for i in dropped]] = False
        left = [rows[i] for i in kept]
        if stage.recycled[b]:
            pool = [rows[i] for i in sorted(dropped, key=lambda i: -scores[i])]
            left += self._merge(b, hidden, pool, max(rows, key=lambda r: self.order[b, r]))
        self.visual[b] = sorted(left, key=lambda r: self.order[b, r])
        assert stage.tokens_out[b] == len(left)

    def _merge(self, b: int, hidden: Tensor, dropped: list[int], last: int) -> list[int]:
        pool = dropped[: int(self.method.recycle * len(dropped)) + 1]
        k = int(self.method.cluster * len(pool)) + 1
        tokens = hidden[b, pool].clone()
        rows = [pool[c] for c in density_peaks(tokens, k)[0]]
        hidden[b, rows] = merged_tokens(tokens, k)
        self.alive[b, rows] = True
        if self.method.recycled_at == "end":
            self.order[b, rows] = self.order[b, last] + torch.arange(1, k + 1, dtype=torch.float64) / (k + 1) / 8
        return rows


def check(model, x: dict, method, tolerance: float | None = None) -> None:
    """Prefill and cached steps of generate() equal the reference; a direct call equals the prefill."""
    with torch.no_grad(), method(model) as trace:
        out = model.generate(**x, **GENERATE)
        direct = model(**x).logits[:, -1] if model.config.model_type in QWEN else None
    got, length = torch.stack(out.logits, 1), x["input_ids"].shape[1]
    record = trace.prefills[0]
    reference = MaskedRun(model, x, out.sequences[:, length:-1], record, method)
    want = reference.logits()[:, length - 1 :].to(got.dtype)
    assert [*record.n_visual] == [sum(i in (IMAGE, VIDEO) for i in row) for row in x["input_ids"].tolist()]
    assert reference.alive.sum() < reference.x["attention_mask"].sum()
    tolerance = tolerance or (1e-5 if model.dtype == torch.float64 else 1e-3)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    if direct is not None:
        torch.testing.assert_close(direct.to(got.dtype), want[:, 0], rtol=tolerance, atol=tolerance)


def build(key: str):
    return sparsevlm.build(key.split(",")[0], **METHODS[key])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_dropping_is_masking(name, method):
    model = model_of(name)
    kinds = layouts(name) if method in ("random", "sparsevlm") else ["batch", layouts(name)[-1]]
    for kind in kinds:
        check(model, inputs(name, kind, model)[0], build(method))


@pytest.mark.parametrize("name", NAMES)
def test_dropping_is_masking_with_eager_attention(name):
    model = model_of(name, "eager")
    for kind, method in (("batch", "sparsevlm"), ("two", "fastv"), ("one", "random"), ("batch", "pyramiddrop")):
        check(model, inputs(name, kind, model)[0], build(method))


@pytest.mark.parametrize("name", NAMES)
def test_a_second_turn_of_text(name):
    """What the first turn dropped stays hidden from a question that goes on with its cache."""
    model = model_of(name)
    x, _ = inputs(name, "batch", model)
    method, more = build("sparsevlm"), torch.randint(3, 90, (3, 5))
    with torch.no_grad(), method(model) as trace:
        out = model.generate(**x, **GENERATE)
        ids = torch.cat([out.sequences, more], 1)
        mask = torch.cat([x["attention_mask"], torch.ones(3, ids.shape[1] - x["input_ids"].shape[1]).long()], 1)
        again = model.generate(input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values, **GENERATE)
    answers = again.sequences[:, x["input_ids"].shape[1] : -1]
    want = MaskedRun(model, x, answers, trace.prefills[0], method).logits()
    got = torch.stack(again.logits, 1)
    torch.testing.assert_close(got, want[:, -STEPS:].to(got.dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", QWEN)
def test_a_loop_of_ones_own(name):
    """Direct steps on the cache, without generate() and its positions."""
    model = model_of(name)
    x, _ = inputs(name, "two", model)
    del x["attention_mask"]
    method, steps, got = build("random"), torch.randint(3, 90, (1, 4)), []
    with torch.no_grad(), method(model) as trace:
        out = model(**x, use_cache=True)
        for step in steps.T[:, None]:
            out = model(input_ids=step, past_key_values=out.past_key_values)
            got.append(out.logits[:, -1])
    x["attention_mask"] = torch.ones_like(x["input_ids"])
    want = MaskedRun(model, x, steps, trace.prefills[0], method).logits()
    torch.testing.assert_close(torch.stack(got, 1), want[:, -4:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_dropped_is_the_model_bit_for_bit(name, impl):
    model = model_of(name, impl)
    x, _ = inputs(name, layouts(name)[-1], model)
    with torch.no_grad():
        want, said = model(**x, output_hidden_states=True), model.generate(**x, **GENERATE)
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        for method in (sparsevlm.build("none"), sparsevlm.build("sparsevlm", budget="full")):
            with method(model):
                got, again = model(**x, output_hidden_states=True), model.generate(**x, **GENERATE)
            assert torch.equal(got.logits, want.logits)
            assert len(got.hidden_states) == LAYERS + 1
            assert all(map(torch.equal, got.hidden_states, want.hidden_states))
            assert torch.equal(again.sequences, said.sequences)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_alone_and_in_a_batch(name):
    model = model_of(name)
    x, rows = inputs(name, "batch", model)
    alone = of_rows(name, LAYOUTS["batch"][:1], model)[0]
    alone["input_ids"] = torch.tensor([rows[0]])
    for key, own in alone.items():  # the pixels of the first picture
        if key not in ("input_ids", "attention_mask", "mm_token_type_ids"):
            alone[key] = x[key][: len(own)]
    method = sparsevlm.build("sparsevlm", layers=(1, 3), keep=(6, 3))
    with torch.no_grad(), method(model) as trace:
        got = model.generate(**alone, **GENERATE)
        batch = model.generate(**x, **GENERATE)
    same(torch.stack(got.logits, 1)[0], torch.stack(batch.logits, 1)[0], 1e-5)
    one, many = trace.prefills
    assert [s.kept[0].tolist() for s in one.stages] == [s.kept[0].tolist() for s in many.stages]


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_the_models_own_attention(name):
    """FastV rates by what the last token pays the visual ones, mean over heads."""
    model = model_of(name, "eager")
    x, _ = inputs(name, "one", model)
    with torch.no_grad():
        rows = model(**x, output_attentions=True).attentions[1][0, :, -1].mean(0)
        with sparsevlm.build("fastv", k=2, keep=3)(model) as trace:
            model(**x)
    stage = trace.prefills[0].stages[0]
    assert stage.layer == 1
    visual = (x["input_ids"][0] == IMAGE).nonzero()[:, 0]
    torch.testing.assert_close(stage.scores[0], rows[visual], rtol=1e-4, atol=1e-6)
    assert stage.kept[0].tolist() == sorted(rows[visual].topk(3).indices.tolist())


# ---- what is refused -------------------------------------------------------------------------------------------------
TOWER_METHODS = [
    "aim", "cdpruner", "downsample", "fastervlm", "ficoco_v", "folder", "folder_simple", "tome", "visionzip",
    "vispruner",
]  # fmt: skip


@pytest.mark.parametrize("method", TOWER_METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_what_acts_in_the_tower_is_refused_by_name(name, method):
    options = {"side": 2} if method == "downsample" else {"budget": 4}
    with pytest.raises(ValueError, match=f"method '{method}' acts in the vision tower.*'{name}' model.*Use LLaVA-1.5"):
        with sparsevlm.build(method, **options)(model_of(name)):
            pass


def test_every_record_is_tested():
    assert {*RECORDS} == {"llava", "video_llava", *NAMES}
    for name in NAMES:
        rotary = model_of(name).model.language_model.rotary_emb
        assert RECORDS[name].axes == (3 if hasattr(rotary, "mrope_section") else 1)
    assert {*HAS_VIDEO} < {*NAMES}


@pytest.mark.parametrize("name", QWEN)
@pytest.mark.parametrize("missing", ["mm_token_type_ids", "image_grid_thw", "input_ids"])
def test_pictures_that_the_model_could_not_number(name, missing):
    """Without them it goes on with positions of one axis, and its logits are others."""
    model = model_of(name)
    x, _ = inputs(name, "one", model)
    given = {k: v for k, v in x.items() if k != missing}
    if missing == "input_ids":
        given["inputs_embeds"] = model.get_input_embeddings()(x["input_ids"])
    for call in (lambda: model(**given), lambda: model.generate(**given, max_new_tokens=1)):
        with pytest.raises(ValueError, match=f"without .*{missing}.*Pass"), build("random")(model):
            call()


@pytest.mark.parametrize("name", QWEN)
def test_positions_of_the_callers_own(name):
    """Three planes, or four with a first that counts tokens, are taken as they are."""
    model = model_of(name)
    x, _ = inputs(name, "two", model)
    known = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
    planes = model.model.get_rope_index(**{k: x[k] for k in known})[0]
    count = torch.arange(planes.shape[2]).view(1, 1, -1)
    del x["mm_token_type_ids"], x["attention_mask"]
    with torch.no_grad(), build("random")(model):
        three = model(**x, position_ids=planes).logits
        four = model(**x, position_ids=torch.cat([count, planes])).logits
        other = model(**x, position_ids=planes + torch.tensor([0, 1, 2])[:, None, None] * count).logits
        with pytest.raises(NotImplementedError, match="several sequences packed"):
            model(**x, position_ids=torch.cat([count * 2, planes]), use_cache=False)
    assert torch.equal(three, four) and not torch.allclose(three[:, -1], other[:, -1], atol=1e-3)


@pytest.mark.parametrize("name", QWEN)
def test_pictures_and_steps_on_a_cache(name):
    model = model_of(name)
    x, _ = inputs(name, "one", model)
    step = {"input_ids": torch.tensor([[5]])}
    with torch.no_grad(), build("random")(model):
        cache = model(**x, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="cannot number a new picture that goes on with a cache"):
            model(**x, past_key_values=cache)
        mask = torch.ones(1, x["input_ids"].shape[1] + 1).long()
        with pytest.raises(ValueError, match=f"{mask.shape[1]} entries came with 1 tokens. Use generate"):
            model(**step, attention_mask=mask, past_key_values=cache)
        cache = model(**x, use_cache=True).past_key_values
        model(**step, past_key_values=cache)
        model(**inputs(name, "two", model)[0])  # where its text goes on is another place
        with pytest.raises(ValueError, match="remembers where the text goes on of one prompt only"):
            model(**step, past_key_values=cache)


def test_features_after_the_last_layer():
    with pytest.raises(ValueError, match="adds visual features after 3 layers and has 3: pruning needs a layer"):
        with build("random")(tiny("qwen3_vl", num_hidden_layers=3)):
            pass
