"""The lmms-eval side: `python -m eval.run` runs a task on a model with a pruning method and writes a results folder."""
