"""YOPO against attention written out, in both forms, and what it refuses."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import sparsevlm
from sparsevlm.budget import Schedule
from sparsevlm.methods.pyramiddrop import PyramidDrop
from tests.tiny import GENERATE, IMAGE, PATCHES, inputs, llava, logits, pad, prompt, same, single, video_llava

LAYERS, HEADS, SIDE = 8, 4, 6
WHOLE = {"window": None, "causal_window": False, "heads": None, "ffn": 1.0, "cut": None}
ONE = [{"window": 3}, {"window": 5, "causal_window": True}, {"heads": "mask"}, {"ffn": 0.5}, {"cut": 3}]
ALL = {"window": 3, "heads": "mask", "ffn": 0.3, "cut": 5}


@pytest.fixture(scope="module")
def mask(tmp_path_factory):
    """A file of heads: the first layers whole, one layer without any, others mixed within groups of two."""
    kept = np.random.RandomState(0).rand(LAYERS, HEADS) < 0.5
    kept[:2], kept[3] = True, False
    kept[2] = [True, False, False, False]
    np.save(path := tmp_path_factory.mktemp("heads") / "mask.npy", kept)
    return str(path)


def options_of(options: dict, mask: str) -> dict:
    return options | ({"heads": mask} if "heads" in options else {})


def merged_embeddings(model, x) -> torch.Tensor:
    found = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: found.update(kwargs), with_kwargs=True
    )
    model(**x)
    hook.remove()
    return found["inputs_embeds"]


@torch.no_grad()
def by_hand(model, x, removal, window, causal_window, heads, ffn, cut) -> torch.Tensor:
    """[L, V] logits of one prompt without padding: every head of every layer written out."""
    decoder, visual = model.model.language_model, x["input_ids"][0] == IMAGE
    hidden, length = merged_embeddings(model, x)[0], len(visual)
    kept = np.ones((LAYERS, HEADS), bool) if heads is None else np.load(heads)
    position = torch.arange(length)
    allowed = position[:, None] >= position
    picture = (visual.long().diff(prepend=torch.zeros(1)) == 1).cumsum(0)
    if window is not None:
        for p in range(1, int(picture.max()) + 1):
            rows = (visual & (picture == p)).nonzero()[:, 0].tolist()
            for (i, a), (j, b) in product(enumerate(rows), enumerate(rows)):
                near = abs(i // SIDE - j // SIDE) <= window // 2 and abs(i % SIDE - j % SIDE) <= window // 2
                allowed[a, b] = near and (b <= a or not causal_window)
    cos, sin = decoder.rotary_emb(hidden, position[None])
    for n, layer in enumerate(decoder.layers):
        attention, y = layer.self_attn, layer.input_layernorm(hidden)
        q, k, v = (
            p(y).view(1, length, -1, 16).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        gone = cut is not None and n >= cut
        made = []
        for h in range(HEADS):
            scores, sees = (q[0, h] @ k[0, h // 2].T) / 4, allowed.clone()
            if removal == "real" and (gone or not kept[n, h]):
                sees[:, visual] = False
                sees |= torch.eye(length, dtype=torch.bool)  # of rows that nobody reads
            weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
            if gone or not kept[n, h]:
                weights = weights * ~visual
            out = weights @ v[0, h // 2]
            made.append(out if kept[n, h] else out * ~visual[:, None])
        hidden = hidden + attention.o_proj(torch.stack(made, 1).flatten(1))
        y, mlp = layer.post_attention_layernorm(hidden), layer.mlp
        inner = mlp.act_fn(mlp.gate_proj(y)) * mlp.up_proj(y)
        late = torch.arange(inner.shape[-1]) >= int(inner.shape[-1] * ffn)
        hidden = hidden + mlp.down_proj(inner.masked_fill(visual[:, None] & late, 0))
    return model.lm_head(decoder.norm(hidden))


@pytest.mark.parametrize("kind", ["one", "multi"])
@pytest.mark.parametrize("removal", ["masked", "real"])
@pytest.mark.parametrize("options", [*ONE, ALL], ids=str)
@torch.no_grad()
def test_every_reduction_written_out(options, removal, kind, mask):
    model = llava()
    x, _ = inputs(kind, model)
    options = options_of(options, mask)
    want = by_hand(model, x, removal, **WHOLE | options)
    with sparsevlm.build("yopo", removal=removal, **options)(model):
        got = model(**x).logits[0]
    text = x["input_ids"][0] != IMAGE
    same(got[text], want[text])
    assert not torch.allclose(got[-1], model(**x).logits[0, -1])  # it does something


@torch.no_grad()
def test_nothing_removed_is_the_model_bit_for_bit():
    model = llava()
    x, _ = inputs("ragged", model)
    want = logits(model.generate(**x, **GENERATE))
    for options in ({}, {"heads": 1, "ffn": 1}, {"removal": "masked"}, {"budget": "full"}):
        with sparsevlm.build("yopo", **options)(model):
            assert torch.equal(logits(model.generate(**x, **GENERATE)), want)
            assert model.model.language_model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_a_causal_window_over_the_picture_is_the_model_and_a_bidirectional_one_is_not():
    model = llava()
    x, _ = inputs("ragged", model)
    want = logits(model.generate(**x, **GENERATE))
    for removal in ("masked", "real"):
        for window, causal in ((2 * SIDE - 1, True), (99, True), (99, False)):
            with sparsevlm.build("yopo", window=window, causal_window=causal, removal=removal)(model):
                got = logits(model.generate(**x, **GENERATE))
            if causal:
                same(got, want)
            else:
                assert (got - want)[:2, 0].abs().amax(1).min() > 1e-3 and torch.allclose(got[2], want[2])


@torch.no_grad()
def test_the_real_cut_is_dropping_every_token_there():
    class DropAll(PyramidDrop):
        def plan(self, n_visual: int, n_layers: int) -> Schedule:
            return Schedule(n_visual, n_layers, (2,), (0,), (0,), (0,))

    model = llava()
    x, _ = inputs("ragged", model)
    with DropAll(positions="original")(model):
        want = model.generate(**x, **GENERATE)
    with sparsevlm.build("yopo", cut=3)(model) as trace:
        got = model.generate(**x, **GENERATE)
    same(logits(got), logits(want))
    assert [c.keys.shape for c in got.past_key_values.layers] == [c.keys.shape for c in want.past_key_values.layers]
    assert trace.prefills[0].entering == [n * 3 / LAYERS for n in trace.prefills[0].n_visual]


FORMS = {
    "masked": {"window": 3, "heads": "mask", "ffn": 0.5, "cut": 5, "removal": "masked"},
    "real": {"window": 3, "heads": "mask", "ffn": 0.5, "cut": 5},
    "heads": {"heads": "mask"},
}


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
@torch.no_grad()
def test_padding_beams_backends_and_caches(options, mask):
    method = sparsevlm.build("yopo", **options_of(options, mask))
    model = llava()
    left, rows = inputs("ragged", model)
    right, _ = inputs("ragged", model, side="right")
    with method(model):
        out = model.generate(**left, **GENERATE)
        for b in range(len(rows)):
            alone = model.generate(**single(left, rows, b), **GENERATE)
            same(logits(alone)[0], logits(out)[b])
            ends = model(**right).logits[b, len(rows[b]) - 1]
            same(ends.float(), logits(out)[b, 0])
        same(logits(model.generate(**left, **GENERATE, use_cache=False)), logits(out))
        static = model.generate(**left, **GENERATE, cache_implementation="static", disable_compile=True)
        same(logits(static), logits(out))
        beams = GENERATE | {"num_beams": 3, "num_return_sequences": 3}
        cached = model.generate(**left, **beams).sequences
        assert torch.equal(cached, model.generate(**left, **beams, use_cache=False).sequences)
    eager = llava(impl="eager")
    reference = llava(dtype=torch.float32)
    x = {k: v.float() if v.is_floating_point() else v for k, v in left.items()}
    with method(eager), method(reference):
        a, b = (m.generate(**x, **GENERATE) for m in (eager, reference))
    same(logits(a), logits(b), 2e-3)


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
@torch.no_grad()
def test_a_second_turn_goes_on_as_if_the_prompt_had_come_at_once(options, mask):
    """The second turn brings a picture, too; then text one by one."""
    model, method = llava(), sparsevlm.build("yopo", **options_of(options, mask))
    x, rows = inputs("multi", model)
    first = rows[0].index(IMAGE) + PATCHES + 2
    with method(model):
        want = model(**x).logits[0, -1]
        cut = model(input_ids=x["input_ids"][:, :first], pixel_values=x["pixel_values"][:1], use_cache=True)
        cache = cut.past_key_values
        ends = x["input_ids"].shape[1] - 2
        parts = [{"input_ids": x["input_ids"][:, first:ends], "pixel_values": x["pixel_values"][1:]}]
        parts += [{"input_ids": x["input_ids"][:, i : i + 1]} for i in (ends, ends + 1)]
        for part in parts:
            out = model(**part, past_key_values=cache)
    same(out.logits[0, -1], want)
    if method.rereads:
        with pytest.raises(ValueError, match="this cache was pruned by YOPO"):
            model(input_ids=x["input_ids"][:, :1], past_key_values=cache)


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
@torch.no_grad()
def test_rows_of_a_cache_may_change_places_and_tokens_may_be_taken_back(options, mask):
    model, order = llava(), torch.tensor([1, 2, 0])
    x, _ = inputs("ragged", model)
    with sparsevlm.build("yopo", **options_of(options, mask))(model):
        cache = model(**x, use_cache=True).past_key_values
        length = x["input_ids"].shape[1]

        def step(tokens: list[list[int]], rows: torch.Tensor) -> torch.Tensor:
            now = cache.get_seq_length() + len(tokens[0])
            seen = torch.cat([x["attention_mask"], torch.ones(3, now - length)], 1).long()[rows]
            return model(input_ids=torch.tensor(tokens), attention_mask=seen, past_key_values=cache).logits

        want = step([[5], [6], [7]], torch.arange(3))
        cache.crop(-1)
        cache.reorder_cache(order)
        same(step([[6], [7], [5]], order), want[order])


@torch.no_grad()
def test_the_model_is_as_before_also_after_an_error(mask):
    model = llava()
    attention = model.model.language_model.layers[0].self_attn
    members, x = set(vars(attention)), inputs("one", model)[0]
    want = model(**x).logits
    with sparsevlm.build("yopo", heads=mask, window=3, ffn=0.5)(model):
        got = model(**x).logits
        with pytest.raises(TypeError):
            model(**x, logits_to_keep="none")
        same(model(**x).logits, got)
        assert model.model.language_model.config._attn_implementation == "sparsevlm_sdpa"
    with pytest.raises(KeyError), sparsevlm.build("yopo", heads=mask)(model):
        raise KeyError
    assert set(vars(attention)) == members
    assert model.model.language_model.config._attn_implementation == "sdpa"
    assert torch.equal(model(**x).logits, want)


def text_model():
    from tests.methods.adapters import adapter

    return adapter("text").model


def test_runs_of_visual_tokens_that_are_no_square_are_refused():
    model, visual = text_model(), torch.zeros(1, 14, dtype=torch.bool)
    visual[:, 2:12] = True
    embeds = torch.randn(1, 14, 64, dtype=model.dtype)
    method = sparsevlm.build("yopo", window=3)
    with method(model, visual_mask=visual), pytest.raises(ValueError, match="square grid, not 10 visual tokens"):
        model(inputs_embeds=embeds)
    visual[:, 11] = False
    with method(model, visual_mask=visual):  # nothing is left of the failed call
        model(inputs_embeds=embeds)


@torch.no_grad()
def test_pictures_without_text_between_have_their_own_windows():
    """Four of them would form a square of twice the side."""
    model = llava()
    rows = [prompt([3, "I", "I", "I", "I", 5])]
    x = dict(zip(("input_ids", "attention_mask"), pad(rows), strict=True))
    x["pixel_values"] = torch.randn(4, 3, 42, 42, dtype=model.dtype)
    ids = x["input_ids"][0]
    start = ids.tolist().index(IMAGE)

    def states(removal: str, change: float) -> torch.Tensor:
        def add(module, args, kwargs):  # to the last token of the first picture
            kwargs["inputs_embeds"] = kwargs["inputs_embeds"].clone()
            kwargs["inputs_embeds"][:, start + PATCHES - 1] += change
            return args, kwargs

        hook = model.model.language_model.register_forward_pre_hook(add, with_kwargs=True)
        with sparsevlm.build("yopo", window=3, removal=removal)(model):
            out = model(**x, output_hidden_states=True).hidden_states[1][0]
        hook.remove()
        return out

    want, moved = states("real", 0), states("real", 1)
    same(states("masked", 0), want)
    changed = (moved - want).abs().amax(1) > 1e-9
    seen = [start + PATCHES - 1 - i - SIDE * j for i in (0, 1) for j in (0, 1)]  # within one row and column
    assert changed[start : start + PATCHES].nonzero()[:, 0].tolist() == sorted(i - start for i in seen)
    assert changed[start + PATCHES :].all()  # later pictures see earlier ones, as text does


def test_what_does_not_fit_the_model(mask, tmp_path):
    def refused(model, message, **options):
        with pytest.raises(ValueError, match=message), sparsevlm.build("yopo", **options)(model):
            pass

    model = llava()
    refused(model, "cut 8 does not fit a model of 8 layers. Use 1 ... 7", cut=8)
    refused(model, "a share is known for the embedded model mini only. Calibrate", heads=0.5)
    refused(model, "cannot read .*nowhere.npy", heads=str(tmp_path / "nowhere.npy"))
    np.save(tmp_path / "other.npy", np.ones((8, 2)))
    refused(model, "is for 8 x 2 .layers x heads., the model has 8 x 4", heads=str(tmp_path / "other.npy"))
    np.save(tmp_path / "other.npy", np.full((8, 4), 0.3))
    refused(model, "other values than true and false", heads=str(tmp_path / "other.npy"))
    refused(video_llava(), "form a square grid; this model's have 16, 17", window=3)
    refused(llava("mistral", sliding_window=20), "sliding windows", heads=mask)
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    refused(model, "sdpa or eager only, not flash_attention_2", window=3)
    model = llava()
    layer = model.model.language_model.layers[5]
    layer.mlp.up_proj = torch.nn.Sequential(layer.mlp.up_proj)  # an adapter, say
    refused(model, "slices plain linear layers", ffn=0.5)
    x, _ = inputs("one", model)
    with sparsevlm.build("yopo", heads=mask)(model), torch.no_grad():
        want = model(**x).logits
    with sparsevlm.build("yopo", heads=mask, ffn=0.5, removal="masked")(model), torch.no_grad():
        assert not torch.allclose(model(**x).logits, want)
