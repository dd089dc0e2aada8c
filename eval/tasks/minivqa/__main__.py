"""``python -m eval.tasks.minivqa``: makes the default questions where minivqa.yaml looks for them."""

from eval.tasks.minivqa.dataset import build_dataset

print(build_dataset())
