"""A row of a benchmark's data -> the text of its question and the settings of its generation, as the authors' scripts
make them (recordings in tests/goldens/eval), through our tasks."""

import json
from functools import cache

import pytest

from eval.generate.generator import generation_arguments
from eval.tasks import TASKS
from tests.eval.tasks.asked import loaded
from tests.goldens.load import files

pytestmark = pytest.mark.recordings
_NAMES = {"llava_bench_wild": "llava_bench"}  # where ours is another than the recordings'
_read = cache(lambda path: json.loads(path.read_text()))


PER_BENCHMARK = [
    pytest.param(path, benchmark, id=f"{path.stem}-{benchmark}")
    for path in files("eval", "prompts*.json")
    for benchmark in _read(path)["generation"]
]


def task_of(benchmark: str):
    name = benchmark if benchmark in TASKS else _NAMES.get(benchmark)
    if name not in TASKS:
        pytest.skip(f"no task asks {benchmark}")
    (task,) = loaded(name, **({"judge": "exact_match"} if TASKS[name].judge else {})).tasks
    return task


@pytest.mark.parametrize(("path", "benchmark"), PER_BENCHMARK)
def test_question(hub, path, benchmark):
    task = task_of(benchmark)
    rows = [row for row in _read(path)["rows"] if row["benchmark"] == benchmark]
    assert [row["id"] for row in rows if task.doc_to_text(row["doc"]) != row["question_text"]] == []


@pytest.mark.parametrize(("path", "benchmark"), PER_BENCHMARK)
def test_generation(hub, path, benchmark):
    recorded = _read(path)["generation"][benchmark]
    made, until = generation_arguments(task_of(benchmark).config.generation_kwargs, 0)
    assert made["max_new_tokens"] == recorded["max_new_tokens"]
    assert made["do_sample"] is False and recorded["temperature"] == 0  # greedy, whatever do_sample says
    assert made.get("num_beams", 1) == recorded.get("num_beams", 1)
    assert set(until) <= set(recorded.get("stop", []))  # "</s>" ends an answer as a token
