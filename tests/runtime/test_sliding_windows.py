"""A sliding window counts in the positions that a method gives the survivors, also in later decode steps.

Original positions: dropping equals masking, so that dropped tokens still take up the window. Renumbering: as in a
shorter prompt. The reference is a full-length run that only hides tokens; it never sees a cache.
"""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import sparsevlm
from tests.runtime.test_dropping_is_masking import MaskedRun
from tests.tiny import GENERATE, inputs, llava, logits, pad, prompt, same

WINDOW = 16
FAMILIES = {
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3},
}
LAYERS, KEEP = (1, 3, 5), (18, 10, 5)
METHODS = {
    "original": lambda: sparsevlm.build("sparsevlm", layers=LAYERS, keep=KEEP, recycle=0.0, positions="original"),
    "renumber": lambda: sparsevlm.build("sparsevlm", layers=LAYERS, keep=KEEP, recycle=0.0),
    "every layer": lambda: sparsevlm.build(
        "sparsevlm", layers=(0, 1, 2, 4), keep=(30, 20, 9, 2), recycle=0.0, positions="original"
    ),
    "plus": lambda: sparsevlm.build("sparsevlm_plus", layers=LAYERS, keep=KEEP),
    "random": lambda: sparsevlm.build("random", budget=12),
    "fastv": lambda: sparsevlm.build("fastv", k=3, keep=7),
    "next layer": lambda: sparsevlm.build("pyramiddrop", layers=(1, 4), ratios=(0.5, 0.2), positions="original"),
}


class WindowedRun(MaskedRun):
    """The same with a window in some layers, counted in indices or, renumbered, in positions."""

    def logits(self, record) -> torch.Tensor:
        stages = {stage.layer: stage for stage in record.stages}
        config = self.decoder.config
        for i, layer in enumerate(self.decoder.layers):
            if i - 1 in stages:
                for b in range(len(self.visual)):
                    self._cut(b, stages[i - 1])
            seen = self.alive[:, None] & (self.order[:, None] <= self.order[..., None])
            if getattr(config, "layer_types", None) is None or config.layer_types[i] == "sliding_attention":
                at = self.positions if self.renumber else torch.arange(seen.shape[1]).expand(len(seen), -1)
                seen = seen & (at[..., None] - at[:, None] < WINDOW)
            seen = seen | torch.eye(seen.shape[1], dtype=torch.bool)
            rope = self.decoder.rotary_emb(self.hidden, self.positions)
            bias = torch.zeros(seen.shape, dtype=self.hidden.dtype).masked_fill(
                ~seen, torch.finfo(self.hidden.dtype).min
            )
            self.hidden = layer(self.hidden, attention_mask=bias[:, None], position_embeddings=rope)
        return self.head(self.decoder.norm(self.hidden))


def reference(model, x: dict, sequences: torch.Tensor, record, positions: str) -> torch.Tensor:
    """Logits [B, steps, vocab] of the generated tokens of `sequences`."""
    start = x["input_ids"].shape[1]
    longer = x | {"input_ids": sequences[:, :-1]}
    longer["attention_mask"] = torch.nn.functional.pad(
        x["attention_mask"], (0, sequences.shape[1] - 1 - start), value=1
    )
    with torch.no_grad():
        return WindowedRun(model, longer, positions, "end", 0.0).logits(record)[:, start - 1 :]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "family,kind", [("mistral", "ragged"), ("qwen2", "batch"), pytest.param("mistral", "one", marks=pytest.mark.slow)]
)
def test_generation_equals_masking(family, name, kind):
    model = llava(family, **FAMILIES[family])
    x, _ = inputs(kind, model)
    method = METHODS[name]()
    options = GENERATE | {"max_new_tokens": 18}  # beyond the window, which the cache forgets
    with method(model) as trace:
        out = model.generate(**x, **options)
        static = model.generate(**x, **options, cache_implementation="static", disable_compile=True)
    want = reference(model, x, out.sequences, trace.prefills[0], method.positions)
    same(logits(out), want.float())
    assert torch.equal(out.sequences, static.sequences)
    same(logits(static), want.float())


@pytest.mark.parametrize("name", ["original", "plus", "next layer", "renumber"])
@pytest.mark.parametrize("family", FAMILIES)
def test_eager_attention_and_full_length_caches(family, name):
    """Without the model's config a cache keeps all tokens; only the mask makes the window."""
    model = llava(family, impl="eager", **FAMILIES[family])
    x, _ = inputs("batch", model)
    method = METHODS[name]()
    with method(model) as trace:
        out = model.generate(**x, **GENERATE, past_key_values=DynamicCache())
    same(logits(out), reference(model, x, out.sequences, trace.prefills[0], method.positions).float())


@pytest.mark.parametrize(
    "name",
    [n if n in ("original", "renumber", "plus") else pytest.param(n, marks=pytest.mark.slow) for n in METHODS],
)
@pytest.mark.parametrize("family", ["mistral"])
def test_a_second_turn_with_an_image_equals_the_batch_and_a_full_length_cache(family, name):
    model = llava(family, **FAMILIES[family])
    torch.manual_seed(2)
    rows = [prompt([5, "I", 9]), prompt([3, "I", 14])]
    ids, mask = pad(rows)
    turn = torch.tensor([prompt([3, "I", 6]) for _ in rows])
    pixels = torch.randn(4, 3, 42, 42, dtype=model.dtype)

    def chat(ids, mask, turn, pixels, new_cache) -> torch.Tensor:
        n = len(ids)
        cache = {"past_key_values": DynamicCache()} if new_cache else {}
        first = model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels[:n], **GENERATE, **cache)
        ids = torch.cat([first.sequences, turn], 1)
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        second = {"input_ids": ids[:, -turn.shape[1] - 1 :], "attention_mask": mask, "pixel_values": pixels[n:]}
        return logits(model.generate(**second, **GENERATE, past_key_values=first.past_key_values))

    with METHODS[name]()(model):
        together = chat(ids, mask, turn, pixels, False)
        same(together, chat(ids, mask, turn, pixels, True))
        for b, row in enumerate(rows):
            one = torch.tensor([row])
            alone = chat(one, torch.ones_like(one), turn[b : b + 1], pixels[b::2], False)
            same(together[b], alone[0])


def test_flash_attention_is_refused_with_original_positions():
    model = llava("mistral", sliding_window=WINDOW)
    x, _ = inputs("one", model)
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with METHODS["plus"]()(model):
        with pytest.raises(NotImplementedError, match="FlashAttention counts a sliding window in the tokens"):
            model(**x)
