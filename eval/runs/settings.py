"""Check a configuration and make a run of it: normalised settings, their hash, and the run folder's name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

import sparsevlm
from eval.errors import ON_ERROR, UserError, one_line, unknown
from eval.processes import resolve_device
from eval.runs.digests import asked, forget
from eval.runs.model_settings import ModelSettings
from eval.tasks import (
    TASKS,
    TaskSettings,
    controls,  # noqa: F401  - registers them
    task_settings,
)
from sparsevlm.budget import check_budget
from sparsevlm.methods.base import Method, checked
from sparsevlm.models.checkpoint import find_checkpoint, read_config
from sparsevlm.models.loading import DTYPES
from sparsevlm.models.processor import check_options, n_visual_tokens
from sparsevlm.runtime.families import RECORDS

_TOP = (
    "model", "method", "budget", "task", "limit", "max_new_tokens",
    "batch_size", "on_error", "feature_mb", "results_dir",
)  # fmt: skip
_TYPICAL = 1280  # visual tokens with which settings are tried where their number depends on the picture
_WHOLE_FILE_BYTES = 64 << 20  # larger files are fingerprinted by samples
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


@dataclass(frozen=True)
class RunSettings:
    """One evaluation run with checked settings.

    Attributes:
        method: built, with its budget.
        budget: as in the folder's name: an int, a share, "full", or "explicit" where the method's options say how many
            tokens stay.
        limit: number of questions; None = all of the task.
        max_new_tokens: None = as the task says.
        on_error: "stop" at a question that cannot be answered, or "record" it as excluded and continue.
        feature_mb: main memory for visual features.
        checkpoint: folder of the model's files.
        n_visual: visual tokens of one picture, or of one video where the task is about videos; None = they depend on
            the picture.
    """

    model: ModelSettings
    task: TaskSettings
    method: Method
    budget: int | float | str
    limit: int | None
    max_new_tokens: int | None
    batch_size: int
    on_error: str
    feature_mb: int
    results_dir: Path
    checkpoint: Path
    n_visual: int | None

    @property
    def axes(self) -> int:
        """Position ids of a token; see `sparsevlm.runtime.families.Record`."""
        return RECORDS[read_config(self.checkpoint).model_type].axes

    @property
    def options(self) -> dict:
        """All options of the method, without the budget."""
        return {k: v for k, v in asdict(self.method).items() if k != "budget"}

    def identity(self, judged: bool = True) -> dict:
        """Return all settings that change the run's numbers, and no others (batch size, device and folder do not).

        It includes digests of the rendered requests and of the processing, for which the task is loaded; see
        `eval.runs.digests`.

        Args:
            judged: False = leave out the language model that judges: all settings that change the answers.

        Raises:
            UserError: the task or the processor cannot be loaded.
        """
        task = TASKS[self.task.name].identity(self.task, self.limit)
        return {
            "task": task if judged else {k: v for k, v in task.items() if not k.startswith("judge")},
            "model": {
                "name": self.model.name,
                "weights": fingerprint(self.checkpoint),
                **{k: getattr(self.model, k) for k in ("dtype", "attn_implementation", "prompt", "image_aspect_ratio")},
                **{k: v for k in ("min_pixels", "max_pixels") if (v := getattr(self.model, k)) is not None},
            },
            "method": {"name": self.method.name, **self.options},
            "budget": self.budget,
            "generation": {"max_new_tokens": self.max_new_tokens},
            "asked": asked(self),
        }

    def config_hash(self) -> str:
        """Return 8 hexadecimal digits that identify :meth:`identity`."""
        return _short_hash(self.identity())

    def answers_hash(self) -> str:
        """Return the same without the judge: equal for runs with the same answers."""
        return _short_hash(self.identity(judged=False))

    def run_id(self, judged: bool = True) -> str:
        """Return the run folder's name; with `judged=False`, that of the same run without a judge."""
        digest = self.config_hash() if judged else self.answers_hash()
        parts = (self.task.name, self.model.name, self.method.name, self.budget, digest)
        return "__".join(map(str, parts))

    @property
    def batch_key(self) -> tuple:
        """A key that is equal for runs that can be batched together: they differ only in the method."""
        same = (self.model, self.task, self.limit, self.max_new_tokens, self.batch_size, self.on_error, self.feature_mb)
        return (repr(same), self.results_dir)

    @property
    def changed(self) -> list[tuple[str, object]]:
        """The method's options that differ from their defaults."""
        defaults = {f.name: f.default for f in fields(self.method)}
        return [(k, v) for k, v in self.options.items() if v != defaults[k]]

    @property
    def label(self) -> str:
        """A label for messages: the method, its options that differ from their defaults, and the budget."""
        return " ".join([self.method.name, *(f"{k}={v}" for k, v in self.changed), f"budget={self.budget}"])


def _short_hash(content: dict) -> str:
    text = json.dumps(content, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def make_run(config: Mapping) -> RunSettings:
    """Check a composed configuration and make the run.

    Args:
        config: plain dict with the keys of configs/config.yaml.

    Raises:
        UserError: an unknown key or name, a value out of range, or a checkpoint that is missing or damaged.
    """
    forget()
    _known(config, _TOP, "")
    _complete(config)
    model, task = _group(ModelSettings, config, "model"), task_settings(config["task"])
    for key in ("limit", "max_new_tokens", "batch_size"):
        if config[key] is not None or key == "batch_size":
            _at_least(config[key], 1, key)
    _at_least(config["feature_mb"], 0, "feature_mb")
    if config["on_error"] not in ON_ERROR:
        raise UserError(unknown("on_error", config["on_error"], ON_ERROR))
    try:
        check_options(model.prompt, model.image_aspect_ratio)
        model = _resolved(model)
        checkpoint = find_checkpoint(model.pretrained, model.revision)
        shapes = read_config(checkpoint)
        n_visual = _n_visual(shapes, TASKS[task.name].video)
        if n_visual is None:
            model = replace(model, image_aspect_ratio="native" if model.image_aspect_ratio == "crop" else "pad")
        method, budget = _method(config["method"], config["budget"], n_visual, shapes.get_text_config())
    except (ValueError, OSError) as error:  # OSError: FileNotFoundError, PermissionError, ConnectionError
        raise UserError(one_line(error)) from error
    same = ("limit", "max_new_tokens", "batch_size", "on_error", "feature_mb")
    return RunSettings(
        model=model,
        task=task,
        method=method,
        budget=budget,
        results_dir=Path(config["results_dir"]).expanduser(),
        checkpoint=checkpoint,
        n_visual=n_visual,
        **{key: config[key] for key in same},
    )


def _n_visual(shapes, video: bool) -> int | None:
    """Count the visual tokens of one picture or video; None = they depend on the picture.

    Raises:
        ValueError: the model takes no such input.
    """
    if RECORDS[shapes.model_type].grid:
        return n_visual_tokens(shapes, "video" if video else "image")
    if video:
        raise ValueError(f"videos are not prepared for a model of type {shapes.model_type!r} here. Use another task")
    return None


def _method(config: Mapping, budget, n_visual: int | None, text_config) -> tuple[Method, int | float | str]:
    """Build the method; return it with the budget as in the run folder's name.

    Raises:
        ValueError: options that the method refuses, or a pruning method without budget or options that set one.
    """
    options = {k: v for k, v in config.items() if k != "name" and v is not None}
    name = config["name"]
    budget = check_budget(budget)
    if isinstance(budget, int) and n_visual is not None and budget > n_visual:
        raise ValueError(
            f"budget {budget} is above the {n_visual} visual tokens of this input. Use at most {n_visual}, or 'full'"
        )
    if name == "none":
        return sparsevlm.build(name, budget="full", **options), "full"
    method = sparsevlm.build(name, budget=budget, **options)
    schedule = method.plan(
        n_visual or _TYPICAL, text_config.num_hidden_layers
    )  # raises for layers that this model lacks
    if budget is None and not schedule.layers and not method.removes:
        raise ValueError(f"method {name} drops nothing without a budget. Use for example budget=192")
    return method, "explicit" if budget is None else budget


def _resolved(model: ModelSettings) -> ModelSettings:
    """Fill in the device, and the dtype that follows from it.

    Raises:
        ValueError: a value of another type, a name that cannot be part of a folder's, or an unknown device or dtype.
    """
    for field in fields(model):
        checked(f"model.{field.name}", getattr(model, field.name), str(field.type))
    if not model.name or set(model.name) & set("/\\\0"):
        raise ValueError(f"model.name={model.name!r} cannot be part of a folder's name. Use letters, digits, '_', '-'")
    device = resolve_device(model.device)
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}. Use auto, cpu, cuda or cuda:N") from error
    dtype = model.dtype or ("float32" if kind == "cpu" else "auto")
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"unknown dtype {dtype!r}; known: auto, {', '.join(DTYPES)}")
    return ModelSettings(**{**asdict(model), "device": device, "dtype": dtype})


def fingerprint(checkpoint: Path) -> str:
    """Return 16 hexadecimal digits that change with the configuration, tokenizer or weights of a checkpoint folder.

    Files above 64 MiB are represented by their size and 64 samples, the header among them, to be fast for 14 GB.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in checkpoint.iterdir() if p.suffix in (".json", ".jinja", ".safetensors", ".model")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            if size <= _WHOLE_FILE_BYTES:
                digest.update(file.read())
                continue
            for i in range(_SAMPLES):
                file.seek(i * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _group(cls, config: Mapping, name: str):
    keys = [f.name for f in fields(cls)]
    _known(config[name], keys, f"{name}.")
    missing = [k for k in keys if k not in config[name]]
    if missing:
        raise UserError(
            f"the config group {name} lacks {', '.join(missing)}. "
            "Set them in its file; `defaults: [_base]` sets the others"
        )
    return cls(**config[name])


def _complete(config: Mapping) -> None:
    """See that no key is missing and each group has its name.

    Raises:
        UserError: one is missing, or of another type.
    """
    if missing := [key for key in _TOP if key not in config]:
        raise UserError(f"the configuration lacks {', '.join(missing)}. Use null for the default, not ~{missing[0]}")
    for group in ("model", "method", "task"):
        given = config[group]
        if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
            raise UserError(f"{group} has no name: {given!r}. Use {group}=<name> with a name of configs/{group}")
    folder = config["results_dir"]
    if not isinstance(folder, str) or not folder or "\0" in folder:
        raise UserError(f"results_dir={folder!r} is no folder. Use the path of one that you own")


def _known(config: Mapping, keys: Iterable[str], prefix: str) -> None:
    for key in config:
        if key not in keys:
            raise UserError(unknown("config key", prefix + key, [prefix + k for k in keys]))


def _at_least(value, least: int, key: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{key}={value} must be an integer of {least} or more")
