"""Which attention heads visual tokens keep: files, and the calibration that makes them (YOPO).

A sample votes for a head whose attention to visual tokens, as a multiple of that to all other tokens, is above a
threshold in the last row of the prompt; heads with more than 40 of 100 votes stay. Layers 0 and 1 stay whole. For a
wanted share of heads the threshold follows from the multiple that more than 40 % of the samples exceed, per head.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sparsevlm.budget import Schedule
from sparsevlm.methods.base import Method
from sparsevlm.mini import weights_dir
from sparsevlm.runtime.families import Family
from sparsevlm.runtime.prefill import Prefill
from sparsevlm.runtime.stage import Stage
from sparsevlm.runtime.trace import StageRecord

VOTES = 0.4  # of the samples: more of them must vote for a head
WHOLE = 2  # first layers, whose heads all stay
RATIOS = "head_ratios.npz"  # beside the trained modules of the embedded model
_COMMAND = "python -m sparsevlm.mini.heads"


class _Probe(Method):
    """Drops nothing and notes, in every layer, what the last row of the prompt attends to."""

    name = "probe"

    def attach(self, family: Family) -> list[np.ndarray]:
        return []

    def plan(self, n_visual: int, n_layers: int) -> Schedule:
        none = (0,) * n_layers
        return Schedule(n_visual, n_layers, tuple(range(n_layers)), (n_visual,) * n_layers, none, none)

    def keep_all(self, stage: Stage) -> None:
        row, seen = stage.attention(1)[:, :, 0].double(), stage.prefill.visual_flag
        visual, text = (row.masked_fill(flag[:, None], 0).sum(-1) for flag in (~seen, seen))
        stage.prefill.attached.append((visual / text).cpu().numpy())

    def annotate(self, record: StageRecord, prefill: Prefill) -> None:
        record.ratios = prefill.attached[-1]


@torch.no_grad()
def head_ratios(model: nn.Module, samples: Iterable[dict]) -> np.ndarray:
    """Measure the attention of each head to visual tokens, as a multiple of that to the others.

    Args:
        model: a vision-language model of those that methods work on.
        samples: arguments of its forward, one prompt with pictures each.

    Returns:
        [S, L, H] float64, of the last row of each prompt.
    """
    rows = []
    for sample in samples:
        with _Probe()(model) as trace:
            model(**sample)
        rows.append(np.concatenate([record.ratios for record in trace.prefills[0].stages]))
    return np.stack(rows)


def exceeded(ratios: np.ndarray) -> np.ndarray:
    """[L, H]: the ratio that just as many samples of [S, L, H] exceed as a head needs votes."""
    return np.sort(ratios, axis=0)[::-1][int(VOTES * len(ratios) + 1e-9)]


def votes(ratios: np.ndarray, threshold: float) -> np.ndarray:
    """[L, H] bool: heads with more than 40 % of the votes of [S, L, H], and those of the first two layers."""
    mask = (ratios > threshold).sum(0) > VOTES * len(ratios) + 1e-9
    mask[:WHOLE] = True
    return mask


def keep_share(limits: np.ndarray, share: float) -> np.ndarray:
    """[L, H] bool that keeps this share of all heads, given what `exceeded` returns: one threshold for all layers.

    Unlike `votes`, no layer keeps all of its heads: the authors set their thresholds by hand for deep models, and in a
    model of 12 layers the first two would take a third of half the heads.
    """
    wanted = int(share * limits.size + 0.5)
    mask = np.zeros(limits.size, bool)
    mask[np.argsort(-limits, axis=None, kind="stable")[:wanted]] = True
    return mask.reshape(limits.shape)


def fingerprint(family: Family) -> np.ndarray:
    """[L] float64: the norm of each layer's query projection, by which a file knows its model."""
    return np.array([float(layer.self_attn.q_proj.weight.detach().float().norm()) for layer in family.decoder.layers])


def load_heads(heads: float | str, family: Family) -> np.ndarray:
    """Return the [L, H] bool mask of a file, or of a share of the heads of an embedded model.

    Args:
        heads: path of a .npy, .npz or .pt file with one array [L, H], or with `limits` and `fingerprint` as
            `python -m sparsevlm.mini.heads` writes; or a share in (0, 1].

    Raises:
        ValueError: no such file, another shape, or no calibration of this model.
    """
    config = family.decoder.config
    shape = (family.n_layers, config.num_attention_heads)
    if isinstance(heads, str):
        found = _read(Path(heads))
        if found.shape != shape:
            raise ValueError(
                f"{heads} is for {_said(found.shape)}, the model has {_said(shape)}. Calibrate with {_COMMAND}"
            )
        if not np.isin(found, (0, 1)).all():
            raise ValueError(f"{heads} holds other values than true and false. Calibrate with {_COMMAND}")
        return found.astype(bool)
    if heads == 1:
        return np.ones(shape, bool)
    with np.load(weights_dir("mini").parent / "modules" / RATIOS) as file:
        limits, known = file["limits"], file["fingerprint"]
    weight = family.decoder.layers[0].self_attn.q_proj.weight
    same = limits.shape == shape and (weight.is_meta or np.allclose(fingerprint(family), known, rtol=1e-3))
    if not same:
        raise ValueError(
            f"heads={heads}: a share is known for the embedded model mini only. Calibrate this model and give the "
            f"file: {_COMMAND} --model FOLDER --share {heads} --out heads.npy"
        )
    return keep_share(limits, heads)


def _read(path: Path) -> np.ndarray:
    try:
        if path.suffix == ".pt":
            return torch.load(path, map_location="cpu", weights_only=True).numpy()
        found = np.load(path)
        if isinstance(found, np.ndarray):
            return found
        with found:
            (name,) = found.files
            return found[name]
    except Exception as error:
        raise ValueError(f"heads: cannot read {path} as one array [layers, heads] ({error})") from None


def _said(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) + " (layers x heads)"
