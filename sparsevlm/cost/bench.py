"""Latency, overhead and memory of pruning methods on a model of any shape: one command, resumable.

    python -m sparsevlm.cost.bench --shape llama-1024x16 --methods sparsevlm,fastv --budgets 192,128,64 --batch 1,4 \\
        --repeats 20 --out results/latency
    python -m sparsevlm.cost.bench --shape llava-1.5-7b video-llava-7b --device cuda --dtype bfloat16 \\
        --attention auto --methods all --budgets 192,128,64 --batch 1,4,16 --out results/gpu

Needs torch, transformers and this package only. Shapes other than "mini" have random weights: latency does not depend
on them, and no checkpoint is read. Every setting is timed beside the unpruned model and its floor (`harness.py`); each
round is kept in `<out>/ledger.jsonl`, from which the same command goes on after an interruption. What does not fit into
memory is noted, and the rest goes on. At the end `report.py` writes latency.json, .md and .csv beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import sparsevlm  # isort: skip  - before transformers: it makes torchvision importable beside a CPU-only torch

import torch
from tqdm import tqdm
from transformers.utils import is_flash_attn_2_available

from sparsevlm.cost import memory, networks, report
from sparsevlm.cost.harness import UNPRUNED, Harness
from sparsevlm.cost.ledger import Group, Ledger, Record
from sparsevlm.cost.machine import machine
from sparsevlm.cost.shapes import load_config, make_prompt
from sparsevlm.methods import build, method_class
from sparsevlm.models.loading import DTYPES
from sparsevlm.runtime.families import locate
from sparsevlm.settings import Setting, parse_setting

_TEXT_TOKENS = 60
_BAR = "{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"


@dataclass(frozen=True)
class Work:
    """A group and the settings to time in it, the unpruned model not among them."""

    group: Group
    settings: list[Setting]


def main(argv: list[str] | None = None) -> None:
    """Measure and report. Exit status 2 and one line for what cannot be done, 130 after an interruption."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        torch.set_num_threads(args.threads)
        work = plan(args)
        with Ledger(args.out) as ledger:
            run(work, ledger, args.repeats, args.warmup)
            for path in report.write(ledger, args.out):
                print(path)
    except KeyboardInterrupt:
        print(
            f"\ninterrupted: {args.out} keeps all finished rounds, the same command goes on from there", file=sys.stderr
        )
        sys.exit(130)
    except (ValueError, MemoryError, ImportError, OSError) as error:
        parser.exit(2, f"bench: {error}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--shape", nargs="+", default=["llama-1024x16"],
        help="mini, llava-1.5-7b, llava-1.5-13b, video-llava-7b, or llama-<hidden>x<layers>[x<heads>]")  # fmt: skip
    add("--prompt", help="text+visual+text tokens, as 35+576+25 (default: 60 text tokens)")
    add("--methods", default="", help="comma-separated, or all: every method at every budget")
    add("--budgets", default="192,128,64", help="comma-separated mean visual tokens per layer")
    add("--setting", action="append", default=[], metavar="METHOD:BUDGET[:OPTION=VALUE...]",
        help="a further setting, as sparsevlm:64:early_drop=False; budget may be empty; repeatable")  # fmt: skip
    add("--batch", default="1", help="comma-separated batch sizes")
    add("--dtype", choices=sorted(DTYPES), help="default: float32 on a CPU, bfloat16 on a GPU")
    add("--attention", default="sdpa", help="comma-separated; auto = sdpa, and flash_attention_2 if it is installed")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads of torch")
    add("--repeats", type=int, default=20, help="timed rounds")
    add("--warmup", type=int, default=3, help="rounds before them, also after an interruption")
    add("--decode-tokens", type=int, default=8, help="decode steps per round")
    add("--out", type=Path, required=True, help="folder of ledger and report")
    return parser


def plan(args: argparse.Namespace) -> list[Work]:
    """Everything that is to be timed, checked before any of it is.

    Raises:
        ValueError: an unknown or impossible shape, prompt, method, option or number.
        ImportError: FlashAttention is asked for and not installed.
    """
    if args.repeats < 1 or args.warmup < 0 or args.decode_tokens < 1 or args.threads < 1:
        raise ValueError("--repeats, --decode-tokens and --threads must be at least 1, --warmup at least 0")
    device = torch.device(args.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"no device {args.device!r}: torch sees {torch.cuda.device_count()} GPUs; use --device cpu")
    dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    work = []
    for shape, attention, batch in product(args.shape, _attention(args.attention, device), _numbers(args.batch)):
        layout = _layout(shape, args.prompt)
        group = Group(
            shape, "+".join(map(str, layout)), batch, dtype, attention, str(device), args.threads, args.decode_tokens
        )
        work.append(Work(group, _settings(args, shape, layout[1])))
    return work


def _layout(shape: str, prompt: str | None) -> tuple[int, int, int]:
    numbers = _numbers(prompt, "+") if prompt else None
    if numbers is not None and len(numbers) != 3:
        raise ValueError(f"--prompt {prompt}: write text+visual+text tokens, as 35+576+25")
    before, visual, after = numbers or (None, None, None)
    text = _TEXT_TOKENS if numbers is None else before + after
    made = make_prompt(load_config(shape), text, device="meta", before=before, visual_tokens=visual)
    return tuple(_numbers(made.layout, "+"))


def _settings(args: argparse.Namespace, shape: str, visual: int) -> list[Setting]:
    """What was asked for, without what "all" includes and this model cannot do."""
    every = args.methods == "all"
    names = [n for n in (sparsevlm.methods() if every else args.methods.split(",")) if n and n != "none"]
    found: list[Setting] = []
    for name in names:
        adaptive = method_class(name).adaptive
        for budget in [None] if adaptive else _numbers(args.budgets):
            try:
                _check((name, budget, {}), shape, visual)
                found.append((name, budget, {}))
            except ValueError as error:
                if not every:
                    raise
                print(f"left out for {shape}: {name} {budget or ''}: {error}", file=sys.stderr)
    for text in args.setting:
        setting = parse_setting(text)
        _check(setting, shape, visual)
        found.append(setting)
    return found


def _check(setting: Setting, shape: str, visual: int) -> None:
    """See that a method can work on a model and reach its budget, on a model without weights."""
    name, budget, options = setting
    method = build(name, budget=budget, **options)
    family = locate(networks.skeleton(shape))
    method.check(family)
    for handle in method.hooks(method.attach(family)):
        handle.remove()
    method.plan(visual, family.n_layers)


def _numbers(text: str, separator: str = ",") -> list[int]:
    try:
        numbers = [int(part) for part in text.split(separator)]
    except ValueError:
        raise ValueError(f"{text!r}: whole numbers separated by {separator!r} are needed") from None
    if min(numbers) < 0:
        raise ValueError(f"{text!r}: numbers below 0")
    return numbers


def _attention(text: str, device: torch.device) -> list[str]:
    if text == "auto":
        return ["sdpa", *(["flash_attention_2"] if device.type == "cuda" and is_flash_attn_2_available() else [])]
    names = text.split(",")
    if "flash_attention_2" in names and not is_flash_attn_2_available():
        raise ImportError("--attention flash_attention_2: FlashAttention is not installed; use sdpa, or auto")
    return names


def run(work: list[Work], ledger: Ledger, repeats: int, warmup: int) -> None:
    """Time all settings that lack rounds, group by group, and note every round in the ledger.

    Raises:
        MemoryError: a shape that the device does not hold; nothing has been allocated or measured then.
        ValueError, OSError: the ledger is another machine's or cannot be written.
    """
    todo = []
    for item in work:
        records = [ledger.record(item.group, *setting) for setting in [UNPRUNED, *item.settings]]
        if any(_lacks(record, number) for record in records for number in range(repeats)):
            todo.append((item, records))
    if not todo:
        return
    _check_memory([item.group for item, _ in todo])
    ledger.open(machine(torch.device(work[0].group.device)))
    weights = [networks.size(item.group.shape) * item.group.batch_size * len(records) for item, records in todo]
    net = made_for = None
    with tqdm(total=sum(weights) * (warmup + repeats), bar_format=_BAR, mininterval=1, dynamic_ncols=True) as bar:
        for (item, records), weight in zip(todo, weights, strict=True):
            group = item.group
            if made_for != (group.shape, group.attention):
                net = None  # the old one goes before the new one is made
                device, dtype = torch.device(group.device), DTYPES[group.dtype]
                net = networks.network(group.shape, dtype, device, group.attention)
                made_for = group.shape, group.attention
            bar.set_description(f"{group.shape} batch {group.batch_size}")
            _run_group(net, item, records, ledger, repeats, warmup, lambda weight=weight: bar.update(weight))


def _lacks(record: Record, number: int) -> bool:
    return record.failed is None and number not in record.samples


def _check_memory(groups: list[Group]) -> None:
    for group in groups:
        if group.device != "cpu" and group.batch_size != min(g.batch_size for g in groups):
            continue  # a GPU says by itself that a batch is too large, and the rest goes on
        needed = networks.needed(
            group.shape, _numbers(group.prompt, "+"), group.batch_size, DTYPES[group.dtype], group.decode_tokens
        )
        what = f"{group.shape} at batch {group.batch_size} in {group.dtype}"
        memory.check_fits(what, needed, torch.device(group.device))


def _run_group(
    net, work: Work, records: list[Record], ledger: Ledger, repeats: int, warmup: int, progress: Callable[[], None]
) -> None:
    group = work.group
    before, visual, after = _numbers(group.prompt, "+")
    prompt = make_prompt(
        net.config, before + after, group.batch_size, net.device, net.dtype, before=before, visual_tokens=visual
    )
    harness = Harness(net, work.settings, prompt, group.decode_tokens)
    for number in range(-warmup, repeats):
        numbers = range(repeats) if number < 0 else [number]
        which = [i for i, record in enumerate(records) if any(_lacks(record, n) for n in numbers)]
        if which:
            samples, failed = harness.round(number, which)
            for i, record in enumerate(records):
                if i in failed and record.failed is None:
                    ledger.note_failure(record, failed[i])
                elif i in samples and record.facts is None:
                    ledger.note_facts(record, harness.inspect(i))
            if number >= 0:
                ledger.note_samples(number, [(records[i], samples[i]) for i in which if i in samples])
        progress()


if __name__ == "__main__":
    main()
