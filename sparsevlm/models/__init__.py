"""Loading models: embedded ones, hub ids and local folders, all by one path."""

from sparsevlm.models.loading import load
from sparsevlm.models.processor import Processor, n_visual_tokens

__all__ = ["Processor", "load", "n_visual_tokens"]
