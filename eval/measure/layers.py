"""Per layer: the rank of the raters' attention, and how many visual tokens are left; kept as a run folder.

    python -m eval.measure.layers --results results

On questions of `minivqa` with the model `mini`. The rank (what the paper's adaptive rule asks for) is taken at every
layer of the unpruned model, once with the paper's raters and once with all text tokens. Writes
`<results>/runs/layers__mini__<hash>/`; the same command again finds it and measures nothing.
"""

from __future__ import annotations

import argparse
import io
from dataclasses import asdict, dataclass, field
from pathlib import Path

import sparsevlm  # isort: skip  - before transformers: it makes torchvision importable beside a CPU-only torch

import torch
from PIL import Image
from tqdm import tqdm

from eval.measure.once import Kept, Measured, measure_once, run_command
from eval.runs.reader import LAYERS, label
from eval.runs.settings import fingerprint
from eval.tasks.minivqa.dataset import rows as questions
from sparsevlm.methods.sparsevlm_rank import SparseVLMRank
from sparsevlm.models.checkpoint import find_checkpoint

RATERS = ("paper", "all")
SETTINGS = (
    ("sparsevlm", 192, {}), ("sparsevlm", 64, {}), ("fastv", 64, {}), ("pyramiddrop", 192, {}),
    ("sparsevlm_rank", None, {"rule": "v1.0"}), ("sparsevlm_rank", None, {"rule": "paper"}),
)  # fmt: skip


@dataclass(frozen=True)
class Ranks(SparseVLMRank):
    """SparseVLM's rank rule that drops nothing and notes what it would have decided by.

    Attributes:
        seen: (layer, rank, raters) of each decision.
    """

    lam: float = 0.0
    seen: list[tuple[int, int, int]] = field(default_factory=list, compare=False)

    def keep_counts(self, stage) -> list[int]:
        raters = int((stage.prefill.weights[0] > 0).sum())
        self.seen.append((stage.layer, stage.prefill.scratch["ranks"][0], raters))
        return super().keep_counts(stage)


def main(argv: list[str] | None = None) -> None:
    """Measure and write; one line on stderr and exit status 2 for what cannot be."""

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--questions", type=int, default=32, help="the first of minivqa")

    def as_asked(args: argparse.Namespace, command: str) -> str:
        return measure_layers(args.results, args.questions, command)

    run_command("layers", __doc__, add_arguments, as_asked, argv)


def measure_layers(results: Path, n: int, command: str) -> str:
    """Measure on the first `n` questions unless that was done, and return where the run folder is.

    Raises:
        UserError, OSError: the folder cannot be written.
    """
    config = {"model": {"name": "mini", "pretrained": "mini", "weights": fingerprint(find_checkpoint("mini"))}}
    config |= {"questions": n, "raters": list(RATERS), "settings": [list(s) for s in SETTINGS]}

    def measured(_: Kept) -> Measured:
        samples = measure(n)
        return Measured(summarise_rows(samples), samples, n)

    return measure_once(results, LAYERS, f"{LAYERS}__mini", config, command, measured)


def measure(n: int) -> list[dict]:
    """One row per question, curve and layer: `what` ("rank", "raters" or "tokens"), `setting`, `layer`, `value`."""
    model, processor = sparsevlm.load("mini", dtype="float32")
    n_layers = model.config.get_text_config().num_hidden_layers
    rows = []
    for i, sample in enumerate(tqdm(questions(seed=0, n=n), total=n, desc="questions", disable=None)):
        inputs = processor(text=sample["question"], images=Image.open(io.BytesIO(sample["image"]["bytes"])))
        for raters in RATERS:
            method = Ranks(raters=raters, layers=range(n_layers - 1))  # none acts on the last one
            _prefill(model, inputs, method)
            for layer, rank, count in method.seen:
                rows.append({"question": i, "what": "rank", "setting": raters, "layer": layer, "value": rank})
                rows.append({"question": i, "what": "raters", "setting": raters, "layer": layer, "value": count})
        for name, budget, options in SETTINGS:
            method = sparsevlm.build(name, budget=budget, **options)
            record = _prefill(model, inputs, method)
            chosen = {k: v for k, v in asdict(method).items() if k != "budget"}
            setting = label(name, chosen) + ("" if budget is None else f", {budget}")
            after = {stage.layer: stage.tokens_out[0] for stage in record.stages}
            left = after.get(-1, record.n_visual[0])
            for layer in range(n_layers):
                left = after.get(layer, left)
                rows.append({"question": i, "what": "tokens", "setting": setting, "layer": layer, "value": left})
    return rows


def _prefill(model, inputs, method):
    with torch.no_grad(), method(model) as trace:
        model(**inputs, use_cache=True, logits_to_keep=1)
    return trace.prefills[0]


def summarise_rows(samples: list[dict]) -> list[dict]:
    """Mean, smallest and largest over the questions."""
    curves: dict[tuple, list[float]] = {}
    for row in samples:
        curves.setdefault((row["what"], row["setting"], row["layer"]), []).append(row["value"])
    return [
        {"what": what, "setting": setting, "layer": layer, "mean": sum(found) / len(found), "smallest": min(found),
         "largest": max(found)}
        for (what, setting, layer), found in curves.items()
    ]  # fmt: skip


if __name__ == "__main__":
    main()
