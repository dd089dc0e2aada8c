"""What lmms-eval's own command line does otherwise than `eval.run`, said before it asks anything.

There, tasks are asked and scored as lmms-eval ships them: no correction of `eval/tasks/benchmarks.py` applies, and a
checkpoint's own chat template and crop are taken unless `--model_args` says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import yaml

from eval.tasks import TASKS, Task
from eval.tasks.generated import Generated
from eval.tasks.questions import as_the_authors

_EXPERIMENTS = Path(__file__).resolve().parents[2] / "configs" / "experiment"
_PAPERS = {"llava": "llava_1_5_7b_paper", "video_llava": "video_llava_7b_paper"}  # by config.json's model_type
#: Key of lmms-eval's task configuration -> what its replacement changes.
_CHANGES = {
    "doc_to_text": "the text of the question",
    "doc_to_visual": "the picture or video that is shown",
    "process_docs": "which questions are asked",
    "process_results": "how answers are read",
}


def task_warnings(requests: Iterable) -> list[str]:
    """One line for each task among lmms-eval's requests that `eval.run` asks or scores otherwise."""
    ours: dict[str, Task] = {}
    for task in TASKS.values():
        for name in () if isinstance(task, Generated) else task.lmms:
            ours.setdefault(name, task)  # of several tasks on the same questions, the papers'
    first: dict[str, dict] = {}
    for request in requests:
        first.setdefault(request.args[4], request.args[1])
    named: dict[str, list[str]] = {}
    for name, gen_kwargs in first.items():
        if name in ours:
            named.setdefault(ours[name].name, corrections(ours[name], gen_kwargs))
    return [
        f"warning: {name} is asked and scored as lmms-eval ships it; what is NOT applied: {'; '.join(missing)}. "
        f"Use python -m eval.run task={name} for numbers that compare with the papers'"
        for name, missing in named.items()
    ]


def corrections(task: Task, gen_kwargs: dict) -> list[str]:
    """What `eval.run` changes about a task, in words."""
    not_judged = {"judge": None} if task.judge else {}
    overrides = as_the_authors(task.folder) | task.overrides(task.settings({"name": task.name, **not_judged}))
    metric = next(iter(task.metrics))
    found = [what for key, what in _CHANGES.items() if key in overrides]
    if specific := overrides.get("lmms_eval_specific_kwargs"):
        found.append(f"the text around the question ({specific['default']})")
    if generation := overrides.get("generation_kwargs"):
        found.append(f"how answers are generated ({generation})")
    if gen_kwargs.get("until"):
        found.append(f"answers are kept whole (lmms-eval cuts them at {gen_kwargs['until']})")
    if task.judge:
        found.append("the judge, which never scores 0 where it fails")
    if metric in task.ours:
        found.append(f"the metric {metric}")
    if task.group is not None:
        found.append("whole groups of questions under a limit")
    return [*found, *([task.note] if task.note else [])]


def model_warnings(model_type: str, prompt: str, image_aspect_ratio: str) -> list[str]:
    """A line if prompt or padding are not those with which the papers evaluate such a model."""
    path = _EXPERIMENTS / f"{_PAPERS.get(model_type)}.yaml"
    if not path.is_file():
        return []
    papers = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]
    have = {"prompt": prompt, "image_aspect_ratio": image_aspect_ratio}
    other = [key for key in have if papers.get(key, have[key]) != have[key]]
    if not other:
        return []
    return [
        f"warning: {', '.join(f'{key}={have[key]}' for key in other)}, but the papers evaluate with "
        f"{', '.join(f'{key}={papers[key]}' for key in other)}: add that to --model_args"
    ]
