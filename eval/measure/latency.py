"""Time prefill and decode of several settings in one process and keep the result as a run folder.

    python -m eval.measure.latency --results results                    # what was run on `mini`, at its prompt length
    python -m eval.measure.latency none:full sparsevlm:192 sparsevlm:64:raters=all --text-tokens 60 --batch-size 4

Writes `<results>/runs/latency__<model>__<config hash>/`. The hash covers the machine, so each machine has its own
folder; the same command again on the same machine finds it and measures nothing.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import sparsevlm  # isort: skip  - before transformers: it makes torchvision importable beside a CPU-only torch

import torch
from tqdm import tqdm

from eval.errors import UserError, one_line, report
from eval.measure.once import Measured, command_of, measure_once, print_result, said
from eval.runs import environment
from eval.runs.reader import LATENCY, ROWS_ONLY, Run, read_runs, setting_key
from eval.runs.settings import RunSettings, fingerprint
from eval.runs.writer import RunFolder
from sparsevlm.cost.latency import UNPRUNED, measure
from sparsevlm.models.checkpoint import find_checkpoint
from sparsevlm.settings import Setting, parse_setting


def main(argv: list[str] | None = None) -> None:
    """Measure and write; one line on stderr and exit status 2 for what cannot be."""
    args = _parser().parse_args(argv)
    print_result("latency", lambda: _as_asked(args, command_of("latency", argv)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "settings",
        nargs="*",
        help="method:budget[:option=value...]; default: those that runs of the model were made at",
    )
    parser.add_argument("--model", default="mini", help="as in the runs' names, or any name for sparsevlm.load")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder that holds runs/")
    parser.add_argument("--text-tokens", type=int, help="non-visual tokens (default: as in the runs of the model)")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=30, help="timed rounds")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before them")
    parser.add_argument("--decode-tokens", type=int, default=8, help="decode steps per round")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="float32, float16, bfloat16, auto (default: float32 on a CPU, else auto)")
    return parser


def _as_asked(args: argparse.Namespace, command: str) -> str:
    """Measure what a command line asks for; settings and prompt length are by default those of the model's runs."""
    runs = [r for r in _existing(args.results) if r.model == args.model and r.task not in ROWS_ONLY]
    settings = [_checked(text) for text in args.settings] or settings_of(runs)
    text_tokens = args.text_tokens or text_tokens_of(runs)
    if not settings or not text_tokens:
        raise UserError(
            f"no runs of the model {args.model} in {args.results}/runs to take settings and prompt length from: give "
            "settings such as none:full sparsevlm:192, and --text-tokens"
        )
    pretrained = runs[0].config["model"]["pretrained"] if runs else args.model
    keys = ("batch_size", "repeats", "warmup", "decode_tokens", "device", "dtype")
    how = {key: getattr(args, key) for key in keys}
    return time_settings(args.results, args.model, pretrained, settings, text_tokens, command, **how)


def time_settings(
    results: Path,
    model: str,
    pretrained: str,
    settings: Sequence[Setting],
    text_tokens: int,
    command: str,
    batch_size: int = 1,
    repeats: int = 30,
    warmup: int = 3,
    decode_tokens: int = 8,
    device: str = "cpu",
    dtype: str | None = None,
) -> str:
    """Time settings of a model, unless that was done on this machine, and keep the rows as a run folder.

    Args:
        results: folder that holds runs/.
        model: its name in the runs.
        pretrained: what `sparsevlm.load` takes.
        settings: (method, budget, options) each; the unpruned model is put in front if it is not among them.
        text_tokens: all tokens of the prompt that are not visual.
        command: how the measurement was started, for env.json.
        batch_size, repeats, warmup, decode_tokens: see `sparsevlm.cost.latency.measure`.
        device, dtype: see `sparsevlm.load`.

    Returns:
        Where the run folder is.

    Raises:
        UserError, ValueError, OSError: settings, model or folders that cannot be used.
    """
    if not any(method == "none" for method, _, _ in settings):
        settings = [UNPRUNED, *settings]
    config = {
        "model": {"name": model, "pretrained": pretrained, "weights": fingerprint(find_checkpoint(pretrained))},
        "settings": [_full(setting) for setting in settings],
        "text_tokens": text_tokens,
        "batch_size": batch_size,
        "repeats": repeats,
        "warmup": warmup,
        "decode_tokens": decode_tokens,
        "device": device,
        "dtype": dtype,
    }

    def measured() -> Measured:
        net, _ = sparsevlm.load(pretrained, device=device, dtype=dtype)
        with tqdm(desc="rounds", total=warmup + repeats, mininterval=1) as bar:
            rows = measure(
                net, settings, text_tokens, batch_size, repeats, warmup, decode_tokens,
                progress=lambda done, total: bar.update(),
            )  # fmt: skip
        samples = take_rounds(rows, repeats)
        return Measured(rows, samples, repeats, {"dtype": str(net.dtype).removeprefix("torch.")})

    return said(
        *measure_once(results, LATENCY, f"{LATENCY}__{model}", config, command, measured, environment.hardware())
    )


def time_runs(runs: Sequence[RunSettings], repeats: int, warmup: int, command: str) -> int:
    """Measure the latency of the settings of all runs, at their median prompt length.

    Args:
        runs: finished, of one model.
        repeats, warmup: timed rounds, and those before them.
        command: how the runs were started, for env.json.

    Returns:
        The exit status; 0 also if it had been measured on this machine before.
    """
    first = runs[0].model
    lengths = [RunFolder(run.results_dir, run.run_id()).metrics()["cost"]["text_tokens"] for run in runs]
    settings = [(r.method.name, None if r.budget == "explicit" else r.budget, dict(r.changed)) for r in runs]
    try:
        found = time_settings(
            runs[0].results_dir, first.name, first.pretrained, settings, statistics.median_low(lengths), command,
            repeats=repeats, warmup=warmup, device=first.device, dtype=first.dtype,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        return report(UserError(f"latency: {error}"))
    except UserError as error:
        return report(error, "latency: ")
    print(found)
    return 0


def take_rounds(rows: Sequence[dict], rounds: int) -> list[dict]:
    """Take the single rounds out of the rows of `sparsevlm.cost.latency.measure`: one dict per setting and round."""
    samples = []
    for row in rows:
        row["budget"] = _budget_name(row["budget"])
        key = setting_key(row["method"], row["options"], row["budget"])
        times = row.pop("rounds")
        samples += [{"round": i, "setting": key, **{k: v[i] for k, v in times.items()}} for i in range(rounds)]
    return samples


def _existing(results: Path) -> list[Run]:
    return read_runs(results) if (results / "runs").is_dir() and any((results / "runs").iterdir()) else []


def _checked(text: str) -> Setting:
    """Parse a setting and see that there is such a method, option and value.

    Raises:
        UserError: there is not.
    """
    try:
        setting = parse_setting(text)
        _full(setting)
    except ValueError as error:
        raise UserError(one_line(error)) from error
    return setting


def settings_of(runs: list[Run]) -> list[Setting]:
    """The settings of accuracy runs, each once, in the order of the folders."""
    found = {}
    for run in runs:
        m = run.metrics
        found[run.setting] = m["method"], None if m["budget"] == "explicit" else m["budget"], m["options"]
    return list(found.values())


def text_tokens_of(runs: list[Run]) -> int | None:
    """The median over runs of the prompt length at which their multiply-adds were counted."""
    lengths = [run.metrics["cost"]["text_tokens"] for run in runs]
    return statistics.median_low(lengths) if lengths else None


def _full(setting: Setting) -> dict:
    """A setting with all options and the budget's name, as in metrics.json."""
    name, budget, options = setting
    chosen = asdict(sparsevlm.build(name, budget=budget, **options))
    return {"method": name, "budget": _budget_name(chosen.pop("budget")), "options": chosen}


def _budget_name(budget: int | str | None) -> int | str:
    return "explicit" if budget is None else budget


if __name__ == "__main__":
    main()
