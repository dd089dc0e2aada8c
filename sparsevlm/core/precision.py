"""The precision of scores."""

from __future__ import annotations

import torch


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision; float32 and float64 stay. Unlike torch.promote_types it dispatches no operator."""
    return dtype if dtype == torch.float64 else torch.float32
