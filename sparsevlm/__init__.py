"""SparseVLM and the methods it is compared with, as hooks on unmodified transformers models.

    import sparsevlm
    model, processor = sparsevlm.load("mini")
    method = sparsevlm.build("sparsevlm", budget=192)
    with method(model) as trace:
        out = model.generate(**inputs)
    trace.prefills[-1]

Importing this package needs torch, transformers, numpy and PIL only.
"""

from sparsevlm._compat import declare_torchvision_operators

declare_torchvision_operators()  # before anything imports transformers

from sparsevlm import methods  # noqa: E402
from sparsevlm.methods import build  # noqa: E402

__version__ = "0.2.0"
__all__ = ["build", "load", "methods"]


def load(name, **kwargs):
    """Load a model and its processor; see :func:`sparsevlm.models.load`."""
    from sparsevlm.models import load as load_model

    return load_model(name, **kwargs)
