"""Comparing a run with the masked model. `check(case)` is the whole of the fuzzer for one case."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch import Tensor

from tests.fuzz.case import Case
from tests.fuzz.decisions import decider
from tests.fuzz.drive import Outcome, Run, Step
from tests.fuzz.pictures import VISION, check_rows
from tests.fuzz.reference import Contract, Conversation, Cut, Mismatch, Part, Undecided
from tests.tiny import SUPPRESS

RENUMBER = ("sparsevlm", "sparsevlm_rank", "pyramiddrop", "ficoco_l", *VISION)
NEEDS_TEXT = (
    "dart?", "fastv", "ficoco_l", "pyramiddrop", "sgl", "signpost", "sparsevlm", "sparsevlm_plus", "sparsevlm_rank",
)  # fmt: skip
UNBUDGETED = ("downsample", "none", "sparsevlm_rank")
TWO_PLACES = ("tops", "vscan")  # what they keep at first is more than the budget, and all that there is without text


def check(case: Case) -> str:
    """Run a case and compare it with the masked model.

    Returns:
        "exact", "refused: ..." (in a declared way), or "undecided: ..." where rounding decides.

    Raises:
        Mismatch: silently wrong, or refused where it should work. Whatever else is raised is wrong as well.
    """
    run = Run(case)
    try:
        outcome = run.run()
    except (ValueError, NotImplementedError) as refusal:
        if any(re.search(pattern, str(refusal)) for pattern in refusals(case)):
            return f"refused: {refusal}"
        return unpruned_fails(case, refusal)
    except Exception as error:
        return unpruned_fails(case, error)
    try:
        Comparison(run, outcome).check()
        if case.alone and len(case.rows) > 1:
            check_alone(run, outcome)
    except Undecided as why:
        return f"undecided: {why}"
    return "exact"


def unpruned_fails(case: Case, error: Exception) -> str:
    """Where the model itself cannot be run like this, the case says nothing; else raises the error."""
    try:
        Run(replace(case, method="none", options={})).run()
    except type(error):
        return f"refused: by transformers, {type(error).__name__}"
    except Exception:
        pass
    raise error


def refusals(case: Case) -> list[str]:
    """Patterns of the messages with which this case may be refused."""
    out, o = [], case.options
    turns = [*case.rows, *([case.turn] if case.turn else [])]
    if isinstance(o.get("budget"), int):
        out += [r"is out of reach"]
        out += [r"leaves less than a token"] if case.method == "downsample" else []
    if "layers" in o or "k" in o or "start" in o or case.method == "aim" or case.shape.layers < 3:
        out += [r"do(es)? not fit a model of \d+ layers"]
    if case.method in VISION and (case.shape.kind == "text" or case.entry != "ids"):
        out += ["acts in the vision tower or the projector", "acts while pictures are encoded"]
    if case.method == "aim":
        out += [r"first layer \d+ comes after", r"merge_to \d+ is above"]
        out += ["a prompt of nothing else"] if any(case.visual(p) == case.length(p) for p in turns) else []
    return out


class Comparison:
    """One outcome beside the masked model."""

    def __init__(self, run: Run, outcome: Outcome):
        self.run, self.case, self.outcome, self.model = run, run.case, outcome, run.model
        self.alive: list[list[Tensor]] = []  # per conversation and layer
        self.parts: list[list[Part]] = []

    def contract(self) -> Contract:
        o, name = self.case.options, self.case.method
        mode = o.get("positions", "renumber" if name in RENUMBER else "original")
        recycling = name in ("sparsevlm", "sparsevlm_rank", "sparsevlm_plus")
        return Contract(
            renumber=lambda layer: layer < 0 if name in ("aim", "signpost") else mode == "renumber",
            recycled_at=o.get("recycled_at", "end"),
            share=o.get("recycle", 0.0 if name == "sparsevlm_plus" else 0.3) if recycling else 0.0,
            cluster=o.get("cluster", 0.1),
            merge=o.get("merge", "mean"),
            solved=isinstance(o.get("budget"), int),
            decide=decider(self.case),
        )

    def check(self) -> None:
        self._records()
        by: dict[int, list[Step]] = {}
        for step in self.outcome.steps:
            by.setdefault(step.conversation, []).append(step)
        for c in range(len(self.outcome.prompts)):
            want, conversation = self._reference(c)
            for step in by.get(c, []):
                self._step(step, want, conversation)
            for _, total in (s for s in self.outcome.sums if s[0] == c):
                self._beam(c, total, want, conversation)
            if self.outcome.full is not None:
                self._full(c, want, conversation)
        self._cached()

    # ---- the masked model --------------------------------------------------------------------------------------------
    def _reference(self, c: int) -> tuple[Tensor, Conversation]:
        run, b = self.run, self.outcome.prompts[c]
        embed, rows, parts = self.model.get_input_embeddings(), [], []
        for n, turn in enumerate(run.turns):
            start = sum(len(r) for r in rows)
            early = n and self.case.mode != "manual"  # the last generated token comes with the next turn
            own = turn.embeds[b]
            visual = [start + i for i, token in enumerate(turn.ids[b]) if token >= 98]
            part = Part(start - bool(early), start + len(own), visual)
            own = self._cuts(part, n, c, own)
            parts.append(part)
            rows += [own, embed(torch.tensor(self.outcome.said[n][c], dtype=torch.long)).to(own.dtype)]
        first = 0
        if self.case.mode in ("forward", "manual") and not self.case.position_ids:
            first = run.offsets[b]
        conversation = Conversation(self.model, torch.cat(rows), parts, self.contract(), first)
        want = conversation.run()
        self.alive.append(conversation.alive_at)
        self.parts.append(parts)
        return want, conversation

    def _cuts(self, part: Part, n: int, c: int, embeds: Tensor) -> Tensor:
        """Give a part what the trace says of it; returns the embeddings of its prompt."""
        records, s, b = self.outcome.records[n], self.outcome.samples[c], self.outcome.prompts[c]
        if not records:
            return embeds
        record, length = records[0], part.end - part.start
        offset = self.run.offsets[b] if n == 0 else 0
        shown = record.raters[s].tolist()
        part.raters = [part.start + r - offset for r in shown]
        if record.n_visual[s] != len(part.visual):
            raise Mismatch(f"n_visual {record.n_visual[s]}, should be {len(part.visual)}")
        guessed = self.case.mode in ("lookup", "assisted")  # candidates may come with the prompt
        if record.n_tokens[s] != length and not (guessed and record.n_tokens[s] > length):
            raise Mismatch(f"n_tokens {record.n_tokens[s]}, should be {length}")
        for stage in record.stages:
            kept, merged = stage.kept[s].tolist(), stage.recycled[s]
            scores = stage.scores[s]
            if stage.layer < 0 and self.case.method in VISION and part.visual:
                if len(kept) + merged != stage.tokens_out[s]:
                    raise Mismatch(f"{stage.tokens_out[s]} tokens left, {len(kept)} kept and {merged} merged")
                parts = self.case.rows[b] if n == 0 else self.case.turn
                entered = self.outcome.entered[n][s]
                at = offset if n == 0 else len(entered) - len(embeds)
                embeds = entered[at : at + len(embeds)]
                turn = self.run.turns[n]
                total = kept if self.case.method != "aim" else range(stage.tokens_out[s])
                kept = check_rows(self.case, turn, b, parts, embeds, list(total))
                merged, scores = 0, None
            part.cuts.append(Cut(stage.layer, kept, merged, scores, stage.tokens_in[s], stage.tokens_out[s]))
        return embeds

    def _records(self) -> None:
        """Each turn has its record, further ones (without a cache) say the same; budgets are met."""
        budget = self.case.options.get("budget")
        for n, records in enumerate(self.outcome.records):
            rows = self.case.rows if n == 0 else (self.case.turn,) * len(self.case.rows)
            rows = [rows[b] for b in self.outcome.prompts]
            needs = self.case.method in NEEDS_TEXT
            prunable = [bool(self.case.visual(r)) and not (needs and isinstance(r[-1], str)) for r in rows]
            if any(prunable) != bool(records):
                raise Mismatch(f"turn {n}: {len(records)} records, prompts that can be pruned: {prunable}")
            if self.case.cache != "none" and len(records) > 1:
                raise Mismatch(f"turn {n}: {len(records)} records of one prefill")
            for record in records:
                for mine, first in zip(record.stages, records[0].stages, strict=True):
                    if any(not torch.equal(a, f) for a, f in zip(mine.kept, first.kept, strict=True)):
                        raise Mismatch(f"layer {mine.layer}: other tokens kept at a later step without a cache")
            ends = self.case.method in TWO_PLACES and any(isinstance(r[-1], str) for r in rows)
            if not records or not isinstance(budget, int) or self.case.method in UNBUDGETED or ends:
                continue
            for s, can in enumerate(prunable):
                there = min(budget, records[0].n_visual[s])
                if can and abs(self._mean(records[0], s) - there) > 0.5:
                    raise Mismatch(f"budget {there}: {self._mean(records[0], s):.3f} tokens reached")

    def _mean(self, record, s: int) -> float:
        """Mean tokens that the budget is about, from the stages of a record."""
        entering = self.case.options.get("match") == "entering"
        total = 0
        for layer in range(record.n_layers):
            last = layer - 1 if entering else layer
            total += [record.n_visual[s], *(x.tokens_out[s] for x in record.stages if x.layer <= last)][-1]
        if not entering and abs(record.leaving[s] - total / record.n_layers) > 1e-9:
            raise Mismatch(f"leaving {record.leaving[s]}, the stages say {total / record.n_layers}")
        if entering and abs(record.entering[s] - total / record.n_layers) > 1e-9:
            raise Mismatch(f"entering {record.entering[s]}, the stages say {total / record.n_layers}")
        return total / record.n_layers

    # ---- comparing ---------------------------------------------------------------------------------------------------
    def _row(self, row: int, conversation: Conversation) -> int:
        """The row itself, or the last one before it that is left."""
        if conversation.alive[row]:
            return row
        order = conversation.order
        left = [r for r in conversation.alive.nonzero()[:, 0].tolist() if order[r] < order[row]]
        if not left:
            raise Mismatch("no row is left, and logits are returned")
        return max(left, key=lambda r: float(order[r]))

    def close(self, exact: bool) -> float:
        """Relative difference of logits that is rounding."""
        if self.case.dtype == "bfloat16" and self.case.method == "ficoco_l":
            return float("inf")  # what it folds is not restated in half precision
        return {"float64": 1e-8 if exact else 2e-6, "float32": 5e-3, "bfloat16": 0.5}[self.case.dtype]

    def _equal(self, got: Tensor, want: Tensor, where: str, exact: bool) -> None:
        worst, scale = float((got.double() - want.double()).abs().max()), float(want.double().abs().max())
        if not worst <= self.close(exact) * scale:
            raise Mismatch(f"{where}: logits differ by {worst:.3g} (largest {scale:.3g})")

    def _step(self, step: Step, want: Tensor, conversation: Conversation) -> None:
        logits = want[self._row(step.row, conversation)]
        where = f"conversation {step.conversation}, row {step.row}"
        if step.logits is not None:
            self._equal(step.logits, logits, where, self.case.mode == "manual")
        if step.token is not None:
            free = logits.double().clone()
            free[SUPPRESS] = float("-inf")
            lost = float(free.max() - free[step.token])
            if not lost <= 2 * self.close(False) * float(logits.double().abs().max()):
                raise Mismatch(f"{where}: token {step.token} is {lost:.3g} below the best one, {int(free.argmax())}")

    def _beam(self, c: int, total: float, want: Tensor, conversation: Conversation) -> None:
        said, end = self.outcome.said[0][c], self.parts[c][0].end
        wanted = 0.0
        for t, token in enumerate(said):
            logits = want[self._row(end - 1 + t, conversation)]
            wanted += float(logits.double().log_softmax(-1)[token])
        close = {"float64": 1e-4, "float32": 2e-2, "bfloat16": 10.0}[self.case.dtype]
        if not abs(total - wanted) <= close * max(1.0, abs(wanted)):
            raise Mismatch(f"conversation {c}: log-probability {total:.6f} of a beam, should be {wanted:.6f}")

    def _full(self, c: int, want: Tensor, conversation: Conversation) -> None:
        b, alive = self.outcome.prompts[c], conversation.alive
        at = self.run.offsets[b]
        got = self.outcome.full[c, at : at + len(want)]
        last = len(want) - 1
        moved = None if alive[last] else self._row(last, conversation)  # the last survivor stands there, too
        for row in range(len(want)):
            if alive[row]:
                self._equal(got[row], want[row], f"prompt {b}, row {row}", True)
            elif row == last:
                self._equal(got[row], want[moved], f"prompt {b}, last row", True)
            elif got[row].any():
                raise Mismatch(f"prompt {b}: logits at row {row}, whose token was dropped")

    def _cached(self) -> None:
        """The caches hold what is left, of the prompt that has most left, and every token that came later."""
        if self.case.shape.window is not None:
            return  # they forget what is out of sight
        for n, held in enumerate(self.outcome.cached):
            for layer in range(self.case.shape.layers):
                total = 0
                for m in range(n + 1):
                    total += max(
                        int(alive[layer][parts[m].start : parts[m].end].sum())
                        for alive, parts in zip(self.alive, self.parts, strict=True)
                    )
                    said = len(self.outcome.said[m][0])
                    total += said if self.case.mode == "manual" else max(0, said - 1)
                if held is not None and self.case.mode not in ("lookup", "assisted") and held[layer] != total:
                    raise Mismatch(f"turn {n}, layer {layer}: the cache holds {held[layer]} tokens, should be {total}")


def check_alone(run: Run, together: Outcome) -> None:
    """Each prompt by itself is decided and computed as in the batch."""
    for b in range(run.batch):
        own = run.alone(b)
        outcome = own.run()
        Comparison(own, outcome).check()
        for mine, theirs in zip(outcome.records, together.records, strict=True):
            if not mine:
                continue
            stages = {s.layer: s for s in theirs[0].stages}
            for stage in mine[0].stages:
                kept = stages[stage.layer].kept[b * len(together.prompts) // run.batch]
                if not torch.equal(stage.kept[0], kept):
                    message = f"alone it keeps {stage.kept[0].tolist()}, in the batch {kept.tolist()}"
                    raise Mismatch(f"prompt {b}, layer {stage.layer}: {message}")
