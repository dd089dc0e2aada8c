"""What training is worth: methods with trained modules against the same with untrained ones, on the same questions.

    python -m eval.run experiment=modules results_dir=results/reference/modules
    python scripts/trained_modules.py --results results/reference/modules

Writes `<results>/trained_modules.md`: accuracies, paired differences to the trained run, and for methods whose counts
depend on the picture the correlation of the tokens kept with the number of objects in it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from eval.markdown import markdown_table
from eval.runs.reader import Run, label, read_runs
from eval.runs.stats import bootstrap_ci, paired_difference
from eval.tasks.minivqa.dataset import _STREAM, draw_questions
from eval.tasks.minivqa.utils import VISUAL
from sparsevlm.mini import questions
from sparsevlm.mini.scenes import SceneGenerator

#: Option that names a file of modules; None = the shipped ones, which are trained.
OPTION = {"dynamic_llava": "predictor", "atp_llava": "modules"}
CONTROL = "random_layer"  # beside the method that has a budget
_DRAWS = 10_000


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, required=True, help="folder that holds runs/")
    folder = parser.parse_args(arguments).results
    path = folder / "trained_modules.md"
    path.write_text(report([run for run in read_runs(folder) if run.task == "minivqa"]), encoding="utf-8")
    print(path)
    return 0


def report(runs: Sequence[Run]) -> str:
    """Return the Markdown of runs with the same questions."""
    n, seed = runs[0].metrics["n"], runs[0].metrics["seed"]
    parts = [
        "# What training is worth",
        f"{len(runs[0].scores(VISUAL))} of the first {n} questions of `minivqa` (seed {seed}) to `mini`: those that "
        "need the picture. In brackets 95 % intervals (bootstrap over questions; differences, in points, are paired). "
        "`python scripts/trained_modules.py` makes this file.",
    ]
    by_method = {name: [run for run in runs if run.metrics["method"] == name] for name in (*OPTION, CONTROL)}
    for method in OPTION:
        if by_method[method]:
            others = by_method[CONTROL] if method == "dynamic_llava" else []
            parts += [f"## {method}", _table(by_method[method], others)]
    if by_method["atp_llava"]:
        parts += ["Tokens kept (mean leaving a layer) and the number of objects in the picture:"]
        parts += [_objects(by_method["atp_llava"], n, seed)]
    return "\n\n".join(parts) + "\n"


def trained(run: Run) -> bool:
    """Whether a run used the shipped modules as they are."""
    options = run.metrics["options"]
    return options[OPTION[run.metrics["method"]]] is None


def _table(runs: Sequence[Run], others: Sequence[Run]) -> str:
    ours = [run for run in runs if trained(run)]
    lines = []
    for run in (*ours, *(run for run in runs if not trained(run)), *others):
        line = [label(run.metrics["method"], run.metrics["options"]), str(run.metrics["budget"])]
        line += [f"{np.mean(leaving(run)):.1f}", _percent(*bootstrap_ci(list(run.scores(VISUAL).values())))]
        against = [o for o in ours if o is not run and o.metrics["budget"] == run.metrics["budget"]]
        found = [paired_difference(o.scores(VISUAL), run.scores(VISUAL)) for o in against]
        lines.append([*line, _points(*found[0]) if found else ""])
    return markdown_table(["method", "budget", "leaving", "accuracy % [95 %]", "trained - this, points"], lines, left=1)


def _objects(runs: Sequence[Run], n: int, seed: int) -> str:
    drawn = draw_questions(SceneGenerator("test"), questions, _STREAM, seed, n)
    objects = [len(scene.objects) for scene, _, _ in drawn]
    lines = []
    for run in runs:
        kept = leaving(run)
        name = label(run.metrics["method"], run.metrics["options"])
        low, high = min(kept), max(kept)
        lines.append([name, f"{np.mean(kept):.1f} ({low:.1f} to {high:.1f})", _interval(*correlation(kept, objects))])
    return markdown_table(["method", "leaving (range)", "correlation [95 %]"], lines, left=1)


def leaving(run: Run) -> list[float]:
    """Return the mean visual tokens leaving a layer, by question."""
    return [sample["leaving"] for sample in sorted(run.samples, key=lambda sample: sample["doc_id"])]


def correlation(x: Sequence[float], y: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Return Pearson's correlation with its 95 % percentile bootstrap interval (over pairs)."""
    pairs = np.array([x, y], dtype=float)
    random = np.random.default_rng(seed)
    draws = [np.corrcoef(pairs[:, random.integers(0, pairs.shape[1], pairs.shape[1])])[0, 1] for _ in range(_DRAWS)]
    return float(np.corrcoef(pairs)[0, 1]), *map(float, np.quantile(draws, [0.025, 0.975]))


def _percent(mean: float, low: float, high: float) -> str:
    return f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _points(mean: float, low: float, high: float) -> str:
    return f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


if __name__ == "__main__":
    sys.exit(main())
