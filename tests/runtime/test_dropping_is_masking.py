"""Cutting tokens out equals a full-length run that only hides them, decisions being the recorded ones."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import sparsevlm
from tests.restatement import density_peaks, merged_tokens
from tests.tiny import EARLY_DROP, IMAGE, VIDEO, inputs, llava, pad, prompt, same, video_llava

LAYERS, KEEP = (1, 3, 5), (18, 10, 5)
PLACES = list(product(["original", "renumber"], ["end", "centre"]))


@pytest.fixture(autouse=True)
def float64_throughout(monkeypatch):
    """transformers normalises in float32 whatever the dtype: there rounding of 1e-15 may become one of 1e-7."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * hidden * (hidden.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


class MaskedRun:
    """A forward in which no row ever moves: dropped tokens are hidden, a merged one is written into its centre's row.

    Attributes:
        alive: [B, L] bool, what later layers may look at.
        order: [B, L], a row sees the alive rows of no larger order: a merged token may be behind tokens that follow it.
        visual: per sample the rows of the visual tokens, in order.
    """

    def __init__(self, model, x: dict, positions: str, recycled_at: str, share: float):
        self.decoder, self.head = model.model.language_model, model.lm_head
        ids, real = x["input_ids"], x["attention_mask"].bool()
        self.hidden = self._embeddings(model, x)
        self.renumber, self.at_end, self.share = positions == "renumber", recycled_at == "end", share
        self.alive = real.clone()
        self.order = torch.arange(ids.shape[1], dtype=torch.float64).repeat(len(ids), 1)
        self.positions = (real.long().cumsum(1) - 1).clamp(min=0)
        self.visual = [((row == IMAGE) | (row == VIDEO)).nonzero()[:, 0].tolist() for row in ids]

    @staticmethod
    def _embeddings(model, x: dict) -> Tensor:
        hidden = model.get_input_embeddings()(x["input_ids"])
        for token, name, read in (
            (IMAGE, "pixel_values", model.model.get_image_features),
            (IMAGE, "pixel_values_images", model.model.get_image_features),
            (VIDEO, "pixel_values_videos", getattr(model.model, "get_video_features", None)),
        ):
            if name in x:
                features = torch.cat(list(read(x[name], return_dict=True).pooler_output))
                features = features.reshape(-1, hidden.shape[-1])
                hidden = hidden.masked_scatter((x["input_ids"] == token)[..., None], features)
        return hidden

    def logits(self, record) -> Tensor:
        stages = {stage.layer: stage for stage in record.stages}
        for i, layer in enumerate(self.decoder.layers):
            if i - 1 in stages:
                for b in range(len(self.visual)):
                    self._cut(b, stages[i - 1])
            seen = self.alive[:, None] & (self.order[:, None] <= self.order[..., None])
            seen = seen | torch.eye(seen.shape[1], dtype=torch.bool)
            rope = self.decoder.rotary_emb(self.hidden, self.positions)
            self.hidden = layer(self.hidden, attention_mask=seen[:, None], position_embeddings=rope)
        return self.head(self.decoder.norm(self.hidden))

    def _cut(self, b: int, stage) -> None:
        rows, kept = self.visual[b], stage.kept[b].tolist()
        assert stage.tokens_in[b] == len(rows)
        if len(kept) == len(rows):
            return
        dropped = [i for i in range(len(rows)) if i not in kept]
        scores = stage.scores[b].tolist()
        assert min(scores[i] for i in kept) >= max(scores[i] for i in dropped)
        self.alive[b, [rows[i] for i in dropped]] = False
        left = [rows[i] for i in kept]
        if self.share:
            left += self._merge(
                b, [rows[i] for i in sorted(dropped, key=lambda i: -scores[i])], max(rows, key=self._at(b))
            )
        self.visual[b] = sorted(left, key=self._at(b))
        assert stage.tokens_out[b] == len(left)
        if self.renumber:
            remaining = self.alive[b].nonzero()[:, 0].tolist()
            self.positions[b, sorted(remaining, key=self._at(b))] = torch.arange(len(remaining))

    def _at(self, b: int):
        return lambda row: float(self.order[b, row])

    def _merge(self, b: int, dropped: list[int], last: int) -> list[int]:
        """Rows of the tokens merged out of `dropped`, which come in order of score."""
        pool = dropped[: int(self.share * len(dropped)) + 1]
        k = int(0.1 * len(pool)) + 1
        tokens = self.hidden[b, pool]
        centres, _ = density_peaks(tokens, k)
        rows = [pool[c] for c in centres]
        self.hidden = self.hidden.clone()
        self.hidden[b, rows] = merged_tokens(tokens, k)
        self.alive[b, rows] = True
        if self.at_end:
            self.order[b, rows] = self.order[b, last] + torch.arange(1, k + 1, dtype=torch.float64) / (k + 1) / 8
        return rows


def check(model, x: dict, method, positions: str, recycled_at: str, share: float = 0.3) -> None:
    positions_in = (x["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), method(model) as trace:
        got = model(**x, position_ids=positions_in).logits
    masked = MaskedRun(model, x, positions, recycled_at, share)
    with torch.no_grad():
        want = masked.logits(trace.prefills[0])
    assert masked.alive.sum() < x["attention_mask"].sum()
    same(got[masked.alive], want[masked.alive])
    assert not got[~masked.alive].any()  # the caller sees nothing of dropped tokens


def build(kind: str, positions: str, recycled_at: str, **options):
    options |= {"layers": LAYERS, "positions": positions, "recycled_at": recycled_at}
    if kind == "fixed":
        return sparsevlm.build("sparsevlm", keep=KEEP, **options)
    rule = {"rule": "v1.0", "scale": 2.0, "bias": 3} if kind == "v1.0" else {"lam": 0.9}
    return sparsevlm.build("sparsevlm_rank", **rule, **options)


@pytest.mark.parametrize("options", EARLY_DROP)
@pytest.mark.parametrize("layout", ["one", "multi", "batch", "ragged"])
@pytest.mark.parametrize(
    "kind,place", [*product(["fixed"], PLACES), ("paper", PLACES[1]), ("paper", PLACES[2]), ("v1.0", PLACES[2])]
)
def test_sparsevlm(kind, layout, place, options):
    model = llava()
    x, _ = inputs(layout, model)
    check(model, x, build(kind, *place, **options), *place)


@pytest.mark.parametrize("options", EARLY_DROP)
@pytest.mark.parametrize("layout", ["one", "multi", "batch", "ragged"])
@pytest.mark.parametrize("name", ["plus", "plain", "random"])
def test_without_recycling(name, layout, options):
    model = llava()
    x, _ = inputs(layout, model)
    method = {
        "plus": lambda: sparsevlm.build("sparsevlm_plus", layers=LAYERS, keep=KEEP, **options),
        "plain": lambda: sparsevlm.build("sparsevlm", layers=(0, 1, 2, 6), keep=(30, 25, 9, 1), recycle=0.0, **options),
        "random": lambda: sparsevlm.build("random", budget=9),
    }[name]()
    check(model, x, method, method.positions, "end", 0.0)


@pytest.mark.parametrize("options", EARLY_DROP)
@pytest.mark.parametrize("place", PLACES)
def test_every_layer_prunes(place, options):
    """Merged tokens are dropped and merged again; a stage follows directly on another; one token is left in the end."""
    model = llava()
    x, _ = inputs("batch", model)
    layers, keep = tuple(range(7)), (30, 21, 15, 10, 6, 3, 1)
    method = sparsevlm.build("sparsevlm", layers=layers, keep=keep, positions=place[0], recycled_at=place[1], **options)
    check(model, x, method, *place)


@pytest.mark.parametrize("options", EARLY_DROP)
@pytest.mark.parametrize("place", PLACES)
def test_every_token_of_the_last_image_is_dropped(place, options, monkeypatch):
    """Merged tokens still come where that image was: after the text between the two."""
    model = llava()
    torch.manual_seed(0)
    ids, mask = pad([prompt([3, "I", 4, "I", 5], n_image=36)])
    x = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 42, 42, dtype=model.dtype)}
    method = sparsevlm.build(
        "sparsevlm", layers=(1, 4), keep=(2, 1), recycle=0.05, positions=place[0], recycled_at=place[1], **options
    )
    scores = type(method).score
    last = lambda self, stage: scores(self, stage) - 10.0 * (stage.visual_index >= 43)  # noqa: E731  the second image
    monkeypatch.setattr(type(method), "score", last)
    check(model, x, method, *place, 0.05)


@pytest.mark.parametrize("options", EARLY_DROP)
def test_video_beside_image(options):
    model = video_llava()
    torch.manual_seed(3)
    ids, mask = pad([prompt([4, "I", 8], n_image=16), prompt([6, "V", 11])])
    x = {"input_ids": ids, "attention_mask": mask}
    x["pixel_values_images"] = torch.randn(1, 3, 28, 28, dtype=model.dtype)
    x["pixel_values_videos"] = torch.randn(1, 8, 3, 28, 28, dtype=model.dtype)
    method = sparsevlm.build("sparsevlm", layers=LAYERS, keep=(60, 30, 10), **options)
    check(model, x, method, "renumber", "end")
