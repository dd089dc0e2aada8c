"""``python -m eval.tasks.minivqa_video``: makes the default questions where minivqa_video.yaml looks for them."""

from eval.tasks.minivqa_video.dataset import build_dataset

print(build_dataset())
