"""What `eval.measure.latency --shape` is to time, checked before any of it is: models with random weights."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import sparsevlm  # isort: skip  - before transformers: it makes torchvision importable beside a CPU-only torch

import torch
from torch import nn
from transformers.utils import is_flash_attn_2_available

from sparsevlm.cost import memory, networks
from sparsevlm.cost.shapes import load_config, make_prompt
from sparsevlm.methods import build, method_class
from sparsevlm.models.loading import DTYPES
from sparsevlm.runtime.families import locate
from sparsevlm.settings import Setting, parse_integers

_TEXT_TOKENS = 60


@dataclass(frozen=True)
class Plan:
    """Settings that are timed in the same rounds.

    Attributes:
        shape: of the model, a name of `networks.network`.
        layout: text tokens, visual tokens, text tokens of the prompt.
        batch_size: equal prompts.
        dtype, attention, device: of the model, as on the command line.
        settings: beside the unpruned model.
    """

    shape: str
    layout: tuple[int, int, int]
    batch_size: int
    dtype: str
    attention: str
    device: str
    settings: list[Setting]

    @property
    def prompt(self) -> str:
        return "+".join(map(str, self.layout))

    @property
    def text_tokens(self) -> int:
        return self.layout[0] + self.layout[2]

    def network(self) -> nn.Module:
        """Make the model."""
        return networks.network(self.shape, DTYPES[self.dtype], torch.device(self.device), self.attention)


def plan(args: argparse.Namespace, settings: Sequence[Setting]) -> list[Plan]:
    """Return what is to be timed.

    Args:
        args: of the command line: shape, prompt, text_tokens, methods, budgets, batch_size, dtype, attention, device.
        settings: further ones.

    Raises:
        ValueError: an unknown or impossible shape, prompt, method, option or number.
        ImportError: FlashAttention is asked for and not installed.
    """
    device = torch.device(args.device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"no device {args.device!r}: torch sees {torch.cuda.device_count()} GPUs. Use --device cpu")
    dtype = args.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    if dtype == "auto":
        raise ValueError("--dtype auto needs a checkpoint. Use float32, float16 or bfloat16 with --shape")
    found = []
    attentions = _attentions(args.attention, device)
    for shape, attention, batch in product(args.shape.split(","), attentions, parse_integers(args.batch_size)):
        layout = _layout(shape, args.prompt, args.text_tokens)
        if batch < 1:
            raise ValueError(f"batch_size={batch} must be at least 1")
        chosen = [*_every(args.methods, args.budgets, shape, layout[1]), *settings]
        for setting in settings:
            _check(setting, shape, layout[1])
        others = [setting for setting in chosen if setting[0] != "none"]
        found.append(Plan(shape, layout, batch, dtype, attention, str(device), others))
    return found


def _layout(shape: str, prompt: str | None, text_tokens: int | None) -> tuple[int, int, int]:
    numbers = parse_integers(prompt, "+") if prompt else None
    if numbers is not None and len(numbers) != 3:
        raise ValueError(f"--prompt {prompt} must be text+visual+text tokens. Use for example 35+576+25")
    before, visual, after = numbers or (None, None, None)
    text = (text_tokens or _TEXT_TOKENS) if numbers is None else before + after
    made = make_prompt(load_config(shape), text, device="meta", before=before, visual_tokens=visual)
    return tuple(parse_integers(made.layout, "+"))


def _every(methods: str, budgets: str, shape: str, visual: int) -> list[Setting]:
    """Return the methods at the budgets, without what "all" includes and this model cannot do."""
    every = methods == "all"
    names = [n for n in (sparsevlm.methods() if every else methods.split(",")) if n and n != "none"]
    found: list[Setting] = []
    for name in names:
        for budget in [None] if method_class(name).adaptive else parse_integers(budgets):
            try:
                _check((name, budget, {}), shape, visual)
                found.append((name, budget, {}))
            except ValueError as error:
                if not every:
                    raise
                print(f"skipping {name} {budget or ''} for {shape}: {error}", file=sys.stderr)
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


def _attentions(text: str, device: torch.device) -> list[str]:
    if text == "auto":
        return ["sdpa", *(["flash_attention_2"] if device.type == "cuda" and is_flash_attn_2_available() else [])]
    names = text.split(",")
    if "flash_attention_2" in names and not is_flash_attn_2_available():
        raise ImportError("--attention flash_attention_2: FlashAttention is not installed. Use sdpa, or auto")
    return names


def check_memory(plans: Sequence[Plan], decode_tokens: int) -> None:
    """See that what is to be timed fits into memory.

    Raises:
        MemoryError: it does not. On a GPU only the smallest batches are checked: a batch that is too large
            fails there alone, and the others are timed.
    """
    for one in plans:
        if one.device != "cpu" and one.batch_size != min(p.batch_size for p in plans):
            continue
        dtype = DTYPES[one.dtype]
        needed = networks.needed(one.shape, one.layout, one.batch_size, dtype, decode_tokens)
        what = f"{one.shape} at batch {one.batch_size} in {one.dtype}"
        memory.check_fits(what, needed, torch.device(one.device))
