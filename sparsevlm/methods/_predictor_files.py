"""Where Dynamic-LLaVA's predictors come from: files of this project, the authors' checkpoints, or a random draw."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sparsevlm.methods._modules import ModulesFile, read_modules, shipped
from sparsevlm.methods._predictors import Predictors, Sizes
from sparsevlm.runtime.families import Family

METHOD = "dynamic_llava"
_IMAGE, _TEXT = "image_score_predictor.", "output_text_score_predictor."
_AUTHORS_HEADS, _AUTHORS_LAYER, _AUTHORS_RATE = 8, 2, 0.2  # Osilly/dynamic_llava e1469bc, train_sparse.py


@dataclass(frozen=True)
class Predictor:
    """Predictors for one model.

    Attributes:
        modules: with their weights.
        layer: 0-based layer whose entering states they read.
        rate: share of the visual tokens that they were trained to keep; None = untrained.
        source: what messages call it.
    """

    modules: Predictors
    layer: int
    rate: float | None
    source: str


def untrained(family: Family, layer: int, seed: int) -> Predictor:
    """Make a predictor with random weights for a model."""
    sizes = Sizes.of(family.decoder.config.hidden_size)
    device = next(family.decoder.parameters()).device
    if device.type == "meta":
        with torch.device("meta"):
            return Predictor(Predictors(sizes), layer, None, "an untrained predictor")
    return Predictor(Predictors(sizes).start(seed), layer, None, "an untrained predictor")


def find(path: str | None, family: Family) -> Predictor:
    """Read the predictors for a model.

    Args:
        path: a file of modules, a folder of the authors' checkpoint, or None = the file shipped for this model.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: nothing is shipped for this model; a damaged file; or one for a model of another size.
    """
    if path is None:
        return _of_file(shipped(METHOD, "predictor", family), family)
    if Path(path).is_dir():
        return _of_checkpoint(Path(path), family)
    return _of_file(read_modules(path, METHOD), family)


def _of_file(file: ModulesFile, family: Family) -> Predictor:
    file.check_model(family)
    modules = _build(file.tensors, file.integer("heads"), str(file.path), family)
    return Predictor(modules, file.integer("layer"), file.number("rate"), str(file.path))


def _of_checkpoint(folder: Path, family: Family) -> Predictor:
    """Read the predictors among the weights `model.*` of a checkpoint in the authors' layout."""
    try:
        config = json.loads((folder / "config.json").read_text()).get("sparse_config") or {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} has no readable config.json ({error}). Use the whole checkpoint") from None
    layer = int(config.get("sparse_layer", _AUTHORS_LAYER))
    compared = f"model.layers.{layer}.self_attn.q_proj.weight"
    tensors, weight = {}, None
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                if key.startswith(("model." + _IMAGE, "model." + _TEXT)):
                    tensors[key.removeprefix("model.")] = file.get_tensor(key)
                elif key == compared:
                    weight = file.get_tensor(key)
    if not any(key.startswith(_IMAGE) for key in tensors):
        raise ValueError(
            f"{folder} holds no weights model.{_IMAGE}* in safetensors. Use the folder of Osilly/Dynamic-LLaVA-7B or "
            "-13B, or a file that python -m sparsevlm.mini.training.modules dynamic_llava wrote"
        )
    modules = _build(tensors, int(config.get("nhead", _AUTHORS_HEADS)), str(folder), family)
    if weight is not None and layer < family.n_layers:
        mine = family.decoder.layers[layer].self_attn.q_proj.weight
        if mine.shape != weight.shape or not (mine.is_meta or torch.equal(mine.cpu().to(weight.dtype), weight)):
            warnings.warn(
                f"the predictors of {folder} were trained together with its language model, whose weights differ from "
                "this model's. Load that checkpoint's language model, too",
                stacklevel=2,
            )
    return Predictor(modules, layer, float(config.get("vision_keep_rate", _AUTHORS_RATE)), str(folder))


def _build(tensors: dict[str, Tensor], heads: int, source: str, family: Family) -> Predictors:
    """Make the modules of stored weights, whose sizes are read from their shapes.

    Raises:
        ValueError: weights are missing, of other shapes or not finite; or the model's width is another one.
    """
    try:
        width, hidden = tensors[_IMAGE + "down_mlp.1.weight"].shape
        blocks = [k for k in tensors if re.fullmatch(rf"{_IMAGE}transformer\.\d+\.norm1\.weight", k)]
        inner = tensors[_IMAGE + "transformer.0.mlp.fc1.weight"].shape[0] if blocks else 4 * width
        text = tensors.get(_TEXT + "output_mlp.1.weight")
        sizes = Sizes(hidden, width, heads, inner, len(blocks), 0 if text is None else text.shape[0])
        if hidden != family.decoder.config.hidden_size:
            raise ValueError(
                f"{source} is for language models of width {hidden}, this one has {family.decoder.config.hidden_size}. "
                "Use a predictor that was trained for this model"
            )
        with torch.device("meta"):
            modules = Predictors(sizes)
        modules.load_state_dict({k: v.float() for k, v in tensors.items()}, assign=True)
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{source} does not hold Dynamic-LLaVA's predictors ({reason}). Use a whole file") from None
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise ValueError(f"{source} has weights that are infinite or no numbers ({bad[0]}). Use another file")
    return modules
