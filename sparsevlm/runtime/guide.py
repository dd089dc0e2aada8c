"""A second model that is asked the same first: what its attention says of the visual tokens, and how sure it is.

The guide answers greedily, unpruned. The importance of a visual token is the softmaxed attention that it gets in all
layers and heads, summed over the rows from the last visual token (inclusive) to the last token of the prompt and over
one row per generated token that is fed back (SGL, see methods/sgl.py). Hooks add it up layer by layer, of those rows
alone: no map is ever whole, and any attention implementation will do.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from sparsevlm.core.packing import take
from sparsevlm.core.precision import at_least_float32
from sparsevlm.core.scores import attention_rows, causal_bias
from sparsevlm.runtime.families import Family


@dataclass
class Prompts:
    """Embedded prompts, padding on the left; where what is, is known to the host.

    Attributes:
        embeds: [B, L, D].
        real: [B, L] bool, False = padding.
        visual: [B, L] bool.
        index: [B, L] int64, where each row stood before padding was moved to the left.
    """

    embeds: Tensor
    real: np.ndarray
    visual: np.ndarray
    index: np.ndarray

    @classmethod
    def aligned(cls, embeds: Tensor, real: np.ndarray, visual: np.ndarray) -> Prompts:
        """Move padding [B, L] wherever it is to the left; the other rows keep their order."""
        index = real.argsort(1, kind="stable")
        if (index != np.arange(real.shape[1])).any():
            embeds = take(embeds, torch.from_numpy(index).to(embeds.device))
        return cls(embeds, np.take_along_axis(real, index, 1), np.take_along_axis(visual & real, index, 1), index)

    @property
    def positions(self) -> np.ndarray:
        """[B, L] int64: 0, 1, ... from the first real token on."""
        return (self.real.cumsum(1) - 1).clip(0)


@dataclass
class Answers:
    """What the guide answered.

    Attributes:
        importance: [B, L] float32 (float64 stays), by the rows of the call; 0 where no visual token is.
        prefill: [B, L], the part of it that comes from the prompt's rows.
        ids: [B, n] int64; of a sample that ended earlier what comes behind its end means nothing.
        lengths: new tokens of each sample, the end among them.
        logits: [B, n, vocabulary] float32 (float64 stays).
    """

    importance: Tensor
    prefill: Tensor
    ids: Tensor
    lengths: list[int]
    logits: Tensor

    @property
    def confidence(self) -> list[float]:
        """Geometric mean of the probabilities of each sample's new tokens, which are the most probable ones."""
        best = self.logits.softmax(-1).amax(-1).log()
        return [float(row[:n].mean().exp()) for row, n in zip(best, self.lengths, strict=True)]


class Guide:
    """A model that guides another one.

    Args:
        family: of the guide, as `locate` finds it.
        answer_tokens: it generates at most so many; 0 = it only reads the prompt.
        layers: how many of its layers count, from the first; None = all. With `answer_tokens` 0 the others do not run.

    Raises:
        ValueError: a guide without so many layers, without an output head to answer with, or with rotary embeddings of
            several axes.
    """

    def __init__(self, family: Family, answer_tokens: int, layers: int | None = None):
        self.family, self.answer_tokens = family, answer_tokens
        self.layers = family.n_layers if layers is None else layers
        if not 1 <= self.layers <= family.n_layers:
            raise ValueError(f"layers={layers}: the guide has {family.n_layers} layers. Use 1 to {family.n_layers}")
        if answer_tokens and self._head() is None:
            raise ValueError(
                f"the guide, a {type(family.model).__name__}, has no output head to answer with. Use the whole model, "
                "or answer_tokens=0"
            )
        rope = getattr(family.decoder.config, "rope_parameters", None) or {}
        if "mrope_section" in rope:
            raise ValueError("a guide whose rotary embedding has several axes is not supported. Use another one")
        self.decoder = family.decoder if answer_tokens else _first_layers(family.decoder, self.layers)

    def _head(self) -> nn.Module | None:
        get = getattr(self.family.model, "get_output_embeddings", None)
        return None if get is None else get()

    @property
    def device(self) -> torch.device:
        return next(self.decoder.parameters()).device

    def embed(self, arguments: dict) -> Tensor:
        """Embed prompts [B, L, D] with the guide's own tower, projector and words; no layer runs.

        Args:
            arguments: `input_ids` and pixel values of a call of the model.
        """
        outer = copy.copy(self.family.outer)
        outer._modules = {**outer._modules, "language_model": _Nothing(self.family.decoder)}
        weight = next(self.family.outer.parameters())
        given = {k: v.to(weight.device) for k, v in arguments.items() if v is not None}
        given = {k: v.to(weight.dtype) if v.is_floating_point() else v for k, v in given.items()}
        with torch.no_grad():
            return outer(**given).last_hidden_state

    @torch.no_grad()
    def ask(self, prompts: Prompts) -> Answers:
        """Let the guide read and answer prompts; waits for the device after each token."""
        batch, device = len(prompts.real), prompts.embeds.device
        rows, cache = _Rows(self, prompts), DynamicCache()
        lengths, ids, logits, alive = [0] * batch, [], [], [True] * batch
        real, positions = prompts.real, prompts.positions
        with rows.watched():
            hidden = self._run(prompts.embeds, real, positions, cache)
            prefill = rows.importance.clone()
            for step in range(self.answer_tokens):
                logits.append(self._logits(hidden[:, -1]))
                ids.append(logits[-1].argmax(-1))
                lengths = [n + go for n, go in zip(lengths, alive, strict=True)]
                alive = [go and not end for go, end in zip(alive, self._ended(ids[-1]), strict=True)]
                if step + 1 == self.answer_tokens or not any(alive):
                    break
                rows.start_decoding(alive)
                real = np.pad(real, ((0, 0), (0, 1)), constant_values=True)
                positions = positions[:, -1:] + 1
                hidden = self._run(self._word(ids[-1])[:, None], real, positions, cache)
        made = torch.stack(ids, 1) if ids else torch.empty(batch, 0, dtype=torch.long, device=device)
        shown = torch.stack(logits, 1) if logits else rows.importance.new_empty(batch, 0, 0)
        return Answers(rows.by_call(rows.importance), rows.by_call(prefill), made, lengths, shown)

    @torch.no_grad()
    def score_answer(self, prompts: Prompts, keep: np.ndarray, ids: Tensor) -> Tensor:
        """Logits [B, n, vocabulary] with which the guide gives the answers [B, n] when it sees fewer visual tokens.

        Args:
            keep: [B, L] bool by the rows of the call, the visual tokens that it sees, from layer 0 on and at their own
                positions.
        """
        n = ids.shape[1]
        seen = prompts.real & (np.take_along_axis(keep, prompts.index, 1) | ~prompts.visual)  # the others are masked
        real = np.pad(seen, ((0, 0), (0, n - 1)), constant_values=True)
        positions = np.concatenate([prompts.positions, prompts.positions[:, -1:] + np.arange(1, n)], 1)
        embeds = torch.cat([prompts.embeds, self._word(ids[:, :-1])], 1)
        return self._logits(self._run(embeds, real, positions, None)[:, -n:])

    def _run(self, embeds: Tensor, real: np.ndarray, positions: np.ndarray, cache: DynamicCache | None) -> Tensor:
        return self.decoder(
            inputs_embeds=embeds,
            attention_mask=None if real.all() else torch.from_numpy(real).long().to(embeds.device),
            position_ids=torch.from_numpy(positions).to(embeds.device),
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def _word(self, ids: Tensor) -> Tensor:
        return self.family.decoder.get_input_embeddings()(ids)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self._head()(hidden)
        return logits.to(at_least_float32(logits.dtype))

    def _ended(self, ids: Tensor) -> list[bool]:
        """Which of the ids [B] end an answer, by the guide's generation_config; none on the meta device."""
        if ids.is_meta:
            return [False] * len(ids)
        ends = getattr(getattr(self.family.model, "generation_config", None), "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        return [i in ends for i in ids.tolist()]


class _Rows:
    """Adds up attention rows while the guide runs.

    Attributes:
        importance: [B, L] so far, by `prompts`.
        tail: rows that count, the last ones; weights: [B, tail], 1 for those that count in a sample.
    """

    def __init__(self, guide: Guide, prompts: Prompts):
        self.guide, self.prompts, self.device = guide, prompts, prompts.embeds.device
        self.dtype = at_least_float32(prompts.embeds.dtype)
        self.importance = torch.zeros(prompts.real.shape, dtype=self.dtype, device=self.device)
        places = np.arange(prompts.real.shape[1])
        last = np.where(prompts.visual, places, -1).max(1)
        self.shown = last >= 0
        self.tail = len(places) - int(last[self.shown].min())
        counted = (places >= last[:, None]) & self.shown[:, None]
        self.weights = self._flags(counted[:, -self.tail :]).to(self.dtype)
        self.key_mask = None if prompts.real.all() else self._flags(prompts.real)
        self.queries: Tensor | None = None

    def _flags(self, flags: np.ndarray) -> Tensor:
        return torch.from_numpy(flags).to(self.device)

    def start_decoding(self, alive: list[bool]) -> None:
        """From now on rows are single tokens, of the samples that have not ended."""
        self.tail, self.weights = 1, self._flags(np.array(alive) & self.shown)[:, None].to(self.dtype)
        if self.key_mask is not None:
            self.key_mask = nn.functional.pad(self.key_mask, (0, 1), value=True)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Hook the guide's layers that count."""
        handles = []
        for i, layer in enumerate(self.guide.decoder.layers[: self.guide.layers]):
            handles.append(layer.self_attn.q_proj.register_forward_hook(self._keep_queries))
            hook = self._hook(i)
            handles.append(layer.self_attn.register_forward_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep_queries(self, module: nn.Module, args: tuple, out: Tensor) -> None:
        self.queries = out[:, -self.tail :]

    def _hook(self, i: int):
        def add(module: nn.Module, args: tuple, kwargs: dict, out) -> None:
            family = self.guide.family
            query = self.queries.unflatten(-1, (-1, module.head_dim))
            if hasattr(module, "q_norm"):
                query = module.q_norm(query)
            cos, sin = (t[:, -self.tail :].expand(len(query), -1, -1) for t in kwargs["position_embeddings"])
            query = family.rotate(query.transpose(1, 2), cos, sin)
            keys = kwargs["past_key_values"].layers[i].keys
            window = family.window(i)
            bias = None if window is None else causal_bias(self.tail, keys.shape[2], self.dtype, keys.device, window)
            rows = attention_rows(query, keys, module.scaling, self.key_mask, bias)
            found = (rows * self.weights[:, None, :, None]).sum((1, 2))[:, : self.importance.shape[1]]
            self.importance += found.to(self.importance.device)
            self.queries = None

        return add

    def by_call(self, importance: Tensor) -> Tensor:
        """[B, L] by the rows of the call, visual tokens alone."""
        found = torch.where(self._flags(self.prompts.visual), importance, 0)
        return torch.zeros_like(found).scatter(1, self._flags(self.prompts.index), found)


class _Nothing(nn.Module):
    """In place of a language model: gives back the embeddings that it is given."""

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.config, self.embed_tokens = decoder.config, decoder.get_input_embeddings()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(self, inputs_embeds: Tensor, **_) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=inputs_embeds)


def _first_layers(decoder: nn.Module, layers: int) -> nn.Module:
    """A decoder of the first layers of another, which shares them and everything else with it."""
    if layers == len(decoder.layers):
        return decoder
    shallow = copy.copy(decoder)
    shallow._modules = {**decoder._modules, "layers": decoder.layers[:layers]}
    return shallow
