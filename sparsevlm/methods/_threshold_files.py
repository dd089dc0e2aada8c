"""Where ATP-LLaVA's modules come from: files of this project, or a draw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from sparsevlm.core.thresholds import Thresholds
from sparsevlm.methods._modules import ModulesFile, read_modules, shipped
from sparsevlm.runtime.families import Family

METHOD = "atp_llava"
UNTRAINED, FIXED = "untrained", "fixed"
WIDTH = 64  # of modules made here


@dataclass(frozen=True)
class Stages:
    """Modules for one model.

    Attributes:
        layers: 0-based layers after which tokens go, one module each.
        modules: of each layer, float32.
        fixed: without a spatial threshold.
    """

    layers: tuple[int, ...]
    modules: nn.ModuleList
    fixed: bool = False

    def of(self, layer: int, device: torch.device) -> nn.Module:
        """Return the module of a layer."""
        return self.modules[self.layers.index(layer)].to(device)


def start(layers: tuple[int, ...], seed: int, width: int = WIDTH) -> nn.ModuleList:
    """Draw modules with random weights; equal seeds give equal ones.

    Linear layers are N(0, 1 / inputs), biases N(0, 1): the thresholds of stages differ.
    """
    generator = torch.Generator().manual_seed(seed)
    modules = nn.ModuleList(Thresholds(width) for _ in layers)
    with torch.no_grad():
        for linear in (m for m in modules.modules() if isinstance(m, nn.Linear)):
            linear.weight.normal_(0, linear.in_features**-0.5, generator=generator)
            linear.bias.normal_(0, 1, generator=generator)
    return modules


def find(
    path: str | None, family: Family, layers: tuple[int, ...], asked: tuple[int, ...] | None, variant: str, seed: int
) -> Stages:
    """Return the modules for a model.

    Args:
        path: a file, "untrained", "fixed", or None = the file shipped for this model.
        layers: where made modules stand.
        asked: layers that the caller wants; None = those of a file.
        variant: of the scores.
        seed: of untrained modules.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: nothing is shipped for this model; a damaged file; one for another model, variant or other layers.
    """
    if path in (UNTRAINED, FIXED):
        modules = start(layers, seed)
        if path == FIXED:
            for weight in modules.parameters():
                nn.init.zeros_(weight)
        return Stages(layers, modules.requires_grad_(False), path == FIXED)
    file = shipped(METHOD, "modules", family) if path is None else read_modules(path, METHOD)
    if path is not None:
        file.check_model(family)
    found = _of_file(file, variant)
    if asked is not None and asked != found.layers:
        raise ValueError(f"{file.path} has modules for layers {found.layers}, not {asked}. Leave layers out")
    return found


def _of_file(file: ModulesFile, variant: str) -> Stages:
    stored = file.facts.get("variant")
    if stored != variant:
        raise ValueError(f"{file.path} was trained with variant={stored!r}, not {variant!r}. Use the one it has")
    try:
        layers = tuple(int(layer) for layer in file.facts["layers"].split(","))
        width = file.tensors["0.score_projection.weight"].shape[0]
        modules = nn.ModuleList(Thresholds(width) for _ in layers)
        modules.load_state_dict({k: v.float() for k, v in file.tensors.items()})
    except (KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file.path} does not hold ATP-LLaVA's modules ({reason}). Use a whole file") from None
    bad = [name for name, tensor in file.tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise ValueError(f"{file.path} has weights that are infinite or no numbers ({bad[0]}). Use another file")
    return Stages(layers, modules.requires_grad_(False))
