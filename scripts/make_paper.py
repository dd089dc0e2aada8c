"""All tables, all figures and the page that shows them, from run folders and published numbers.

    python scripts/make_paper.py                                # from results/, or results/reference where it is empty
    python scripts/make_paper.py --results results/reference

Writes `<results>/tables/`, `<results>/figures/` and `<results>/report.html`. Nothing is measured here: what nobody ran
says "not run". A run folder that is broken ends the script with its name, before anything is written.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

if not __package__:  # started as a file: import from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import sparsevlm  # isort: skip  - before transformers: it makes torchvision importable beside a CPU-only torch

from PIL import Image
from tqdm import tqdm

from eval.runs.reader import BadRun, read_runs, unfinished
from eval.tasks.minivqa.dataset import rows as questions
from scripts.draw_kept import draw_kept, rated_words, seen_pixels
from scripts.figures import style
from scripts.make_figures import make_figures
from scripts.make_tables import build_tables
from scripts.report import write_report
from scripts.tables.formats import write

REFERENCE = Path("reference")
EXAMPLE = {"method": "sparsevlm", "budget": 64}


def main(argv: list[str] | None = None) -> None:
    """Make everything; exit status 1 and one line on stderr if a run cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder that holds runs/")
    parser.add_argument("--metric", help="which metric of the runs (default: accuracy, or else their first)")
    args = parser.parse_args(argv)
    results = source(args.results)
    if results != args.results:
        print(f"no run folders in {args.results / 'runs'}: making everything from {results}")
    try:
        written = make_paper(results, args.metric)
    except (BadRun, ValueError, KeyError, OSError) as error:
        sys.exit(f"make_paper: {error}")
    for folder in unfinished(results):
        print(f"left out, not finished: {folder} (the same command again finishes it)", file=sys.stderr)
    print(*written, sep="\n")


def source(results: Path) -> Path:
    """`results`, or the reference results in it where it has no runs (an unfinished run counts as one)."""
    runs, reference = results / "runs", results / REFERENCE
    empty = not runs.is_dir() or not any(runs.iterdir())
    return reference if empty and (reference / "runs").is_dir() else results


def make_paper(results: Path, metric: str | None = None) -> list[Path]:
    """Write everything and return the paths.

    Raises:
        BadRun: a run folder cannot be used; nothing is written then.
        ValueError: runs without the metric asked for.
    """
    runs = read_runs(results)
    tables = build_tables(runs, metric)
    figures = results / "figures"
    steps = {
        "tables": lambda: [path for table in tables for path in write(table, results / "tables")],
        "figures": lambda: make_figures(results, ("accuracy", "ablations", "layers", "latency"), metric),
        "kept patches": lambda: kept_patches(figures),
    }
    paths: list[Path] = []
    with tqdm(steps.items(), disable=None) as bar:
        for name, step in bar:
            bar.set_description(name)
            paths += step()
    drawn = [path for path in paths if path.suffix == ".png"]
    return [*paths, write_report(results / "report.html", runs, tables, drawn)]


def kept_patches(folder: Path) -> list[Path]:
    """What survives of the first picture of `minivqa`, by the paper's raters and by all words."""
    model, processor = sparsevlm.load("mini", dtype="float32")
    sample = next(questions(seed=0, n=1))
    inputs = processor(text=sample["question"], images=Image.open(io.BytesIO(sample["image"]["bytes"])))
    pixels = seen_pixels(inputs["pixel_values"][0], processor.image_processor)
    paths = []
    for raters in ("paper", "all"):
        method = sparsevlm.build(EXAMPLE["method"], budget=EXAMPLE["budget"], raters=raters)
        words, prefill = rated_words(model, processor, inputs, method)
        fig = draw_kept(pixels, prefill, title=sample["question"], words=words)
        paths += style.save(fig, folder, f"kept__minivqa__mini__{EXAMPLE['budget']}__raters_{raters}")
    return paths


if __name__ == "__main__":
    main()
