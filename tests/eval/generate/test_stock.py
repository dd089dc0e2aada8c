"""lmms-eval's own command line says what `eval.run` would do otherwise, before it asks anything."""

import pytest

from eval.generate.lmms_model import SparseVLMAdapter
from eval.generate.stock import corrections, model_warnings, task_warnings
from eval.tasks import TASKS
from eval.tasks.generated import Generated
from tests.eval.requests import GREEDY, make_documents, make_requests

OURS = [name for name, task in TASKS.items() if not isinstance(task, Generated)]


@pytest.mark.parametrize("name", OURS)
def test_every_benchmark_is_named_with_its_command(name):
    asked = TASKS[name].lmms[0]
    name = next(task.name for task in TASKS.values() if asked in task.lmms)  # seedbench_image asks some of seedbench
    requests = make_requests(make_documents(2), task=asked)
    (line,) = task_warnings(requests)
    assert line.startswith(f"warning: {name} is asked and scored as lmms-eval ships it; what is NOT applied: ")
    assert f"python -m eval.run task={name} " in line and "\n" not in line


def test_what_is_said_of_a_task():
    mmvet = corrections(TASKS["mmvet"], {"until": ["\n\n"]})
    assert any("'post_prompt': ''" in text for text in mmvet) and any("max_new_tokens" in text for text in mmvet)
    assert "answers are kept whole (lmms-eval cuts them at ['\\n\\n'])" in mmvet
    assert not any("kept whole" in text for text in corrections(TASKS["mmvet"], {"until": None}))
    assert "the text of the question" in corrections(TASKS["mmbench"], {})
    assert "the metric pope_f1_mean" in corrections(TASKS["pope"], {})


def test_prompt_and_padding_of_the_papers():
    (line,) = model_warnings("llava", "hub", "crop")
    assert "prompt=hub, image_aspect_ratio=crop" in line and "prompt=vicuna_v1, image_aspect_ratio=pad" in line
    (line,) = model_warnings("llava", "vicuna_v1", "crop")
    assert "image_aspect_ratio=pad" in line and "prompt=" not in line
    assert model_warnings("llava", "vicuna_v1", "pad") == [] == model_warnings("other", "hub", "crop")


def test_the_model_class_says_it_once_and_before_the_answers(mini, capfd, monkeypatch):
    documents = make_documents(2)
    model, processor = mini
    adapter = SparseVLMAdapter("llava-1.5-7b", "random", 64, model=model, processor=processor, progress=lambda n: None)
    adapter.task_dict["pope"] = {"test": documents}
    for _ in range(2):
        adapter.generate_until(make_requests(documents, GREEDY, task="pope"))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 2 and "prompt=hub" in lines[0] and "pope is asked and scored as lmms-eval" in lines[1]
    adapter = SparseVLMAdapter("mini", "random", 64, model=model, processor=processor, progress=lambda n: None)
    adapter.task_dict["minivqa"] = {"test": documents}
    adapter.generate_until(make_requests(documents))
    assert "warning: " not in capfd.readouterr().err
