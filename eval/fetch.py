"""Say what runs need from the model hub, and fetch it, so that they can run offline afterwards.

    python -m eval.fetch experiment=paper_image --dry-run
    python -m eval.fetch experiment=paper_image
    python -m eval.fetch model=llava_1_5_7b task=gqa,pope

Takes the arguments of `python -m eval.run`; methods and budgets need nothing of their own, except for the text tower of
cdpruner and anchorprune, which their first run fetches. Sizes are the hub's own, "unknown" where it cannot be asked;
that of a data set is of its whole repository, of which a task may take a part. Exit status: 0 everything is there (or
--dry-run); 2 something is not, each said on one line.
"""

from __future__ import annotations

import fnmatch
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eval.errors import USER, UserError, one_line, report
from eval.runs.configs import CONFIGS, explain
from eval.tasks import TASKS, TaskSettings, task_settings
from eval.tasks.folders import hf_home
from eval.tasks.generated import Generated
from sparsevlm.models.checkpoint import CHECKPOINT_FILES, EMBEDDED, HUB_ALIASES, find_checkpoint

_SWEPT = ("model", "task")


@dataclass(frozen=True)
class Need:
    """Something that runs need.

    Attributes:
        name: of the model or task.
        what: where it is from, and how large it is.
        fetch: gets it; UserError, ValueError or OSError say why it cannot be had.
    """

    name: str
    what: str
    fetch: Callable[[], object]


def main(arguments: Sequence[str] | None = None) -> int:
    """List and fetch what the command line asks for; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    try:
        needs = list(needed([a for a in arguments if a != "--dry-run"]))
    except (HydraException, OmegaConfBaseException) as error:
        return report(UserError(explain(error, arguments)))
    except (UserError, ValueError) as error:
        return report(UserError(one_line(error)))
    for need in needs:
        print(f"{need.name}: {need.what}", flush=True)
    if "--dry-run" in arguments:
        return 0
    failed = 0
    for number, need in enumerate(needs, 1):
        print(f"[{number} of {len(needs)}] {need.name} ...", flush=True)
        try:
            need.fetch()
        except (UserError, ValueError, OSError) as error:
            failed += 1
            report(UserError(f"{need.name}: {one_line(error)}"))
    if failed:
        print(f"{failed} of {len(needs)} are missing; rerun the same command to fetch them", flush=True)
        return USER
    print("everything is there; with HF_HUB_OFFLINE=1 the runs ask the hub nothing", flush=True)
    return 0


def needed(arguments: Sequence[str]) -> Iterator[Need]:
    """Models and tasks of the runs that `eval.run` would do with these arguments, each once."""
    configs = list(_composed([a for a in arguments if a not in ("-m", "--multirun") and not a.startswith("hydra")]))
    models = {(c["model"]["pretrained"], c["model"]["revision"]): c["model"]["name"] for c in configs}
    for (pretrained, revision), name in models.items():
        yield Need(
            f"model {name}", _model(pretrained, revision), lambda p=pretrained, r=revision: find_checkpoint(p, r)
        )
    for settings, limit in {task_settings(c["task"]): c["limit"] for c in configs}.items():
        yield Need(f"task {settings.name}", _task(settings), lambda s=settings, n=limit: _load(s, n))


def _composed(arguments: Sequence[str]) -> Iterator[dict]:
    """A configuration for each combination of model and task."""
    values = {key: [a.partition("=")[2].split(",") for a in arguments if a.startswith(f"{key}=")] for key in _SWEPT}
    rest = [a for a in arguments if a.partition("=")[0] not in _SWEPT]
    rest = [a for a in rest if a.partition("=")[0].partition(".")[0] not in ("method", "budget")]
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        choices = {key: found[-1] if found else [None] for key, found in values.items()}
        first = [f"{key}={listed[0]}" for key, listed in choices.items() if listed[0]]
        experiment = OmegaConf.to_container(hydra.compose("config", [*first, *rest]))["experiment"]
        for entry in (experiment or {}).get("runs", []):
            for key in _SWEPT:
                if key in entry:
                    listed = entry[key] if isinstance(entry[key], list) else [entry[key]]
                    choices[key] = list(dict.fromkeys([*filter(None, choices[key]), *listed]))
        for model in choices["model"]:
            for task in choices["task"]:
                own = [f"{key}={value}" for key, value in (("model", model), ("task", task)) if value]
                yield OmegaConf.to_container(hydra.compose("config", [*own, *rest]), resolve=True)


def _load(settings: TaskSettings, limit: int | None) -> None:
    """Load a task as a run does: what is missing is fetched, and videos are looked for."""
    from eval.tasks import load
    from eval.tasks.requests import quiet

    quiet()
    load(settings, limit)


def _model(pretrained: str, revision: str | None) -> str:
    if pretrained in EMBEDDED:
        return "ships with this package"
    repository = HUB_ALIASES.get(pretrained, pretrained)
    if repository == pretrained and Path(pretrained).expanduser().is_dir():
        return f"the folder {pretrained}"
    return f"{repository}, {_size(repository, 'model', revision, CHECKPOINT_FILES)}"


def _task(settings: TaskSettings) -> str:
    task = TASKS[settings.name]
    if isinstance(task, Generated):
        return "generated on this machine"
    if task.folder == "own:video_qa":
        from eval.tasks.video_qa.data import default_folder

        folder = Path(settings.options["data"] or default_folder(task.name)).expanduser()
        return f"NOT on the hub: the authors' {folder.name} with its videos, by hand into {folder}"
    sources = list(dict.fromkeys(_sources(task)))
    texts = [f"{repository}, {_size(repository, 'dataset')}" for repository, _ in sources]
    videos = [f"; videos go to {hf_home() / folder}" for _, folder in sources if folder]
    return " and ".join(dict.fromkeys(texts)) + "".join(dict.fromkeys(videos))


def _sources(task) -> Iterator[tuple[str, str | None]]:
    """Repository, and the folder of its videos, of each of a task's parts."""
    from lmms_eval.utils import load_yaml_config

    from eval.tasks.loading import task_manager

    index = task_manager(task.folder).task_index
    for name in task.lmms:
        config = load_yaml_config(index[name]["yaml_path"], mode="simple")
        kwargs = config.get("dataset_kwargs") or {}
        yield config["dataset_path"], kwargs.get("cache_dir") if kwargs.get("video") else None


@cache
def _size(repository: str, kind: str, revision: str | None = None, patterns: Iterable[str] = ("*",)) -> str:
    """As the hub says."""
    from huggingface_hub import HfApi

    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return "size unknown (HF_HUB_OFFLINE=1)"
    try:
        about = HfApi().repo_info(repository, repo_type=kind, revision=revision, files_metadata=True, timeout=20)
    except Exception as error:  # whatever a network does
        return f"size unknown ({type(error).__name__})"
    sizes = [f.size for f in about.siblings if any(fnmatch.fnmatch(f.rfilename, p) for p in patterns)]
    return "size unknown" if None in sizes else f"{sum(sizes) / 1e9:.1f} GB"


if __name__ == "__main__":
    sys.exit(main())
