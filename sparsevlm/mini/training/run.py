"""A training run: the loop and its state on disk. Killed at any time, it continues from its last checkpoint."""

import json
import math
import os
from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from sparsevlm.mini.model import build_model, build_video_model
from sparsevlm.mini.training.batches import ClipBatches, SceneBatches
from sparsevlm.mini.training.distributed import ProcessGroup
from sparsevlm.mini.training.finetune import GENTLE, Answering
from sparsevlm.mini.training.hub import load_weights
from sparsevlm.mini.training.plan import CONTINUATION, PLAN, SHORT, SHORT_MINUTES, VIDEO, Phase, Settings
from sparsevlm.mini.training.pretrain import Alignment, NeutralBackground

OBJECTIVES = {"align": Alignment, "neutral": NeutralBackground}
_TEST_IMAGES = 48
_TEST_SEED = 0


@dataclass
class State:
    """Where a run is. Steps and seconds restart with every phase; ``seconds`` include evaluation and checkpoints."""

    phase: int = 0
    step: int = 0
    seconds: float = 0.0
    objective_step: int = 0
    total_steps: int = 0
    total_seconds: float = 0.0
    images: int = 0
    curve: list[dict] = field(default_factory=list)


class TrainingRun:
    """One training run in a folder, which holds ``checkpoint.pt`` and ``learning_curve.json``.

    Args:
        folder: made if missing; a checkpoint in it is continued.
        settings: must equal those of the checkpoint, if there is one.
        device: where to train.
        workers: processes that draw scenes ahead; 0 draws them in this one.
        save_every: seconds between checkpoints.
        evaluate_every: seconds between evaluations on test scenes; each phase ends with one anyway.
        plan: the phases; by default ``PLAN`` (``SHORT`` below 20 minutes), ``CONTINUATION`` with ``initial``, or
            ``VIDEO`` for the video model.
        initial: folder of an embedded model to begin with instead of the starting weights; the video model needs one.
        compiled: let ``torch.compile`` make the layers about twice as fast; needs a C++ compiler.

    Raises:
        ValueError: the checkpoint was made with other settings.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Settings,
        device: torch.device,
        workers: int = 0,
        save_every: float = 60.0,
        evaluate_every: float = 300.0,
        plan: tuple[Phase, ...] | None = None,
        initial: str | Path | None = None,
        compiled: bool = False,
    ):
        self.folder, self.settings, self.device = Path(folder), settings, device
        self.plan = plan or self.make_plan(initial)
        self._continued = initial is not None
        self.processes = ProcessGroup()
        self.workers, self.save_every, self.evaluate_every = workers, save_every, evaluate_every
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = self.make_model(initial).to(device)
        # the faster of the two on each; both compute the same
        self.model.set_attn_implementation("eager" if device.type == "cpu" else "sdpa")
        self.state, self.objective = State(), None
        self._clock = self._saved = self._evaluated = self.processes.now()
        self._reported = -math.inf
        if self.checkpoint.is_file():
            self._load()
        if compiled:
            _compile_layers(self.model)

    def make_plan(self, initial: str | Path | None) -> tuple[Phase, ...]:
        """Return the phases of a run of these settings."""
        settings = self.settings
        if settings.video:
            return VIDEO
        if initial is not None:
            return CONTINUATION
        return SHORT if settings.minutes is not None and settings.minutes < SHORT_MINUTES else PLAN

    def make_model(self, initial: str | Path | None) -> nn.Module:
        """Return the model as the run begins with it.

        Raises:
            ValueError: a video model without one to start from, or a folder that holds no embedded model.
        """
        if self.settings.video:
            if initial is None:
                raise ValueError("the video model starts from a trained model for pictures: name its folder as initial")
            return build_video_model(load_weights(initial), self.settings.seed)
        model = build_model(self.settings.seed)
        if initial is not None:
            model.load_state_dict(load_weights(initial))
        return model

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def finished(self) -> bool:
        return self.state.phase == len(self.plan)

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 to 1, in time shares."""
        shares = [phase.time_share for phase in self.plan]
        return (sum(shares[: self.state.phase]) + self._current_share()) / sum(shares)

    def train(self) -> None:
        """Runs to the end of the plan.

        Raises:
            FloatingPointError: the loss is no longer finite.
        """
        self._clock = self.processes.now()
        while not self.finished:
            phase = self.plan[self.state.phase]
            if self.objective is None:
                self.objective = self._make_objective(phase)
                if not self._continued:
                    self.objective.start()
                self.state.objective_step = 0
            self._train_phase(phase)
            next_phase = self.plan[self.state.phase + 1] if self.state.phase + 1 < len(self.plan) else None
            if next_phase is None or next_phase.objective != phase.objective:
                self.objective = None
            self.state.phase, self.state.step, self.state.seconds = self.state.phase + 1, 0, 0.0
            self._save()

    def _train_phase(self, phase: Phase) -> None:
        data = phase.shape.batches("train", self.settings.seed, self.state.phase)
        state, losses = self.state, deque(maxlen=50)
        for batch in data.loader(self.processes.indices(state.step), self.workers):
            if self._phase_progress(phase) >= 1:
                break
            losses.append(self._step(phase, batch))
            state.step, state.objective_step = state.step + 1, state.objective_step + 1
            state.total_steps += 1
            state.images += self.processes.size * phase.shape.images
            self._tick()
            if self._clock - self._reported > 10:
                self._report(phase, _mean_loss(losses))
            if self._clock - self._evaluated > self.evaluate_every:
                self._record(phase, _mean_loss(losses))
            if self._clock - self._saved > self.save_every:
                self._save()
        if losses:
            self._record(phase, _mean_loss(losses))

    def _step(self, phase: Phase, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        objective = self.objective
        shares = [p.time_share if p.objective == phase.objective else 0.0 for p in self.plan]
        done = (sum(shares[: self.state.phase]) + self._current_share()) / sum(shares)
        rate = objective.rate(self.state.objective_step, done)
        loss = objective.loss(self._to_device(batch))
        for optimizer in objective.optimizers:
            optimizer.zero_grad()
        loss.backward()
        self.processes.average_gradients(objective.parameters)
        torch.nn.utils.clip_grad_norm_(objective.parameters, 1.0)
        for optimizer in objective.optimizers:
            for group in optimizer.param_groups:
                group.setdefault("full_lr", group["lr"])
                group["lr"] = group["full_lr"] * rate
            optimizer.step()
        return loss.detach()

    def _make_objective(self, phase: Phase):
        torch.manual_seed(self.settings.seed)
        precision = getattr(torch, self.settings.precision)
        if phase.objective == "answer":
            types = (ClipBatches if phase.shape.clips else SceneBatches).types
            gentle = self._continued and not self.settings.video
            return Answering(self.model, precision, types, GENTLE if gentle else None)
        return OBJECTIVES[phase.objective](self.model, precision)

    def _phase_progress(self, phase: Phase) -> float:
        if self.settings.steps is not None:
            return self.state.step / max(1, round(self.settings.steps * phase.step_share))
        return self.state.seconds / (60 * self.settings.minutes * phase.time_share)

    def _current_share(self) -> float:
        if self.finished:
            return 0.0
        phase = self.plan[self.state.phase]
        return phase.time_share * min(1.0, self._phase_progress(phase))

    def _tick(self) -> None:
        now = self.processes.now()
        self.state.seconds += now - self._clock
        self.state.total_seconds += now - self._clock
        self._clock = now

    def _to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

    def _record(self, phase: Phase, loss: float) -> None:
        """Evaluates on test scenes, always the same, and adds a point to the learning curve."""
        data = phase.shape.batches("test", _TEST_SEED, 0)
        batches = data.loader(range(math.ceil(_TEST_IMAGES / phase.shape.images)), workers=0)
        scores = self.objective.scores(self._to_device(batch) for batch in batches)
        self._tick()
        self._evaluated = self._clock
        state = self.state
        point = {"phase": phase.name, "step": state.total_steps, "images": state.images, "loss": round(loss, 4)}
        point["minutes"] = round(state.total_seconds / 60, 2)
        state.curve.append(point | {name: round(score, 4) for name, score in scores.items()})
        if not self.processes.first:
            return
        _write_atomically(self.folder / "learning_curve.json", json.dumps(state.curve, indent=1).encode() + b"\n")
        print(
            f"  test, {phase.name}: " + ", ".join(f"{name} {score:.3f}" for name, score in scores.items()), flush=True
        )

    def _report(self, phase: Phase, loss: float) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} in {phase.name}, step {self.state.step}; try another seed")
        self._reported = self._clock
        if not self.processes.first:
            return
        done, seconds = self.progress, self.state.total_seconds
        left = f"{seconds / done * (1 - done) / 60:.1f} min left" if done > 0 else "starting"
        print(
            f"{seconds / 60:.1f} min, {done:.0%}, {left} | {phase.name} step {self.state.step} loss {loss:.3f}",
            flush=True,
        )

    def _save(self) -> None:
        self._tick()
        self._saved = self._clock
        if not self.processes.first:
            return
        content = {"settings": asdict(self.settings), "state": asdict(self.state), "model": self.model.state_dict()}
        if self.objective is not None:
            content["helpers"] = self.objective.helpers.state_dict()
            content["optimizers"] = [optimizer.state_dict() for optimizer in self.objective.optimizers]
        draft = self.checkpoint.with_suffix(".tmp")
        torch.save(content, draft)
        os.replace(draft, self.checkpoint)

    def _load(self) -> None:
        content = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        if content["settings"] != asdict(self.settings):
            raise ValueError(
                f"{self.checkpoint} belongs to a run with {content['settings']}; continue with these settings, "
                "or train into another folder"
            )
        self.state = State(**content["state"])
        self.model.load_state_dict(content["model"])
        if "optimizers" in content:
            self.objective = self._make_objective(self.plan[self.state.phase])
            self.objective.helpers.load_state_dict(content["helpers"])
            for optimizer, saved in zip(self.objective.optimizers, content["optimizers"], strict=True):
                optimizer.load_state_dict(saved)


def _compile_layers(model) -> None:
    """Layer by layer: all layers of a kind share one compiled graph per shape, which takes seconds, not minutes."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    towers = [module for name, module in model.model.named_children() if name.endswith("_tower")]
    for layer in (*model.model.language_model.layers, *(layer for tower in towers for layer in tower.encoder.layers)):
        layer.compile(dynamic=False)


def _mean_loss(losses) -> float:
    return torch.stack(list(losses)).mean().item()


def _write_atomically(path: Path, content: bytes) -> None:
    draft = path.with_suffix(".tmp")
    draft.write_bytes(content)
    os.replace(draft, path)
