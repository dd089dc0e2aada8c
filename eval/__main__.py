"""lmms-eval's own command line with our model class and tasks, and honest exit statuses.

    python -m eval.tasks.minivqa                                  # once: makes the questions of minivqa
    python -m eval --model sparsevlm --model_args pretrained=mini,method=sparsevlm,budget=192,batch_size=8 \
        --tasks minivqa --limit 64 --output_path out --log_samples

`python -m lmms_eval` (also of several processes) takes the same arguments once this package is installed, but cannot
start beside a CPU-only torch with the torchvision of PyPI, does not see our tasks without --include_path, and exits
with 0 when a run fails.
"""

from __future__ import annotations

import sparsevlm  # noqa: F401  # isort: skip  - before lmms-eval: it makes torchvision importable beside a CPU-only torch

import sys

from lmms_eval import __main__ as lmms_cli
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.utils import make_table

from eval.plugin import manifests
from eval.tasks import FOLDER


def main() -> int:
    """Run lmms-eval with sys.argv; an exception ends the process with status 1."""
    for manifest in manifests():
        MODEL_REGISTRY_V2.register_manifest(manifest)
    _, args = lmms_cli.parse_eval_args()
    if args.include_path is None:
        args.include_path = str(FOLDER)
    results, _ = lmms_cli.cli_evaluate_single(args)
    if results is not None:
        print(make_table(results))  # its own print_results looks for the function in the wrong module
    return 0


if __name__ == "__main__":
    sys.exit(main())
