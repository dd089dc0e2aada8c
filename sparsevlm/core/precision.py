"""The precision of scores."""

from __future__ import annotations

import torch


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Return float32 for half precision, else `dtype`. Unlike torch.promote_types it dispatches no operator."""
    return dtype if dtype == torch.float64 else torch.float32
