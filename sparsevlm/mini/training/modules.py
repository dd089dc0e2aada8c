"""Trains a method's modules on the frozen embedded model:

    python -m sparsevlm.mini.training.modules dynamic_llava --out DIR --rate .1112 --minutes 10 --seed 0

Writes ``DIR/<method>.safetensors`` (for ``predictor=`` or ``modules=`` of the method), ``DIR/learning_curve.json``
(loss, and what is answered on windows of test scenes, as training went on) and ``DIR/checkpoint.pt`` (to continue with
``--resume``).
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsevlm.budget import scale_layers
from sparsevlm.methods._modules import fingerprint, write_modules
from sparsevlm.methods.atp_llava import ATPLLaVA
from sparsevlm.mini import weights_dir
from sparsevlm.mini.training.batches import BatchShape
from sparsevlm.mini.training.plan import Phase, Settings
from sparsevlm.mini.training.predictor import FrozenObjective, KeepPredictor
from sparsevlm.mini.training.run import TrainingRun
from sparsevlm.mini.training.thresholds import ThresholdTraining

#: What each method trains, on what, and where in 32 layers its modules stand.
PLANS = {
    "dynamic_llava": Phase("answer", BatchShape(grid=12, images=6, questions=12), 1.0, 1.0),
    "atp_llava": Phase("answer", BatchShape(grid=24, images=2, questions=1), 1.0, 1.0),
}
METHODS = tuple(PLANS)


@dataclass(frozen=True)
class ModuleSettings(Settings):
    """Settings of the training of modules.

    Attributes:
        method: whose.
        rate: share of the visual tokens that shall stay.

    Raises:
        ValueError: as `Settings`, or a rate that is no share.
    """

    precision: str = "float32"
    method: str = METHODS[0]
    rate: float = 1 / 9

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.rate < 1:
            raise ValueError(f"the rate must be a share of the tokens between 0 and 1, got {self.rate}")


class ModuleRun(TrainingRun):
    """A training of modules in a folder; arguments as for `TrainingRun`."""

    settings: ModuleSettings

    def _make_objective(self, phase: Phase) -> FrozenObjective:
        settings, layers = self.settings, self.model.config.text_config.num_hidden_layers
        if settings.method == "atp_llava":
            method = ATPLLaVA()
            target = settings.rate * self.model.config.image_seq_length
            return ThresholdTraining(self.model, target, method.where(layers), method.sampling, settings.seed)
        return KeepPredictor(self.model, settings.rate, scale_layers(layers, (1,))[0] + 1, settings.seed)

    @property
    def file(self) -> Path:
        """Where the modules are written."""
        return self.folder / f"{self.settings.method}.safetensors"

    def _train_phase(self, phase: Phase) -> None:
        super()._train_phase(phase)
        if self.processes.first:
            config = self.model.config.text_config
            facts = {"method": self.settings.method, "hidden": config.hidden_size, "n_layers": config.num_hidden_layers}
            facts |= {"rate": self.settings.rate, "fingerprint": fingerprint(self.model.model)}
            facts |= {"seed": self.settings.seed, "steps": self.state.total_steps}
            write_modules(self.file, self.objective.helpers.state_dict(), facts | self.objective.facts)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sparsevlm.mini.training.modules", description="Trains modules.")
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--rate", type=float, default=1 / 9, help="share of the visual tokens that shall stay")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="length of the training")
    length.add_argument("--steps", type=int, help="length in optimiser steps: repeatable number by number")
    parser.add_argument("--initial", type=Path, default=weights_dir(), help="folder of another training of the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, or begin it if there is none")
    options = parser.parse_args(arguments)
    try:
        settings = ModuleSettings(
            options.seed, options.minutes, options.steps, method=options.method, rate=options.rate
        )
        if (options.out / "checkpoint.pt").exists() and not options.resume:
            raise ValueError(f"{options.out} holds a run already: --resume continues it, or name another folder")
        plan = (PLANS[options.method],)
        run = ModuleRun(options.out, settings, torch.device("cpu"), plan=plan, initial=options.initial)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if run.state.total_steps:
        print(f"continuing at step {run.state.total_steps}, {run.progress:.0%} done")
    run.train()
    if run.processes.first:
        print(f"modules: {run.file}")
    run.processes.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
