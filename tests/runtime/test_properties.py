"""Random prompts, schedules and options: a batch equals its samples alone, and the trace says what happened."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import sparsevlm
from sparsevlm.core.raters import RULES
from tests.tiny import same, text_config

N_LAYERS, WIDTH = 6, 64


@lru_cache
def model(family: str, kv_heads: int):
    torch.manual_seed(0)
    config = text_config(family, N_LAYERS, num_key_value_heads=kv_heads)
    return AutoModelForCausalLM.from_config(config).eval().double()


@dataclass(frozen=True)
class Row:
    """One prompt: lengths of its spans of text and, in turn, of images; a seed of its embeddings."""

    spans: tuple[int, ...]
    seed: int

    @property
    def visual(self) -> Tensor:
        return torch.cat([torch.full((n,), bool(i % 2)) for i, n in enumerate(self.spans)]).bool()

    @property
    def embeds(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(sum(self.spans), WIDTH, generator=generator, dtype=torch.float64)


@st.composite
def rows(draw) -> list[Row]:
    """One to three prompts of text and up to two images each; the first one has an image and a question."""
    out = []
    for b in range(draw(st.integers(1, 3))):
        spans = [draw(st.integers(0, 5))]
        for _ in range(draw(st.integers(1 if b == 0 else 0, 2))):
            spans += [draw(st.integers(1, 24)), draw(st.integers(0, 6))]
        if b == 0 or sum(spans) == 0:
            spans[-1] += draw(st.integers(1, 6))
        out.append(Row(tuple(spans), draw(st.integers(0, 10**6))))
    return out


@st.composite
def methods(draw, fewest_visual: int):
    """Any method of the project's own with any options."""
    name = draw(st.sampled_from(["sparsevlm", "sparsevlm", "sparsevlm_rank", "sparsevlm_plus", "random"]))
    if name == "random":
        return sparsevlm.build("random", budget=draw(st.integers(1, fewest_visual)), seed=draw(st.integers(0, 99)))
    layers = sorted(draw(st.sets(st.integers(-1, N_LAYERS - 2), min_size=1, max_size=4)))
    options = {
        "layers": layers,
        # two centred tokens are opposite: two text tokens tie exactly, and rounding chooses
        "raters": draw(st.sampled_from([rule for rule in (*RULES, 1, 3) if rule != "centred" or fewest_visual > 2])),
        "recycle": draw(st.sampled_from([0.0, 0.3, 0.3, 1.0])),
        "cluster": draw(st.sampled_from([0.1, 0.5])),
        "merge": draw(st.sampled_from(["mean", "sum"])),
        "positions": draw(st.sampled_from(["renumber", "original"])),
        "recycled_at": draw(st.sampled_from(["end", "centre"])),
        "early_drop": draw(st.booleans()),
    }
    if name == "sparsevlm_rank":
        options["rule"] = draw(st.sampled_from(["paper", "v1.0", "video"]))
        options |= {"lam": draw(st.floats(0, 1)), "scale": draw(st.floats(0.5, 5)), "bias": draw(st.integers(0, 9))}
    else:
        options["keep"] = [draw(st.integers(1, 30)) for _ in layers]
        options["always_drop"] = draw(st.booleans())
    return sparsevlm.build(name, **options)


def padded(batch: list[Row], side: str) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings [B, L, D], attention mask [B, L], visual mask [B, L]."""
    length = max(len(row.visual) for row in batch)
    embeds = torch.full((len(batch), length, WIDTH), 3.0, dtype=torch.float64)  # padding may hold anything
    mask, visual = torch.zeros(len(batch), length, dtype=torch.long), torch.zeros(len(batch), length, dtype=torch.bool)
    for b, row in enumerate(batch):
        n = len(row.visual)
        at = slice(length - n, length) if side == "left" else slice(0, n)
        embeds[b, at], mask[b, at], visual[b, at] = row.embeds, 1, row.visual
    return embeds, mask, visual


@dataclass
class Outcome:
    last: Tensor  # [B, vocab] logits of the last real token
    following: Tensor | None  # of one decoded token
    record: object
    cached: list[int]


@torch.no_grad()
def run(network, method, batch: list[Row], side: str, following: Tensor) -> Outcome:
    embeds, mask, visual = padded(batch, side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, rest = DynamicCache(), None
    with method(network, visual_mask=visual) as trace:
        out = network(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=cache)
        cached = [layer.keys.shape[2] for layer in cache.layers]
        if side == "left":
            more = torch.cat([mask, mask.new_ones(len(batch), 1)], 1)
            position = positions[:, -1:] + 1
            rest = network(
                inputs_embeds=following, attention_mask=more, position_ids=position, past_key_values=cache
            ).logits[:, -1]
    end = [(mask.shape[1] if side == "left" else len(row.visual)) - 1 for row in batch]
    record = trace.prefills[0] if trace.prefills else None
    return Outcome(out.logits[range(len(batch)), end], rest, record, cached)


def check_record(record, batch: list[Row], method, cached: list[int], offset: list[int]) -> None:
    """What the trace says fits together, and fits the prompt and the caches."""
    entering = []
    for b, row in enumerate(batch):
        n = int(row.visual.sum())
        text_after = len(row.visual) - 1 - int(row.visual.nonzero().max()) if n else 0
        assert record.n_visual[b] == n and record.n_tokens[b] == len(row.visual)
        if record.raters:
            raters = record.raters[b].tolist()
            first = offset[b] + len(row.visual) - text_after
            assert raters == sorted(set(raters)) and all(first <= r < first + text_after for r in raters)
            assert bool(raters) == (bool(text_after) and method.needs_text)
        count, origin, lengths, after = n, list(range(n)), [n] * N_LAYERS, -2
        for stage in record.stages:
            assert stage.tokens_in[b] == count and stage.layer > after
            kept, made = stage.kept[b].tolist(), stage.recycled[b]
            assert kept == sorted(set(kept)) and all(0 <= k < count for k in kept)
            assert len(kept) + made == stage.tokens_out[b] <= count
            if method.recycled_at == "end":  # merged tokens follow all kept ones
                origin = [origin[k] for k in kept]
                assert stage.origin[b].tolist() == origin
                origin += [-1] * made
            else:
                real = [o for o in stage.origin[b].tolist() if o >= 0]
                assert real == sorted(set(real)) and set(real) <= set(origin)
                origin = [*real, -1]
            scores = stage.scores[b]
            if scores is not None and len(kept) < count:
                dropped = sorted(set(range(count)) - set(kept))
                assert len(scores) == count and scores[kept].min() >= scores[dropped].max()
            if method.needs_text and not text_after:
                assert stage.tokens_out[b] == count
            count = stage.tokens_out[b]
            after = stage.layer
            lengths[after + 1 :] = [count] * (N_LAYERS - after - 1)
        left = [*lengths[1:], count]
        assert abs(record.entering[b] - sum(lengths) / N_LAYERS) < 1e-9
        assert abs(record.leaving[b] - sum(left) / N_LAYERS) < 1e-9
        entering.append([len(row.visual) - n + m for m in lengths])
    assert cached == [max(column) for column in zip(*entering, strict=True)]
    assert all(a.layer < b.layer for a, b in pairwise(record.stages))


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), rows(), st.sampled_from(["left", "left", "right"]))
def test_batch_equals_singles_and_the_trace_is_right(data, batch, side):
    network = model(
        data.draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"])), data.draw(st.sampled_from([1, 2, 4]))
    )
    fewest = min(n for row in batch if (n := int(row.visual.sum())))
    method = data.draw(methods(fewest))
    following = torch.randn(len(batch), 1, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = run(network, method, batch, side, following)
    length = max(len(row.visual) for row in batch)
    offset = [length - len(row.visual) if side == "left" else 0 for row in batch]
    if side == "left":  # right padding moves to the left, and stays in the caches in full until then
        check_record(together.record, batch, method, together.cached, offset)
    for b, row in enumerate(batch):
        if not row.visual.any():
            continue
        if method.needs_text and row.visual[-1]:
            continue  # nothing to prune: no record
        alone = run(network, method, [row], "left", following[b : b + 1])
        check_record(alone.record, [row], method, alone.cached, [0])
        same(together.last[b], alone.last[0])
        if side == "left":
            same(together.following[b], alone.following[0])
        stages = zip(together.record.stages, alone.record.stages, strict=False)
        for a, s in stages:
            assert torch.equal(a.kept[b], s.kept[0]) and torch.equal(a.origin[b], s.origin[0])
            assert a.tokens_in[b] == s.tokens_in[0] and a.tokens_out[b] == s.tokens_out[0]
        if together.record.raters:
            assert torch.equal(together.record.raters[b] - offset[b], alone.record.raters[0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("spans", [(2, 9, 2), (0, 9, 0), (3, 4, 0, 5, 0)])
@pytest.mark.parametrize("name", ["random", "sparsevlm"])
def test_beside_a_longer_prompt_of_text_nothing_is_misplaced(name, spans, side):
    """The batch stays as long as it was, but its rows move."""
    network, prompt = model("llama", 2), Row(spans, 1)
    options = {"budget": 1} if name == "random" else {"layers": (1, 3), "keep": (4, 2)}
    following = torch.randn(2, 1, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = run(network, sparsevlm.build(name, **options), [prompt, Row((20,), 2)], side, following)
    if name == "sparsevlm" and not spans[-1]:  # nothing rates: the model itself
        options = {"budget": "full"}
    alone = run(network, sparsevlm.build(name, **options), [prompt], "left", following[:1])
    same(together.last[0], alone.last[0])
    assert together.last[0].abs().max() > 0
