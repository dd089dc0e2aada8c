"""Functions of the task minivqa_video that its YAML names."""

import numpy as np

from eval.tasks.minivqa.utils import doc_to_text, process_results

__all__ = ["doc_to_text", "doc_to_visual", "process_results"]


def doc_to_visual(doc: dict) -> list[np.ndarray]:
    """The clip: uint8 ``[8, 56, 56, 3]``."""
    return [np.stack([np.asarray(frame.convert("RGB")) for frame in doc["frames"]])]
