"""Running a case through the public API, and comparing all that comes out with the masked model."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import sparsevlm
from tests.fuzz.case import Case, Turn, build_model, decoder_of, make_turn
from tests.tiny import IMAGE, SUPPRESS, VIDEO, pad


@dataclass
class Step:
    """Logits that the library computed for one row of one conversation.

    Attributes:
        conversation: which.
        row: of the conversation.
        logits: [vocab]; None where only the choice of the next token is known.
        token: the token that was chosen greedily; None = none was.
    """

    conversation: int
    row: int
    logits: Tensor | None
    token: int | None = None


@dataclass
class Outcome:
    """What a run of a case gave.

    Attributes:
        conversations: per returned sequence its prompt, and its token ids after the prompt.
        prompts: which prompt each conversation belongs to.
        steps: logits.
        records: of each turn, those that must be alike: one, or one per step without a cache.
        samples: which sample of the records each conversation is.
        entered: of each turn [B, L, D], what the text model was given.
        cached: of each turn the tokens that the cache of each layer holds; None = no such cache.
        sums: (conversation, log-probability of its tokens) of beams.
        full: of a plain forward, logits [B, L, vocab].
    """

    prompts: list[int]
    said: list[list[list[int]]]  # per turn, per conversation
    steps: list[Step] = field(default_factory=list)
    records: list[list] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    entered: list[Tensor] = field(default_factory=list)
    cached: list[list[int] | None] = field(default_factory=list)
    sums: list[tuple[int, float]] = field(default_factory=list)
    full: Tensor | None = None


class Run:
    """One case in one model."""

    def __init__(self, case: Case, turns: list[Turn] | None = None, members: list[int] | None = None):
        self.members = list(range(len(case.rows))) if members is None else members  # of the whole batch
        self.case, self.model = case, build_model(case.shape, case.attention, case.dtype)
        if turns is None:
            turns = [make_turn(case, self.model, case.rows, case.seed)]
            if case.turn is not None:
                turns.append(make_turn(case, self.model, (case.turn,) * len(case.rows), case.seed + 1))
        self.turns = turns
        self.batch = len(self.turns[0].ids)
        self.ids, self.mask = pad(self.turns[0].ids, case.side)
        self.offsets = [0 if case.side == "right" else self.ids.shape[1] - len(r) for r in self.turns[0].ids]
        self.padded = not bool(self.mask.all())

    def alone(self, b: int) -> Run:
        """Prompt `b` by itself."""
        return Run(replace(self.case, rows=(self.case.rows[b],)), [t.only(b, self.case) for t in self.turns], [b])

    # ---- what the caller passes --------------------------------------------------------------------------------------
    @property
    def visual_mask(self) -> Tensor | None:
        return (self.ids == IMAGE) | (self.ids == VIDEO) if self.case.entry != "ids" else None

    def prompt(self) -> dict:
        """Arguments of a forward or of generate() for the first turn."""
        out = {}
        if self.case.entry == "embeds":
            embeds = torch.full((*self.ids.shape, self.turns[0].embeds[0].shape[1]), 3.0, dtype=self.case.torch_dtype)
            for b, row in enumerate(self.turns[0].embeds):
                embeds[b, self.offsets[b] : self.offsets[b] + len(row)] = row
            out["inputs_embeds"] = embeds
        else:
            out["input_ids"] = self.ids
            out |= self.turns[0].pixels
        if self.padded or self.case.attention_mask:
            out["attention_mask"] = self.mask
        return out

    def install(self):
        method = sparsevlm.build(self.case.method, **self.case.options)
        return method(self.model) if self.visual_mask is None else method(self.model, visual_mask=self.visual_mask)

    def run(self) -> Outcome:
        """Call the model as the case says.

        Raises:
            whatever the library raises.
        """
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.manual_seed(self.case.seed)
            with self.install() as self.trace:
                self.spied: list[Tensor] = []
                spy = decoder_of(self.model).register_forward_pre_hook(self._spy, with_kwargs=True, prepend=True)
                try:
                    return getattr(self, self.case.mode, self.generate)()
                finally:
                    spy.remove()

    def _spy(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            embeds = module.embed_tokens(ids)
        self.spied.append(embeds)

    # ---- ways of running ---------------------------------------------------------------------------------------------
    def forward(self) -> Outcome:
        x = self.prompt()
        if self.case.position_ids:
            x["position_ids"] = (self.mask.cumsum(1) - 1).clamp(min=0)
        if self.case.square:
            x["attention_mask"] = self._square()
        out = self.model(**x, use_cache=self.case.cache != "none")
        result = Outcome(list(range(self.batch)), [[[] for _ in range(self.batch)]])
        result.samples, result.full = list(range(self.batch)), out.logits
        self._note(result, out.past_key_values if self.case.cache != "none" else None)
        return result

    def _square(self) -> Tensor:
        """[B, 1, L, L]: causal and padding, as truth values or, for eager attention, added to logits."""
        length = self.mask.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril() & self.mask[:, None, None].bool()
        if self.case.attention == "sdpa":
            return seen
        low = torch.finfo(self.case.torch_dtype).min
        return torch.zeros(seen.shape, dtype=self.case.torch_dtype).masked_fill(~seen, low)

    def _note(self, result: Outcome, cache) -> None:
        """Records and caches of the turn that has just ended."""
        result.records.append(list(self.trace.prefills))
        result.entered.append(self.spied[0])
        held = None
        if cache is not None and type(cache) is DynamicCache:
            held = [layer.keys.shape[2] for layer in cache.layers]
        result.cached.append(held)
        self.trace.clear()
        self.spied.clear()

    def generate(self) -> Outcome:
        case = self.case
        options = {"suppress_tokens": SUPPRESS, "return_dict_in_generate": True, "max_new_tokens": case.steps,
                   "do_sample": case.mode == "sample"}  # fmt: skip
        beams = 3 if case.mode == "beams" else 1
        if case.mode == "beams":
            options |= {"num_beams": 3, "num_return_sequences": 3, "output_scores": True, "length_penalty": 0.0}
        elif case.mode == "lookup":
            options["prompt_lookup_num_tokens"] = 2
        elif case.mode == "assisted":
            other = replace(case.shape, seed=case.shape.seed + 1)
            options["assistant_model"] = build_model(other, case.attention, case.dtype)
        else:
            options["output_logits"] = True
        if case.cache == "none":
            options["use_cache"] = False
        elif case.cache == "static":
            options["cache_implementation"] = "static"
        if case.chunk is not None:
            options["prefill_chunk_size"] = case.chunk
        x = self.prompt()
        out = self.model.generate(**x, **options)
        given = 0 if "inputs_embeds" in x else self.ids.shape[1]
        result = Outcome([i // beams for i in range(self.batch * beams)], [])
        result.samples = list(range(self.batch * beams))
        self._said(result, out, given, 0)
        self._note(result, None if case.cache == "none" else out.past_key_values)
        if case.turn is not None:
            self._second(result, out, options)
        return result

    def _said(self, result: Outcome, out, given: int, turn: int) -> None:
        """Tokens and logits of one call of generate()."""
        new = out.sequences[:, given:]
        before = [self._length(result, turn, c) for c in range(len(result.prompts))]
        result.said.append(new.tolist())
        for c, row in enumerate(new.tolist()):
            if self.case.mode == "beams":
                result.sums.append((c, float(out.sequences_scores[c])))
                continue
            for t, token in enumerate(row):
                logits = out.logits[t][c] if "logits" in out and out.logits is not None else None
                greedy = None if self.case.mode == "sample" else token
                result.steps.append(Step(c, before[c] - 1 + t, logits, greedy))

    def _length(self, result: Outcome, turn: int, c: int) -> int:
        """Rows of a conversation before the answer of a turn."""
        prompts = sum(len(t.ids[result.prompts[c]]) for t in self.turns[: turn + 1])
        return prompts + sum(len(said[c]) for said in result.said[:turn])

    def _second(self, result: Outcome, first, options: dict) -> None:
        turn = self.turns[1]
        new = torch.tensor(turn.ids)
        ids = torch.cat([first.sequences, new], 1)
        mask = torch.cat([self.mask, self.mask.new_ones(self.batch, ids.shape[1] - self.mask.shape[1])], 1)
        if turn.pixels:  # of the new tokens only, those that the cache does not hold
            ids = ids[:, -new.shape[1] - 1 :]
        options = {k: v for k, v in options.items() if k != "cache_implementation"}
        out = self.model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **turn.pixels, **options
        )
        self._said(result, out, ids.shape[1], 1)
        self._note(result, out.past_key_values)

    def manual(self) -> Outcome:
        """Forward by forward, with tokens that were drawn beforehand."""
        case, length, mask = self.case, 0, self.mask
        result = Outcome(list(range(self.batch)), [])
        result.samples = list(range(self.batch))
        text = getattr(self.model.config, "text_config", self.model.config)
        room = self.ids.shape[1] + sum(len(t.ids[0]) + case.steps for t in self.turns)
        cache = DynamicCache() if case.cache == "dynamic" else StaticCache(config=text, max_cache_len=room)
        for n, turn in enumerate(self.turns):
            if n:
                x = {"input_ids": torch.tensor(turn.ids), **turn.pixels}
                mask = torch.cat([mask, mask.new_ones(self.batch, len(turn.ids[0]))], 1)
            else:
                x = self.prompt()
                x.pop("attention_mask", None)
            generators = [torch.Generator().manual_seed(case.seed + 97 * n + b) for b in self.members]
            drawn = torch.stack([torch.randint(3, 90, (case.steps,), generator=g) for g in generators])
            before = [self._length(result, n, c) for c in range(self.batch)]
            result.said.append(drawn.tolist())
            for t in range(case.steps + 1):
                new = (x["inputs_embeds"] if "inputs_embeds" in x else x["input_ids"]).shape[1]
                length += new
                if self.padded or case.attention_mask:
                    x["attention_mask"] = mask
                if case.position_ids:
                    x["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -new:]
                out = self.model(**x, past_key_values=cache, use_cache=True)
                for c in range(self.batch):
                    result.steps.append(Step(c, before[c] - 1 + t, out.logits[c, -1]))
                if t < case.steps:
                    x = {"input_ids": drawn[:, t : t + 1]}
                    mask = torch.cat([mask, mask.new_ones(self.batch, 1)], 1)
            self._note(result, cache)
            cache = copy.deepcopy(cache) if case.seed % 3 == 0 else cache
        return result
