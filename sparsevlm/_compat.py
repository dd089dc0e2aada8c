"""Makes the torchvision of PyPI importable beside a CPU-only torch.

PyPI's torchvision is a CUDA build. Beside a torch without CUDA its C extension cannot load, so the operators
``torchvision::nms`` and ``torchvision::qnms`` are never registered and ``import torchvision`` raises ``RuntimeError:
operator torchvision::nms does not exist`` - and with it half of transformers and all of lmms-eval.
"""

import importlib.util
import sys


def declare_torchvision_operators() -> bool:
    """Declares the two missing operators (no kernels: calling them still raises), so that the Python part imports.

    Must run before the first import of torchvision. Does nothing where torch has CUDA or ROCm, or where torchvision
    is absent or imported already.

    Returns:
        Whether anything was declared.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return False
    import torch

    if torch.version.cuda is not None or getattr(torch.version, "hip", None) is not None:
        return False
    for name in ("nms", "qnms"):
        try:
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:  # declared already
            return False
    return True
