"""A pruned forward equals what it must equal, however it is called."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from transformers import DynamicCache

import sparsevlm
from tests.tiny import GENERATE, IMAGE, LAYOUTS, SUPPRESS, inputs, llava, logits, pad, prompt, same, single, video_llava

LAYERS, KEEP = (1, 3, 5), (18, 10, 5)
PLACES = [("renumber", "end"), ("original", "centre"), ("original", "end"), ("renumber", "centre")]


def build(positions="renumber", recycled_at="end", **kwargs):
    options = {"layers": LAYERS, "keep": KEEP, "positions": positions, "recycled_at": recycled_at} | kwargs
    return sparsevlm.build("sparsevlm", **options)


METHODS = {
    "sparsevlm": build,
    "rank": lambda **kw: sparsevlm.build("sparsevlm_rank", layers=LAYERS, lam=0.9, **kw),
    "v1.0": lambda **kw: sparsevlm.build("sparsevlm_rank", layers=LAYERS, rule="v1.0", scale=2.0, bias=3, **kw),
    "video": lambda **kw: sparsevlm.build("sparsevlm_rank", layers=(1,), rule="video", **kw),
    "plus": lambda **kw: sparsevlm.build("sparsevlm_plus", layers=LAYERS, keep=KEEP, **kw),
    "random": lambda **kw: sparsevlm.build("random", budget=12),
}
IN_LAYERS = [name for name in METHODS if name != "random"]


def lengths(cache) -> list[int]:
    return [layer.keys.shape[2] for layer in cache.layers]


@pytest.mark.parametrize("impl,kind", list(product(["sdpa", "eager"], ["one", "batch", "ragged"])))
@pytest.mark.parametrize(
    "method", [sparsevlm.build("none"), build(keep=(999,) * 3), sparsevlm.build("sparsevlm", budget="full")]
)
def test_full_budget_is_the_model_itself_bit_for_bit(method, impl, kind):
    model = llava(impl=impl)
    x, _ = inputs(kind, model)
    before = model.generate(**x, **GENERATE)
    plain = model(**x).logits
    with method(model) as trace:
        out = model.generate(**x, **GENERATE)
        direct = model(**x).logits
    real = x["attention_mask"].bool()
    assert torch.equal(logits(before), logits(out)) and torch.equal(plain[real], direct[real])
    after = model.generate(**x, **GENERATE)
    assert torch.equal(logits(before), logits(after))
    assert trace.prefills[0].entering == trace.prefills[0].leaving == trace.prefills[0].n_visual


def hooks_of(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_generate_of_the_users_own_is_given_back():
    model = llava()
    x, _ = inputs("one", model)
    calls = []
    own = lambda *a, **k: calls.append(1) or type(model).generate(model, *a, **k)  # noqa: E731
    model.generate = own
    with build()(model) as trace:
        model.generate(**x, max_new_tokens=2)
    assert model.generate is own and calls == [1] and len(trace.prefills) == 1


def test_methods_without_raters_have_an_empty_list_per_sample():
    model = llava()
    x, _ = inputs("ragged", model)
    with sparsevlm.build("none")(model) as trace:
        model(**x)
    assert [r.tolist() for r in trace.prefills[0].raters] == [[], [], []]


def test_the_model_is_afterwards_what_it_was():
    model = llava()
    x, _ = inputs("one", model)
    model(**x, output_hidden_states=True)  # transformers installs hooks of its own at the first such call
    hooks, attributes = hooks_of(model), set(vars(model))
    with pytest.raises(RuntimeError, match="by the user"), build()(model):
        model(**x)
        raise RuntimeError("by the user")
    assert hooks_of(model) == hooks and set(vars(model)) == attributes


@pytest.mark.parametrize(
    "impl,kind,place", list(product(["sdpa", "eager"], ["one", "batch", "multi", "ragged"], PLACES))
)
def test_cache_equals_no_cache(impl, kind, place):
    model = llava(impl=impl)
    x, _ = inputs(kind, model)
    with build(*place)(model):
        cached = model.generate(**x, **GENERATE)
        free = model.generate(**x, **GENERATE, use_cache=False)
    same(logits(cached), logits(free))
    held = lengths(cached.past_key_values)
    assert held[0] == held[1] > held[2] == held[3] > held[4] == held[5] > held[6] == held[7]
    assert not torch.allclose(logits(model.generate(**x, **GENERATE))[:, 0], logits(cached)[:, 0])


@pytest.mark.parametrize("name,kind,impl", list(product(IN_LAYERS, LAYOUTS, ["sdpa", "eager"])))
def test_early_drop_equals_the_plain_form(name, kind, impl):
    model = llava(impl=impl)
    x, _ = inputs(kind, model)
    with torch.no_grad():
        with METHODS[name](early_drop=False)(model) as plain:
            a = model(**x).logits
            out = model.generate(**x, **GENERATE)
        with METHODS[name](early_drop=True)(model) as early:
            b = model(**x).logits
            same(logits(out), logits(model.generate(**x, **GENERATE)))
    real = x["attention_mask"].bool()
    for p, e in zip(plain.prefills, early.prefills, strict=True):
        for s, t in zip(p.stages, e.stages, strict=True):
            assert all(torch.equal(i, j) for i, j in zip(s.kept, t.kept, strict=True))
    # rows that survive are equal; rows that were dropped are zero in both
    same(a[real], b[real])


def test_early_drop_computes_fewer_rows():
    model = llava()
    x, _ = inputs("one", model)
    rows = {}
    for i, layer in enumerate(model.model.language_model.layers):
        layer.mlp.register_forward_hook(lambda m, a, o, i=i: rows.setdefault(i, []).append(a[0].shape[1]))
    with torch.no_grad():
        for early in (True, False):
            with build(early_drop=early)(model):
                model(**x)
    # 36 -> 18 kept + 6 candidates + 14 text rows in layer 1 instead of 50
    assert rows[1] == [50 - 36 + 18 + 6, 50] and rows[0] == [50, 50] and rows[2] == [50 - 36 + 18 + 1] * 2


@pytest.mark.parametrize("name,kind", list(product(METHODS, ["one", "batch", "ragged"])))
def test_cache_equals_no_cache_for_every_method(name, kind):
    model = llava()
    x, _ = inputs(kind, model)
    with METHODS[name]()(model):
        cached, free = (model.generate(**x, **GENERATE, use_cache=c) for c in (True, False))
    same(logits(cached), logits(free))


@pytest.mark.parametrize("name,kind,impl", list(product(METHODS, ["batch", "ragged"], ["sdpa", "eager"])))
def test_batch_equals_singles(name, kind, impl):
    model = llava(impl=impl)
    x, rows = inputs(kind, model)
    with METHODS[name]()(model) as trace:
        out = model.generate(**x, **GENERATE)
        together = trace.prefills[-1]
        for b in range(len(rows)):
            trace.clear()
            one = model.generate(**single(x, rows, b), **GENERATE)
            same(logits(out)[b], logits(one)[0])
            if IMAGE in rows[b]:
                alone = trace.prefills[-1]
                offset = x["input_ids"].shape[1] - len(rows[b])
                assert alone.leaving[0] == together.leaving[b] and alone.entering[0] == together.entering[b]
                for a, t in zip(alone.stages, together.stages, strict=True):
                    assert torch.equal(a.kept[0], t.kept[b]) and torch.equal(a.origin[0], t.origin[b])
                    assert a.tokens_out[0] == t.tokens_out[b] and a.recycled[0] == t.recycled[b]
                if len(alone.raters[0]):
                    assert torch.equal(alone.raters[0] + offset, together.raters[b])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["batch", "ragged"])
def test_right_padding_equals_left_padding(place, kind):
    model = llava()
    left, rows = inputs(kind, model)
    right, _ = inputs(kind, model, side="right")
    with build(*place)(model):
        a, b = (model(**x, position_ids=(x["attention_mask"].cumsum(1) - 1).clamp(min=0)).logits for x in (left, right))
    for i, row in enumerate(rows):
        same(a[i, -1], b[i, len(row) - 1])


@pytest.mark.parametrize("kind,name", list(product(["one", "batch", "ragged"], ["sparsevlm", "plus", "random"])))
def test_beam_search(kind, name):
    model = llava()
    x, rows = inputs(kind, model)
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "suppress_tokens": SUPPRESS}
    with METHODS[name]()(model):
        out = model.generate(**x, **options)
        assert torch.equal(out, model.generate(**x, **options, use_cache=False))
        for b in range(len(rows)):
            assert torch.equal(model.generate(**single(x, rows, b), **options)[0, -6:], out[b, -6:])


def test_sampling_is_repeatable_and_uses_the_pruned_distribution():
    model = llava()
    x, _ = inputs("batch", model)
    options = GENERATE | {"do_sample": True, "temperature": 0.7}
    with build()(model):
        torch.manual_seed(3)
        a = model.generate(**x, **options)
        torch.manual_seed(3)
        b = model.generate(**x, **options)
        greedy = model.generate(**x, **GENERATE)
    assert torch.equal(a.sequences, b.sequences)
    same(a.logits[0], greedy.logits[0])


@pytest.mark.parametrize("family,impl", list(product(["mistral", "qwen2", "qwen3"], ["sdpa", "eager"])))
def test_families(family, impl):
    model = llava(family, impl=impl)
    x, rows = inputs("batch", model)
    with build()(model):
        out = model.generate(**x, **GENERATE)
        same(logits(out), logits(model.generate(**x, **GENERATE, use_cache=False)))
        for b in range(3):
            same(logits(out)[b], logits(model.generate(**single(x, rows, b), **GENERATE))[0])


@pytest.mark.parametrize(
    "family,kwargs",
    [
        ("mistral", {"sliding_window": 16}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}),
    ],
)
def test_sliding_windows(family, kwargs):
    model = llava(family, **kwargs)
    x, rows = inputs("batch", model)
    with build()(model):
        out = model.generate(**x, **GENERATE)
        same(logits(out), logits(model.generate(**x, **GENERATE, use_cache=False)))


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
def test_video_alone_in_a_batch_and_beside_an_image(impl):
    model = video_llava(impl)
    torch.manual_seed(3)
    rows = [prompt([4, "V", 8]), prompt([6, "V", 11])]
    ids, mask = pad(rows)
    video = torch.randn(2, 8, 3, 28, 28, dtype=model.dtype)
    method = build(keep=(60, 30, 10))
    with method(model) as trace:
        out = model.generate(input_ids=ids, attention_mask=mask, pixel_values_videos=video, **GENERATE)
        assert trace.prefills[-1].n_visual == [136, 136]
        for b in range(2):
            one = model.generate(input_ids=torch.tensor([rows[b]]), pixel_values_videos=video[b : b + 1], **GENERATE)
            same(logits(out)[b], logits(one)[0])
        rows = [prompt([4, "I", 8], n_image=16), prompt([6, "V", 11])]
        ids, mask = pad(rows)
        image = torch.randn(1, 3, 28, 28, dtype=model.dtype)
        mixed = model.generate(
            input_ids=ids, attention_mask=mask, pixel_values=image, pixel_values_videos=video[:1], **GENERATE
        )
        a = model.generate(input_ids=torch.tensor([rows[0]]), pixel_values=image, **GENERATE)
        b = model.generate(input_ids=torch.tensor([rows[1]]), pixel_values_videos=video[:1], **GENERATE)
    same(logits(mixed)[0], logits(a)[0])
    same(logits(mixed)[1], logits(b)[0])


@pytest.mark.parametrize(
    "place,name", [*product(PLACES, ["sparsevlm"]), (None, "plus"), (None, "random"), (None, "rank")]
)
@pytest.mark.parametrize("kind", ["one", "batch"])
def test_second_turn_of_text(place, name, kind):
    model = llava()
    x, _ = inputs(kind, model)
    batch = len(x["input_ids"])
    method = build(*place) if place else METHODS[name]()
    with method(model):
        first = model.generate(**x, **GENERATE)
        torch.manual_seed(9)
        ids = torch.cat([first.sequences, torch.randint(3, 90, (batch, 7))], 1)
        mask = torch.cat(
            [x["attention_mask"], x["attention_mask"].new_ones(batch, ids.shape[1] - x["input_ids"].shape[1])], 1
        )
        second = model.generate(input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **GENERATE)
    if name == "random":  # without a cache the second question would draw other tokens: look at the cache alone
        held = lengths(second.past_key_values)
        assert held == [ids.shape[1] + GENERATE["max_new_tokens"] - 1 - 36 + 12] * 8
        return
    # without a cache: the whole conversation, rated by the first turn's text only
    with method(model):
        steps = []
        sequence, attention = ids, mask
        for _ in range(GENERATE["max_new_tokens"]):
            steps.append(_no_cache_step(model, method, x, sequence, attention))
            token = steps[-1].clone()
            token[:, SUPPRESS] = float("-inf")
            sequence = torch.cat([sequence, token.argmax(-1, keepdim=True)], 1)
            attention = torch.cat([attention, attention.new_ones(batch, 1)], 1)
    same(logits(second), torch.stack(steps, 1).float())


def _no_cache_step(model, method, x, sequence, attention):
    """Logits of the last position without a cache, the prompt being that of the first turn."""
    hooks = next(h for h in _hooks_of(model))
    hooks.prompt_length = x["input_ids"].shape[1]
    try:
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        out = model(
            input_ids=sequence,
            attention_mask=attention,
            position_ids=positions,
            pixel_values=x["pixel_values"],
            use_cache=False,
        )
    finally:
        hooks.prompt_length = None
    return out.logits[:, -1]


def _hooks_of(model):
    for hook in model.model._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if owner is not None and hasattr(owner, "prompt_length"):
            yield owner


def test_two_caches_interleaved():
    model = llava()
    pair = [inputs("one", model, seed)[0] for seed in (1, 5)]
    with build()(model):
        want = [model.generate(**x, **GENERATE) for x in pair]
        caches = [DynamicCache(), DynamicCache()]
        outs = [model(**x, past_key_values=c) for x, c in zip(pair, caches, strict=True)]
        length = pair[0]["input_ids"].shape[1]
        for t in range(5):
            for o, w in zip(outs, want, strict=True):
                same(o.logits[:, -1].float(), w.logits[t])
            position = torch.tensor([[length + t]])
            outs = [
                model(input_ids=w.sequences[:, length + t][:, None], past_key_values=c, position_ids=position)
                for w, c in zip(want, caches, strict=True)
            ]


@pytest.mark.parametrize("name", METHODS)
def test_second_turn_with_a_new_image_batch_equals_singles(name):
    model = llava()
    x, rows = inputs("batch", model)
    torch.manual_seed(4)
    turn = torch.tensor([prompt([3, "I", 6]) for _ in range(3)])
    pixels = torch.randn(3, 3, 42, 42, dtype=model.dtype)

    def chat(x, turn, pixels):
        first = model.generate(**x, **GENERATE)
        ids = torch.cat([first.sequences, turn], 1)
        new = x["attention_mask"].new_ones(len(ids), ids.shape[1] - x["input_ids"].shape[1])
        mask = torch.cat([x["attention_mask"], new], 1)
        return model.generate(
            input_ids=ids[:, -turn.shape[1] - 1 :],
            attention_mask=mask,
            pixel_values=pixels,
            past_key_values=first.past_key_values,
            **GENERATE,
        )

    with METHODS[name]()(model) as trace:
        together = chat(x, turn, pixels)
        assert len(trace.prefills) == 2
        for b in range(3):
            alone = chat(single(x, rows, b), turn[b : b + 1], pixels[b : b + 1])
            same(logits(together)[b], logits(alone)[0])


@pytest.mark.parametrize("kind,place", list(product(["one", "batch", "ragged"], PLACES[:2])))
def test_static_cache(kind, place):
    model = llava()
    x, _ = inputs(kind, model)
    with build(*place)(model):
        dynamic = model.generate(**x, **GENERATE)
        static = model.generate(**x, **GENERATE, cache_implementation="static")
    same(logits(dynamic), logits(static), 1e-5)


@pytest.mark.parametrize("name", ["sparsevlm", "plus", "rank", "random"])
def test_prompt_lookup_decoding(name):
    model = llava()
    x, _ = inputs("one", model)
    x["input_ids"][0, -4:] = x["input_ids"][0, -8:-4]
    options = {"max_new_tokens": 12, "do_sample": False, "suppress_tokens": SUPPRESS}
    with METHODS[name]()(model):
        assert torch.equal(model.generate(**x, **options), model.generate(**x, **options, prompt_lookup_num_tokens=3))


def test_assisted_decoding():
    model, assistant = llava(), llava(seed=1)
    x, _ = inputs("one", model)
    options = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": SUPPRESS}
    with build()(model):
        want = model.generate(**x, **options)
        got = model.generate(**x, **options, assistant_model=assistant)
    assert torch.equal(want, got)


@pytest.mark.parametrize("name", METHODS)
def test_plain_text_model_with_a_visual_mask_equals_the_vlm(name):
    model = llava()
    x, _ = inputs("batch", model)
    visual = x["input_ids"] == IMAGE
    features = torch.cat(list(model.model.get_image_features(x["pixel_values"], return_dict=True).pooler_output))
    embeds = model.get_input_embeddings()(x["input_ids"]).masked_scatter(visual[..., None], features)
    from transformers import LlamaForCausalLM

    text = LlamaForCausalLM(model.config.text_config).eval().to(model.dtype)
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.lm_head.load_state_dict(model.lm_head.state_dict())
    text.generation_config.eos_token_id, text.generation_config.pad_token_id = None, 0
    with METHODS[name]()(model):
        want = model.generate(**x, **GENERATE)
    with METHODS[name]()(text, visual_mask=visual):
        for cache in (True, False):
            got = text.generate(inputs_embeds=embeds, attention_mask=x["attention_mask"], use_cache=cache, **GENERATE)
            same(logits(want), logits(got))
        beams = text.generate(
            inputs_embeds=embeds, attention_mask=x["attention_mask"], num_beams=2, max_new_tokens=4, do_sample=False
        )
    assert beams.shape[0] == 3


def test_output_recording_and_loss():
    model = llava(impl="eager")
    x, _ = inputs("batch", model)
    labels = x["input_ids"].masked_fill((x["input_ids"] == IMAGE) | (x["attention_mask"] == 0), -100)
    with build(early_drop=False)(model):
        out = model(**x, labels=labels, output_hidden_states=True, output_attentions=True)
    assert out.logits.shape[:2] == x["input_ids"].shape and out.loss.isfinite()
    sizes = [h.shape[1] for h in out.hidden_states]
    assert sizes[0] == sizes[2] > sizes[3] == sizes[4] > sizes[5] == sizes[6] > sizes[7]


def test_accelerate_hooks():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = llava()
    x, _ = inputs("batch", model)
    with build()(model):
        want = model.generate(**x, **GENERATE)
    for layer in model.model.language_model.layers:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    with build()(model):
        assert torch.equal(logits(want), logits(model.generate(**x, **GENERATE)))


def test_no_text_after_the_image():
    model = llava()
    torch.manual_seed(0)
    x = {"input_ids": torch.tensor([prompt([5, "I"])]), "pixel_values": torch.randn(1, 3, 42, 42, dtype=model.dtype)}
    before = model.generate(**x, **GENERATE)
    with build()(model):
        assert torch.equal(logits(before), logits(model.generate(**x, **GENERATE)))
    seen = []
    spy = model.model.language_model.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
    with METHODS["random"]()(model) as trace:  # needs no text
        out = model.generate(**x, **GENERATE)
    spy.remove()
    assert trace.prefills[0].leaving == [12]
    # also where the very last token was dropped: the next one is read off the last survivor
    (kept,) = trace.prefills[0].stages[0].kept
    assert int(kept.max()) < 35
    stay = torch.cat([torch.arange(len(prompt([5]))), len(prompt([5])) + kept])
    embeds = seen[0]["inputs_embeds"][:, stay]
    with torch.no_grad():
        want = model.model.language_model(inputs_embeds=embeds, position_ids=stay[None]).last_hidden_state[:, -1]
        same(out.logits[0], model.lm_head(want).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_keeps_mostly_the_same(dtype):
    model = llava(dtype=torch.float32)
    x, _ = inputs("batch", model)
    with build(recycle=0.0)(model) as full:
        model(**x)
    half = model.to(dtype)
    with build(recycle=0.0)(half) as trace:
        out = half.generate(**{**x, "pixel_values": x["pixel_values"].to(dtype)}, max_new_tokens=4)
    assert out.shape[1] == x["input_ids"].shape[1] + 4
    assert trace.prefills[0].stages[0].scores[0].dtype == torch.float32
    a, b = (set(t.prefills[0].stages[0].origin[0].tolist()) for t in (full, trace))
    assert len(a & b) >= 0.7 * len(a)
