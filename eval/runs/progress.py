"""Progress over all questions of a series of runs, and how long asking will still take.

Tasks differ in what a question costs, and so do methods, so one rate over everything is wrong. A rate here is wall time
per question of one run on one task. What was not measured yet is taken from what was: a run costs on a task what
another run costs there, times what the two cost on a task that both were measured on. Before the first run of several
tasks goes on, a few batches of each task are asked (see `evaluate.sample`; the answers count), so that there is
something to take for each.

Assumed: the ratio of two methods is the same on all tasks, a task's batches cost the same on the mean, and the machine
stays as fast as it is. Loading models and data, and scoring with its judges, are not in it.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from eval.generate.generator import RunState


@dataclass
class Group:
    """Runs that go through their questions together.

    Attributes:
        title: for the bar.
        questions: that each run asks.
        labels: of the runs.
        states: label -> where its answers are counted; empty before the group begins.
        sampled: label -> where a sample of it was asked beforehand.
        over: whether it has ended.
    """

    title: str
    questions: int
    labels: Sequence[str]
    states: dict[str, RunState] = field(default_factory=dict)
    sampled: dict[str, RunState] = field(default_factory=dict)
    over: bool = False

    def left(self, label: str) -> int:
        """Questions that a run still has to ask."""
        state = self.states.get(label) or self.sampled.get(label)
        if self.over or (self.states and (label not in self.states or state.error is not None)):
            return 0
        return self.questions - (len(state.answers) + len(state.failures) if state is not None else 0)

    def rate(self, label: str) -> float | None:
        """Seconds per question of a run as measured; None if it was not."""
        found = [states[label] for states in (self.states, self.sampled) if label in states]
        asked, spent = sum(state.asked for state in found), sum(state.spent for state in found)
        return spent / asked if asked else None


class Progress:
    """The bar; it appears with the first answer, after whatever can be wrong.

    Args:
        shown: False in all processes but the first.
    """

    def __init__(self, shown: bool) -> None:
        self.groups: list[Group] = []
        self.total, self.done, self.shown = 0, 0, shown
        self._now: Group | None = None
        self._bar: tqdm | None = None

    def begin(self, group: Group) -> None:
        """The group before, if any, is over; this one is being asked."""
        if self._now is not None:
            self._now.over = True
        self._now = group

    def watch(self, states: dict[str, RunState], questions: int) -> None:
        """Take the states of the runs of the group that has begun, and how many questions each has in this process."""
        if self._now is not None:
            self._now.states, self._now.questions = dict(states), questions

    def __call__(self, expected: int, answered: int) -> None:
        """Count questions of runs that begin, and answers."""
        self.total += expected
        self.done += answered
        if not self.shown:
            return
        if self._bar is None:
            if not answered:
                return
            interval = 0.1 if sys.stderr.isatty() else 15  # a log file gets a line now and then
            self._bar = tqdm(
                total=self.total, initial=self.done - answered, unit="q", mininterval=interval, file=sys.stderr,
                dynamic_ncols=True, bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            )  # fmt: skip
        self._bar.total = self.total
        self._bar.set_description(self._now.title if self._now else "", refresh=False)
        self._bar.set_postfix_str(self.estimate(), refresh=False)
        self._bar.update(answered)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def estimate(self) -> str:
        """How long asking will still take, in words."""
        seconds, unknown = self.left()
        if not seconds and unknown:
            return f"{unknown} questions left, time unknown"
        text = f"{seconds / 3600:.1f} h left" if seconds >= 3600 else f"{seconds / 60:.0f} min left"
        return f"at least {text}: {unknown} questions are of a kind not measured yet" if unknown else text

    def left(self) -> tuple[float, int]:
        """Seconds that the rest takes, and the number of questions of which nothing is known."""
        seconds, unknown = 0.0, 0
        for group in self.groups:
            for label in group.labels:
                if questions := group.left(label):
                    rate = self._rate(group, label)
                    seconds += questions * (rate or 0.0)
                    unknown += 0 if rate else questions
        return seconds, unknown

    def _rate(self, group: Group, label: str) -> float | None:
        if own := group.rate(label):
            return own
        guesses = []
        for other in group.labels:
            if here := group.rate(other):
                ratios = [mine / its for g in self.groups if (mine := g.rate(label)) and (its := g.rate(other))]
                guesses.append(here * (statistics.median(ratios) if ratios else 1.0))
        return statistics.median(guesses) if guesses else None
