"""The time left, by a clock of our own: right within a fifth after two minutes of asking."""

import os
import re

import pytest

from eval.generate import generator as asking
from eval.generate.generator import RunState
from eval.run import main
from eval.runs import series
from eval.runs.progress import Group, Progress
from tests.eval.test_run import breaking

# seconds per question of the first method, and how many: like Table 1's tasks on one GPU
TASKS = {
    "gqa": (0.11, 12_578),
    "mme": (0.12, 2_374),
    "textvqa": (0.21, 5_000),
    "vqav2": (0.1, 21_435),
    "mmvet": (4.0, 218),
}
METHODS = {"none": 1.0, "fastv 192": 0.74, "fastv 64": 0.63, "sparsevlm 192": 0.82, "sparsevlm 64": 0.7}


class Sweep:
    """All methods on all tasks, a batch at a time; seconds are what they would take."""

    def __init__(self, sampled: int, uneven: float = 0.0) -> None:
        self.now, self.uneven, self.progress = 0.0, uneven, Progress(shown=False)
        self.progress.groups = [Group(name, n, list(METHODS)) for name, (_, n) in TASKS.items()]
        self.sampled = sampled
        self.history: list[tuple[float, float, int]] = []

    def ask(self, state: RunState, task: str, method: str, batch: int) -> None:
        spread = 1 + self.uneven * ((batch * 7919) % 21 - 10) / 10  # batches differ, evenly over the task
        wobble = (
            1 + self.uneven * ((hash_of(task) * hash_of(method)) % 11 - 5) / 25
        )  # methods gain a little differently
        seconds = 8 * TASKS[task][0] * METHODS[method] * spread * wobble
        for i in range(8):
            state.answers[task, 8 * batch + i] = None
        state.asked, state.spent, self.now = state.asked + 8, state.spent + seconds, self.now + seconds

    def run(self) -> float:
        for group in self.progress.groups[1:]:
            for k in range(self.sampled):
                state = group.sampled.setdefault("none", RunState(None, None, 8))
                self.ask(state, group.title, "none", (2 * k + 1) * group.questions // 16 // self.sampled)
        for group in self.progress.groups:
            self.progress.begin(group)
            states = {method: RunState(None, None, 8) for method in METHODS}
            if known := group.sampled.get("none"):
                states["none"].answers.update(known.answers)
            self.progress.watch(states, group.questions)
            for batch in range(group.questions // 8):
                for method, state in states.items():
                    if (group.title, 8 * batch) not in state.answers:
                        self.ask(state, group.title, method, batch)
                self.history.append((self.now, *self.progress.left()))
        return self.now


def hash_of(text: str) -> int:
    return sum(map(ord, text))


@pytest.mark.parametrize("uneven", [0.0, 0.3])
def test_the_time_left_is_right_within_a_fifth_after_two_minutes(uneven):
    sweep = Sweep(sampled=3, uneven=uneven)
    end = sweep.run()
    until = end if not uneven else end / 2  # near the end, a task that has not begun is known by its sample alone
    later = [(now, left, unknown) for now, left, unknown in sweep.history if 120 <= now < 0.99 * until]
    assert later and later[0][0] < 130
    for now, left, unknown in later:
        assert not unknown and left == pytest.approx(end - now, rel=0.2), (now, left)


def test_without_samples_what_is_unknown_is_said():
    sweep = Sweep(sampled=0)
    sweep.run()
    now, seconds, unknown = sweep.history[40]
    assert unknown == sum(n for name, (_, n) in TASKS.items() if name != "gqa") * len(METHODS) and seconds > 0
    assert [unknown for _, _, unknown in sweep.history][-1] == 0


def test_in_words():
    progress = Progress(shown=False)
    group = Group("t", 100, ["a"])
    progress.groups = [group]
    assert progress.estimate() == "100 questions left, time unknown"
    state = RunState(None, None, 8, asked=10, spent=600.0)
    state.answers.update({("t", i): None for i in range(10)})
    group.states = {"a": state}
    assert progress.estimate() == "1.5 h left"
    progress.groups.append(Group("u", 7, ["a"]))
    assert progress.estimate() == "at least 1.5 h left: 7 questions are of a kind not measured yet"
    progress.begin(group)
    progress.begin(progress.groups[1])
    assert progress.left() == (0.0, 7)


def test_a_lane_that_failed_has_nothing_left():
    state = RunState(None, None, 8, asked=10, spent=10.0, error=asking.GenerationError("x"))
    assert Group("t", 100, ["a"], {"a": state}).left("a") == 0


def test_a_series_samples_its_later_tasks_and_asks_nothing_twice(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(series, "SAMPLED_FROM", 0)
    left = []
    told = Progress.__call__
    monkeypatch.setattr(Progress, "__call__", lambda self, *a: (told(self, *a), left.append(self.left()[1])) and None)
    asked = breaking(monkeypatch, 0)
    assert main(["-m", "method=random", "budget=64,32", "limit=6", "task.seed=0,1", "batch_size=1"]) == 0
    assert len(asked) == 2 * 2 * 6 and len(os.listdir("results/runs")) == 4
    assert left[2] == 0  # after the first answer everything can be told: the second task was sampled
    assert re.search(r"24/24|min left", capfd.readouterr().err)


def test_seconds_are_those_of_the_lanes_own_batches(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    states = {}
    monkeypatch.setattr(asking, "clock", clock)
    watch = Progress.watch
    monkeypatch.setattr(
        Progress, "watch", lambda self, found, n: (states.update(found), watch(self, found, n)) and None
    )
    assert main(["-m", "method=random", "budget=64,32", "limit=4", "batch_size=2"]) == 0
    assert [(state.asked, state.spent) for state in states.values()] == [(4, 2.0), (4, 2.0)]  # a tick a batch
