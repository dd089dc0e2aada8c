"""The report of the separation study, of one training of the embedded model, or several trainings in one table.

    python scripts/make_separation.py results/separation
    python scripts/make_separation.py shipped=results/separation seed1=results/seed1 --out results/separation_seeds

One folder: writes `separation.md` and `separation.csv` into it, from the runs of `experiment=separation` in it. Several
(folder or name=folder each): writes `seeds.md` into --out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # started as a file: import from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.runs.reader import BadRun
from scripts.tables import separation_report, separation_seeds


def main(argv: list[str] | None = None) -> None:
    """Write the report; exit status 1 and one line on stderr if a folder cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", metavar="[NAME=]FOLDER", help="results of the study, per training")
    parser.add_argument("--out", type=Path, help="folder of the new seeds.md, for several trainings")
    args = parser.parse_args(argv)
    try:
        if args.out is None:
            if len(args.folders) > 1:
                raise ValueError("several trainings need a folder for their report. Use --out")
            written = separation_report.write(Path(args.folders[0]))
        else:
            written = [separation_seeds.write([_named(folder) for folder in args.folders], args.out)]
    except (BadRun, ValueError, OSError) as error:
        sys.exit(f"make_separation: {error}")
    print(*written, sep="\n")


def _named(argument: str) -> tuple[str, Path]:
    name, _, folder = argument.rpartition("=")
    return name or Path(folder).name, Path(folder)


if __name__ == "__main__":
    main()
