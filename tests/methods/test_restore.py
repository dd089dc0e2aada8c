"""RESTORE: against a restatement on the unmodified model, identities, and cases its authors do not have."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

import sparsevlm
from sparsevlm.methods import restore
from sparsevlm.runtime import bias
from tests.methods.test_before_model import features
from tests.tiny import GENERATE, IMAGE, PATCHES, inputs, llava, logits, same

T = 12


def build(**options):
    return sparsevlm.build("restore", **{"budget": T} | options)


def theta(model) -> torch.Tensor:
    return model.model.language_model.rotary_emb.inv_freq.double()


class ByHand:
    """The unmodified text model on the merged rows, with masks of our own per layer.

    Attributes:
        rows: [L, D] embeddings; positions: [L]; sizes: [L], 1 for text.
    """

    def __init__(self, model, x: dict, method):
        self.model, self.text = model, model.model.language_model
        with method(model) as trace:
            self.logits = model(**x).logits[0, -1]
        with sparsevlm.build(method.base, budget=int(T * method.share))(model) as base:
            model(**x)
        ids = x["input_ids"][0].tolist()
        start = ids.index(IMAGE)
        origin = trace.prefills[0].stages[0].kept[0]
        projected = model.model.multi_modal_projector(features(model, x["pixel_values"])[0, 1:])
        kept = base.prefills[0].stages[0].kept[0].tolist()
        rest = [i for i in range(PATCHES) if i not in kept]
        member = restore.groups(projected[rest][None], T - len(kept), method.anchors)[0]
        made = {i: (projected[i], 1) for i in kept}
        for group in member:
            own = [rest[j] for j in group.nonzero().flatten().tolist()]
            made[own[(len(own) - 1) // 2]] = (projected[own].mean(0), len(own))
        assert sorted(made) == origin.tolist() and sum(n for _, n in made.values()) == PATCHES
        embeds = model.get_input_embeddings()(x["input_ids"])[0]
        self.rows = torch.cat([embeds[:start], *(made[i][0][None] for i in sorted(made)), embeds[start + PATCHES :]])
        after = list(range(start + PATCHES, len(ids)))
        self.positions = [*range(start), *(start + i for i in sorted(made)), *after]
        self.sizes = [1] * start + [made[i][1] for i in sorted(made)] + [1] * len(after)
        self.visual = [0] * start + [1] * T + [0] * len(after)

    def bias(self, layer: int, c: float, generated: int = 0) -> torch.Tensor:
        """[1, 1, L, L] for the prompt's rows; without the distances for those that were generated."""
        n = len(self.positions)
        out = torch.full((n + generated, n + generated), torch.finfo(torch.float64).min, dtype=torch.float64)
        for i in range(n + generated):
            for j in range(i + 1):
                size = 1.0
                if j < n and self.visual[j]:
                    size = PATCHES / T if layer == 0 else float(self.sizes[j])
                out[i, j] = torch.tensor(size).double().log()
                if i < n:
                    distance = abs(self.positions[i] - self.positions[j])
                    out[i, j] += (c - (distance * theta(self.model)).cos().mean()).log()
        return out[None, None]

    def last(self, c: float, more: list[int] = ()) -> torch.Tensor:
        """Logits after the prompt, and after each of the tokens `more`."""
        biases = [self.bias(0, c, len(more)), self.bias(1, c, len(more))]
        hooks = [
            layer.register_forward_pre_hook(
                lambda m, args, kwargs, i=i: (args, kwargs | {"attention_mask": biases[min(i, 1)]}), with_kwargs=True
            )
            for i, layer in enumerate(self.text.layers)
        ]
        embeds = self.model.get_input_embeddings()(torch.tensor([list(more)], dtype=torch.int64))[0]
        places = [*self.positions, *range(self.positions[-1] + 1, self.positions[-1] + 1 + len(more))]
        out = self.text(
            inputs_embeds=torch.cat([self.rows, embeds])[None], position_ids=torch.tensor([places]), use_cache=False
        )
        for hook in hooks:
            hook.remove()
        return self.model.lm_head(out.last_hidden_state[0, len(self.rows) - 1 :])


@pytest.mark.parametrize(
    "options",
    [{}, {"base": "divprune"}, {"base": "vispruner", "c": 1.5}, {"base": "scope", "share": 0.25}, {"anchors": "paper"}],
    ids=str,
)
def test_against_a_restatement_with_masks_by_hand(options):
    model = llava(layers=3).requires_grad_(False)
    x, _ = inputs("one", model)
    method = build(**options)
    hand = ByHand(model, x, method)
    same(hand.last(method.c)[0], hand.logits)
    with method(model):
        out = model.generate(**x, **GENERATE | {"max_new_tokens": 3})
    tokens = out.sequences[0, -3:].tolist()
    same(hand.last(method.c, tokens[:2]).float(), logits(out)[0], 1e-5)


@pytest.mark.parametrize("anchors", ["code", "paper"])
def test_groups_by_hand(anchors):
    x = torch.randn(1, 25, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    unit = torch.nn.functional.normalize(x[0], dim=-1)
    c = (unit @ unit.T).tolist()
    total = [sum(row) for row in c]
    score = []
    for i in range(25):
        others = [c[i][j] for j in range(25) if (total[j] < total[i] if anchors == "code" else total[j] > total[i])]
        score.append(total[i] * (1 - max(others, default=0.0)))
    chosen = sorted(sorted(range(25), key=lambda i: -score[i])[:7])
    member = restore.groups(x, 7, anchors)[0]
    for i in range(25):
        best = chosen.index(i) if i in chosen else max(range(7), key=lambda g: c[i][chosen[g]])
        assert member[:, i].nonzero().flatten().tolist() == [best]


def test_without_calibration_and_merging_it_is_the_base_at_original_positions():
    model = llava().requires_grad_(False)
    x, _ = inputs("one", model)
    with sparsevlm.build("divprune", budget=T)(model) as plain, torch.no_grad():
        renumbered = model(**x).logits[0, -1]
    kept = plain.prefills[0].stages[0].kept[0]
    with build(base="divprune", share=1.0, calibrate=False)(model) as trace, torch.no_grad():
        out = model(**x).logits[0, -1]
    assert torch.equal(trace.prefills[0].stages[0].kept[0], kept)
    projected = model.model.multi_modal_projector(features(model, x["pixel_values"])[0, 1:])
    embeds, start = model.get_input_embeddings()(x["input_ids"])[0], x["input_ids"][0].tolist().index(IMAGE)
    rows = torch.cat([embeds[:start], projected[kept], embeds[start + PATCHES :]])[None]
    places = torch.tensor([[*range(start), *(start + kept).tolist(), *range(start + PATCHES, len(embeds))]])
    mask = torch.ones(rows.shape[:2], dtype=torch.int64)
    same(model(inputs_embeds=rows, position_ids=places, attention_mask=mask).logits[0, -1], out)
    assert not torch.allclose(out, renumbered)


def test_a_large_c_forgets_distances():
    model = llava(layers=3).requires_grad_(False)
    x, _ = inputs("one", model)
    hand = ByHand(model, x, build(c=1e13))
    near = hand.bias(1, 1e13)[0, 0]
    assert torch.allclose(near[5:8, 5], near[6, 6].expand(3) - (near[6, 6] - near[5, 5]), atol=1e-9)
    same(hand.last(1e13)[0], hand.logits, 1e-6)
    assert not torch.allclose(hand.last(2.0)[0], hand.logits, atol=1e-3)


@pytest.mark.parametrize(
    "options", [{"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str
)
def test_every_way_to_generate_gives_the_same(options):
    model = llava(layers=4)
    x, _ = inputs("one", model)
    with build()(model):
        want = model.generate(**x, **GENERATE)
        out = model.generate(
            **x, **GENERATE | options | ({"disable_compile": True} if "cache_impl" in str(options) else {})
        )
    assert out.sequences.tolist() == want.sequences.tolist()
    same(logits(out), logits(want))


def test_beams_follow_their_prompt():
    model = llava(layers=4)
    x, rows = inputs("ragged", model)
    options = GENERATE | {"num_beams": 3, "max_new_tokens": 4}
    with build(budget=18)(model):
        together = model.generate(**x, **options)
        alone = model.generate(input_ids=torch.tensor([rows[0]]), pixel_values=x["pixel_values"][:1], **options)
    assert together.sequences[0, -4:].tolist() == alone.sequences[0, -4:].tolist()


def test_what_goes_on_with_a_cache_gets_sizes_only():
    """Several tokens in one call equal the same one by one, and a later picture can follow."""
    model = llava(layers=4)
    x, rows = inputs("one", model)
    more = torch.tensor([[4, 5, 6]])
    out = []
    for parts in ([more], [more[:, :1], more[:, 1:]], list(more.split(1, 1))):
        cache = DynamicCache(config=model.config.text_config)
        with build()(model), torch.no_grad():
            model(input_ids=torch.tensor([rows[0]]), pixel_values=x["pixel_values"], past_key_values=cache)
            out.append([model(input_ids=part, past_key_values=cache).logits[0] for part in parts][-1][-1])
            if len(parts) == 1:
                again = model(input_ids=torch.tensor([rows[0]]), pixel_values=x["pixel_values"], past_key_values=cache)
                assert bool(again.logits[0, -1].isfinite().all())
    same(out[0], out[1])
    same(out[0], out[2])


def test_refusals():
    model = llava(layers=2)
    x, rows = inputs("one", model)
    cut = rows[0].index(IMAGE) + PATCHES
    cache = DynamicCache(config=model.config.text_config)
    with build()(model), torch.no_grad():
        model(input_ids=torch.tensor([rows[0][:cut]]), pixel_values=x["pixel_values"], past_key_values=cache)
        with pytest.raises(ValueError, match="in one call"):
            model(input_ids=torch.tensor([rows[0][cut:]]), past_key_values=cache)
    for options, message in [
        ({"base": "cdpruner"}, "base 'cdpruner' is unknown"),
        ({"anchors": "far"}, "anchors 'far' is unknown"),
        ({"share": 1.5}, "share between 0 and 1"),
        ({"c": 1.0}, "must be above 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            build(**options)

    def family(implementation: str, sliding: bool = False):
        decoder = SimpleNamespace(config=SimpleNamespace(_attn_implementation=implementation))
        return SimpleNamespace(decoder=decoder, sliding=sliding)

    with pytest.raises(NotImplementedError, match="flash_attention_2 cannot add to attention logits"):
        bias.check_backend(family("flash_attention_2"))
    with pytest.raises(NotImplementedError, match="sliding windows"):
        bias.check_backend(family("sdpa", sliding=True))
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(NotImplementedError, match="calibrate=False"), build()(model):
        model(**x)
    model.model.language_model.config._attn_implementation = "sdpa"


def test_eager_attention_gives_the_same():
    x, _ = inputs("batch", llava())
    outs = []
    for impl in ("sdpa", "eager"):
        model = llava(impl=impl, dtype=torch.float32, layers=4)
        with build()(model), torch.no_grad():
            outs.append(model(**x | {"pixel_values": x["pixel_values"].float()}).logits[:, -1])
    same(*outs)
