"""Time prefill and decode of several settings in turns, and keep each measurement as a run folder.

    python -m eval.measure.latency --results results                    # what was run on `mini`, at its prompt length
    python -m eval.measure.latency none:full sparsevlm:192 sparsevlm:64:raters=all --text-tokens 60 --batch-size 4
    python -m eval.measure.latency --shape llama-1024x16 --methods sparsevlm,fastv --budgets 192,128,64 --batch-size 1,4
    python -m eval.measure.latency --shape llava-1.5-7b,video-llava-7b --device cuda --attention auto --methods all

With --shape the weights are random: latency does not depend on them, and no checkpoint is read. Every setting is timed
beside the unpruned model and its floor in the same rounds (`sparsevlm/cost/latency.py`).

Writes `<results>/runs/latency__<model or shape>__<config hash>/`, one per batch size and attention. The hash covers the
machine, so each machine has its own folder; the same command again on the same machine finds it and measures nothing,
and an interrupted one resumes. A setting that does not fit into memory is noted; the others are
timed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import sparsevlm  # isort: skip  - before transformers: it makes torchvision importable beside a CPU-only torch

import torch
from torch import nn
from tqdm import tqdm

from eval.errors import UserError, one_line, report
from eval.measure import shapes
from eval.measure.once import Kept, Measured, folder_of, measure_once, run_command
from eval.runs import environment
from eval.runs.reader import LATENCY, ROWS_ONLY, Run, read_runs, setting_key
from eval.runs.settings import RunSettings, fingerprint
from eval.runs.writer import RunFolder
from sparsevlm.cost.harness import Facts, Sample
from sparsevlm.cost.latency import UNPRUNED, Rounds, measure
from sparsevlm.models.checkpoint import EMBEDDED, find_checkpoint
from sparsevlm.models.loading import DTYPES
from sparsevlm.settings import Setting, parse_integers, parse_setting


def main(argv: list[str] | None = None) -> None:
    """Measure and write; one line on stderr and exit status 2 for what cannot be."""
    run_command("latency", __doc__, _add_arguments, _as_asked, argv)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("settings", nargs="*", metavar="METHOD:BUDGET[:OPTION=VALUE...]",
        help="as sparsevlm:64:raters=all; the budget may be empty. Default: those of the model's runs")  # fmt: skip
    add("--model", default="mini", help="as in the runs' names, or any name for sparsevlm.load")
    add("--shape", help="random weights instead, comma-separated: llava-1.5-7b, llava-1.5-13b, video-llava-7b, "
        "llama-<hidden>x<layers>[x<heads>], or mini")  # fmt: skip
    add("--methods", default="", help="comma-separated, or all: every method at every budget")
    add("--budgets", default="192,128,64", help="comma-separated mean visual tokens per layer, for --methods")
    add("--text-tokens", type=int, help="non-visual tokens (default: as in the runs of the model; with --shape 60)")
    add("--prompt", help="with --shape: text+visual+text tokens, as 35+576+25")
    add("--batch-size", default="1", help="comma-separated")
    add("--attention", default="sdpa", help="with --shape, comma-separated; auto: and flash_attention_2 if installed")
    add("--repeats", type=int, default=30, help="timed rounds")
    add("--warmup", type=int, default=3, help="rounds before them, also when it resumes")
    add("--decode-tokens", type=int, default=8, help="decode steps per round")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=[*sorted(DTYPES), "auto"], help="default: float32 on a CPU; on a GPU auto, or for a shape "
        "bfloat16")  # fmt: skip
    add("--threads", type=int, help="CPU threads of torch")


def _as_asked(args: argparse.Namespace, command: str) -> str:
    """Measure what a command line asks for, and return what to print."""
    if args.repeats < 1 or args.warmup < 0 or args.decode_tokens < 1 or (args.threads or 1) < 1:
        raise UserError("--repeats, --decode-tokens and --threads must be at least 1, --warmup at least 0")
    if args.threads:
        torch.set_num_threads(args.threads)
    settings = [_checked(text) for text in args.settings]
    how = {key: getattr(args, key) for key in ("repeats", "warmup", "decode_tokens")}
    if args.shape:
        return "\n".join(time_shapes(args.results, shapes.plan(args, settings), command, **how))
    if args.prompt or args.attention != "sdpa" or args.methods == "all":
        raise UserError("--prompt, --attention and --methods all need --shape")
    settings += [
        _checked(f"{name}:{budget}")
        for name in filter(None, args.methods.split(","))
        for budget in parse_integers(args.budgets)
    ]
    runs = [r for r in _existing(args.results) if r.model == args.model and r.task not in ROWS_ONLY]
    settings = settings or settings_of(runs)
    text_tokens = args.text_tokens or text_tokens_of(runs)
    if not settings or not text_tokens:
        raise UserError(
            f"no runs of the model {args.model} in {args.results}/runs to take settings and prompt length from. Use "
            "settings such as none:full sparsevlm:192, and --text-tokens"
        )
    pretrained = runs[0].config["model"]["pretrained"] if runs else args.model
    how |= {"device": args.device, "dtype": args.dtype}
    return "\n".join(
        time_settings(args.results, args.model, pretrained, settings, text_tokens, command, batch_size, **how)
        for batch_size in parse_integers(args.batch_size)
    )


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
    how = {"batch_size": batch_size, "repeats": repeats, "warmup": warmup, "decode_tokens": decode_tokens}
    config = {
        "model": {"name": model, "pretrained": pretrained, "weights": fingerprint(find_checkpoint(pretrained))},
        "settings": [_full(setting) for setting in settings],
        "text_tokens": text_tokens,
        **how,
        "device": device,
        "dtype": dtype,
    }
    measured = _measuring(
        lambda: sparsevlm.load(pretrained, device=device, dtype=dtype)[0], settings, text_tokens, model, how
    )
    return measure_once(results, LATENCY, f"{LATENCY}__{model}", config, command, measured, environment.hardware())


def time_shapes(
    results: Path, plans: Sequence[shapes.Plan], command: str, repeats: int, warmup: int, decode_tokens: int
) -> list[str]:
    """Time settings of models with random weights, unless that was done on this machine; return where the folders are.

    Raises:
        MemoryError: a shape that the device does not hold; nothing has been measured then.
        ValueError, OSError: folders that cannot be used.
    """
    work = []
    for plan in plans:
        how = {"batch_size": plan.batch_size, "repeats": repeats, "warmup": warmup, "decode_tokens": decode_tokens}
        about = {k: v for k, v in asdict(plan).items() if k not in ("settings", "layout")}
        model = {"name": plan.shape, "weights": "random"}
        if plan.shape in EMBEDDED:
            model["weights"] = fingerprint(find_checkpoint(plan.shape))
        settings = [UNPRUNED, *plan.settings]
        config = {"model": model, "settings": [_full(s) for s in settings], "prompt": plan.prompt, **about, **how}
        on = environment.hardware()
        name = f"{LATENCY}__{plan.shape}"
        measured = _measuring(plan.network, settings, plan.text_tokens, plan.shape, how, plan.layout[:2])
        work.append((plan, name, config, measured, on, folder_of(results, name, config, on).finished))
    shapes.check_memory([plan for plan, *_, there in work if not there], decode_tokens)
    return [
        measure_once(results, LATENCY, name, config, command, measured, on) for _, name, config, measured, on, _ in work
    ]


def _measuring(
    load: Callable[[], nn.Module],
    settings: Sequence[Setting],
    text_tokens: int,
    title: str,
    how: Mapping[str, int],
    layout: tuple[int, int] | None = None,
) -> Callable[[Kept], Measured]:
    """Return the function that times, for `measure_once`."""

    def measured(kept: Kept) -> Measured:
        net = load()
        with tqdm(desc=title, total=how["warmup"] + how["repeats"], unit="round", mininterval=1) as bar:
            rows = measure(
                net, settings, text_tokens, **how, layout=layout, rounds=KeptRounds(kept),
                progress=lambda done, total: bar.update(),
            )  # fmt: skip
        samples = take_rounds(rows, how["repeats"])
        return Measured(rows, samples, how["repeats"], {"dtype": str(net.dtype).removeprefix("torch.")})

    return measured


class KeptRounds(Rounds):
    """Rounds that an interrupted measurement resumes with."""

    def __init__(self, kept: Kept) -> None:
        super().__init__()
        self._kept = kept
        for (what, *key), value in kept.items():
            if what == "sample":
                number, setting = key
                self.samples.setdefault(number, {})[setting] = Sample(**value)
            elif what == "facts":
                cuts = value["cuts"] and {int(k): v for k, v in value["cuts"].items()}
                self.facts[key[0]] = Facts(**{**value, "cuts": cuts})
            else:
                self.failed[key[0]] = value

    def note(self, number: int, samples: dict[int, Sample], facts: dict[int, Facts], failed: dict[int, str]) -> None:
        super().note(number, samples, facts, failed)
        values = [(["facts", i], asdict(found)) for i, found in facts.items()]
        values += [(["failed", i], reason) for i, reason in failed.items()]
        if number >= 0:
            values += [(["sample", number, i], asdict(sample)) for i, sample in samples.items()]
        self._kept.add(values)


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
        times = row.pop("rounds", None)
        if times is not None:
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
    """Return the settings of accuracy runs, each once, in the order of the folders."""
    found = {}
    for run in runs:
        m = run.metrics
        found[run.setting] = m["method"], None if m["budget"] == "explicit" else m["budget"], m["options"]
    return list(found.values())


def text_tokens_of(runs: list[Run]) -> int | None:
    """Return the median over runs of the prompt length at which their multiply-adds were counted."""
    lengths = [run.metrics["cost"]["text_tokens"] for run in runs]
    return statistics.median_low(lengths) if lengths else None


def _full(setting: Setting) -> dict:
    """Return a setting with all options and the budget's name, as in metrics.json."""
    name, budget, options = setting
    chosen = asdict(sparsevlm.build(name, budget=budget, **options))
    return {"method": name, "budget": _budget_name(chosen.pop("budget")), "options": chosen}


def _budget_name(budget: int | str | None) -> int | str:
    return "explicit" if budget is None else budget


if __name__ == "__main__":
    main()
