"""The embedded model: a small, really trained LLaVA, the pictures and questions it was trained on, and its training.

Only :func:`weights_dir` is needed to use the model; scikit-learn (the handwritten digits) is imported when a scene is
drawn, never before.
"""

from importlib import resources
from pathlib import Path

__all__ = ["weights_dir"]


def weights_dir(name: str = "mini") -> Path:
    """Folder of a shipped checkpoint, laid out as on the model hub (config, safetensors, tokenizer, processor).

    Args:
        name: which of the shipped checkpoints.

    Returns:
        A folder that ``from_pretrained`` accepts.

    Raises:
        ValueError: no checkpoint of that name is shipped; the message lists those that are.
    """
    root = Path(str(resources.files(__name__))) / "weights"
    known = sorted(p.name for p in root.iterdir() if (p / "config.json").is_file()) if root.is_dir() else []
    if name not in known:
        raise ValueError(f"no embedded model {name!r}; shipped: {', '.join(known) or 'none (reinstall the package)'}")
    return root / name
