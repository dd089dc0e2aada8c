"""Trains a guide for the method `sgl`: ``python -m sparsevlm.mini.training.guide --out DIR --layers 2 --minutes 12``.

A guide is the embedded model with a few layers. Without further options it begins with the first layers of the shipped
`mini` and keeps that model's tower, projector and word embeddings as they are, so that both share them
(``sgl`` with ``shared=True``); only the layers, the last norm and the output head are trained. With ``--from-nothing``
all of it starts from nothing and is trained. Writes what ``python -m sparsevlm.mini.training`` writes.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from sparsevlm.mini import weights_dir
from sparsevlm.mini.model import LAYERS, build_model
from sparsevlm.mini.training.__main__ import _device
from sparsevlm.mini.training.hub import export, load_weights
from sparsevlm.mini.training.plan import CONTINUATION, PLAN, Phase, Settings
from sparsevlm.mini.training.run import TrainingRun


@dataclass(frozen=True)
class GuideSettings(Settings):
    """Settings of a guide's training.

    Attributes:
        layers: of its language model.
        from_nothing: train all of it, from starting weights.

    Raises:
        ValueError: as `Settings`; `layers` outside 1 ... 12.
    """

    layers: int = 2
    from_nothing: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.layers <= LAYERS:
            raise ValueError(f"a guide has 1 to {LAYERS} layers, got {self.layers}")


class GuideRun(TrainingRun):
    """As `TrainingRun`; `initial` is the model whose first layers the guide begins with, None from nothing."""

    settings: GuideSettings

    def make_plan(self, initial: str | Path | None) -> tuple[Phase, ...]:
        return PLAN if initial is None else CONTINUATION

    def make_model(self, initial: str | Path | None) -> nn.Module:
        model = build_model(self.settings.seed, self.settings.layers)
        if initial is not None:
            state = load_weights(initial)
            model.load_state_dict({name: state[name] for name in model.state_dict()})
            for shared in (model.model.vision_tower, model.model.multi_modal_projector, model.get_input_embeddings()):
                shared.requires_grad_(False)
        return model


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sparsevlm.mini.training.guide", description=__doc__.split(":")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--layers", type=int, default=2, help="of the guide's language model (default: 2)")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="length of the training; 12 were used for the shipped guide")
    length.add_argument("--steps", type=int, help="length in optimiser steps: repeatable number by number")
    begin = parser.add_mutually_exclusive_group()
    begin.add_argument("--initial", type=Path, default=weights_dir(), help="model to begin with (default: mini)")
    begin.add_argument("--from-nothing", action="store_true", help="train tower, projector and embeddings, too")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile layers")
    parser.add_argument("--device", default="auto", help="auto (the default), cpu, cuda, cuda:1, ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, or begin it if there is none")
    parser.add_argument("--precision", default="float32", choices=["bfloat16", "float32"])
    options = parser.parse_args(arguments)
    initial = None if options.from_nothing else options.initial
    try:
        settings = GuideSettings(
            options.seed, options.minutes, options.steps, options.precision,
            layers=options.layers, from_nothing=options.from_nothing,
        )  # fmt: skip
        if (options.out / "checkpoint.pt").exists() and not options.resume:
            raise ValueError(f"{options.out} holds a run already: --resume continues it, or name another folder")
        run = GuideRun(options.out, settings, _device(options.device), initial=initial, compiled=options.compile)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if run.state.total_steps:
        print(f"continuing at step {run.state.total_steps}, {run.progress:.0%} done")
    run.train()
    print(f"guide: {export(run.model, options.out / 'model')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
