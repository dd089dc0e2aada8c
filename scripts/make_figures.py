"""All figures of runs, latency and training, as PNG and PDF, from what is in a results folder.

    python scripts/make_figures.py --results results
    python scripts/make_figures.py --results results --only accuracy,latency

Writes to `<results>/figures/`. Nothing is drawn of what was not measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection
from pathlib import Path

if not __package__:  # started as a file: import from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm import tqdm

from eval.runs.reader import BadRun, read_runs, unfinished
from scripts.figures import ablations, accuracy, latency, layers, training

KINDS = ("accuracy", "ablations", "layers", "latency", "training")


def main(argv: list[str] | None = None) -> None:
    """Draw figures; exit status 1 and one line on stderr if a run or a file cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder that holds runs/")
    parser.add_argument(
        "--metric", help="which metric of the runs (default: visual accuracy, accuracy, or their first)"
    )
    parser.add_argument("--only", help=f"kinds of figures, separated by commas: {', '.join(KINDS)}")
    args = parser.parse_args(argv)
    kinds = KINDS if args.only is None else [kind.strip() for kind in args.only.split(",")]
    try:
        written = make_figures(args.results, kinds, args.metric)
    except (BadRun, ValueError, OSError) as error:
        sys.exit(f"make_figures: {error}")
    for folder in unfinished(args.results):
        print(f"skipping unfinished run: {folder}. Rerun the same command to finish it", file=sys.stderr)
    for path in written:
        print(path)


def make_figures(results: Path, kinds: Collection[str] = KINDS, metric: str | None = None) -> list[Path]:
    """Draw the figures of these kinds and return the files' paths.

    Raises:
        BadRun: a run folder cannot be used; nothing is written then.
        ValueError: an unknown kind, runs without the metric asked for, or a damaged file.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"unknown kind of figure {kind!r}. Use one of {', '.join(KINDS)}")
    runs, folder = read_runs(results) if set(kinds) - {"training"} else [], results / "figures"
    draw = {
        "accuracy": lambda: accuracy.plot_runs(runs, folder, metric),
        "ablations": lambda: ablations.plot_runs(runs, folder, metric),
        "layers": lambda: layers.plot_runs(runs, folder),
        "latency": lambda: latency.plot_runs(runs, folder),
        "training": lambda: training.plot(results),
    }
    paths: list[Path] = []
    for kind in tqdm(kinds, desc="figures", disable=None):
        paths += draw[kind]()
    return paths


if __name__ == "__main__":
    main()
