"""A differential fuzzer: random models, methods, prompts and ways of running against an independent masked model.

`python -m tests.fuzz --cases 1000 --seed 0` (or `make fuzz cases=1000`).
"""

import sparsevlm  # noqa: F401  before anything imports transformers
