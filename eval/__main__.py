"""lmms-eval's own command line with our model class and tasks, and honest exit statuses.

    python -m eval --model sparsevlm --model_args pretrained=mini,method=sparsevlm,budget=192,batch_size=8 \
        --tasks minivqa --limit 64 --output_path out --log_samples

`python -m lmms_eval` (also of several processes) takes the same arguments once this package is installed, but cannot
start beside a CPU-only torch with the torchvision of PyPI, does not see our tasks without --include_path, and exits
with 0 when a run fails. The questions of minivqa must be made for it first: `python -m eval.tasks.minivqa`.

Either way the benchmarks are asked and scored as lmms-eval ships them. What `python -m eval.run` corrects about them is
said before the first question is asked (see eval/generate/stock.py).
"""

from __future__ import annotations

import sparsevlm  # noqa: F401  # isort: skip  - before lmms-eval: it makes torchvision importable beside a CPU-only torch

import sys

from lmms_eval import __main__ as lmms_cli
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.utils import make_table

from eval.plugin import manifests
from eval.tasks import FOLDER, TASKS
from eval.tasks.generated import Generated


def make_questions(name: str) -> None:
    """Make the questions of a generated task where its YAML looks for them, if this version's are not there."""
    task = TASKS.get(name)
    if isinstance(task, Generated):
        folder = FOLDER / task.folder.removeprefix("own:") / "data"
        print(f"the questions of {name}: {folder}; making them takes about a minute, once", file=sys.stderr, flush=True)
        task.build(0, task.size, folder)


def main() -> int:
    """Run lmms-eval with sys.argv; an exception ends the process with status 1."""
    for manifest in manifests():
        MODEL_REGISTRY_V2.register_manifest(manifest)
    _, args = lmms_cli.parse_eval_args()
    if args.include_path is None:
        args.include_path = str(FOLDER)
        for name in (args.tasks or "").split(","):
            make_questions(name)
    results, _ = lmms_cli.cli_evaluate_single(args)
    if results is not None:
        print(make_table(results))  # its own print_results looks for the function in the wrong module
    return 0


if __name__ == "__main__":
    sys.exit(main())
