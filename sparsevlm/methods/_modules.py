"""Files of trained modules: safetensors with what the modules are and the fingerprint of the model they belong to.

The header holds, as strings: `format` ("sparsevlm modules 1"), `method`, `hidden` (width of the language model),
`n_layers` (its depth), `layer` or `layers` (0-based, that the modules' states enter), `rate` (share or number of tokens
that they were trained to keep), `fingerprint` of the model, and what else the method needs.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsevlm.runtime.families import Family

FORMAT = "sparsevlm modules 1"
_SAMPLES = 16  # values of each weight that make a fingerprint


@dataclass(frozen=True)
class ModulesFile:
    """A file that was read.

    Attributes:
        path: of the file.
        facts: its header.
        tensors: by name, as stored.
    """

    path: Path
    facts: dict[str, str]
    tensors: dict[str, Tensor]

    def integer(self, fact: str) -> int:
        """Return an integer of the header.

        Raises:
            ValueError: it is missing, or no integer.
        """
        return int(self._read(fact, int))

    def number(self, fact: str) -> float:
        """Return a number of the header; raises as `integer`."""
        return self._read(fact, float)

    def _read(self, fact: str, kind: Callable):
        try:
            return kind(self.facts[fact])
        except (KeyError, ValueError):
            given = self.facts.get(fact)
            raise ValueError(f"the header of {self.path} says {fact} = {given!r}. Use a whole file") from None

    def check_model(self, family: Family) -> None:
        """Compare the model that the modules were trained on with this one; warn if only its weights differ.

        Raises:
            ValueError: a model of another width or depth.
        """
        config = family.decoder.config
        for fact, mine in (("hidden", config.hidden_size), ("n_layers", family.n_layers)):
            if self.integer(fact) != mine:
                what = "width" if fact == "hidden" else "number of layers"
                raise ValueError(
                    f"{self.path} is for language models of {what} {self.integer(fact)}, this one has {mine}. Use "
                    "modules that were trained for this model"
                )
        own = fingerprint(family.outer)
        if own is not None and own != self.facts.get("fingerprint"):
            warnings.warn(
                f"{self.path} was trained on a model with other weights (fingerprint {self.facts.get('fingerprint')}, "
                f"this one {own}). Train modules on this model to compare with published results",
                stacklevel=2,
            )


def fingerprint(model: nn.Module) -> str | None:
    """Return 16 hexadecimal digits that tell models apart by 16 values of every weight, rounded to bfloat16.

    Those of a float32 model and of the same in bfloat16 are equal. None = the weights have no values (meta device).
    """
    digest = hashlib.sha256()
    for weight in model.parameters():
        if weight.is_meta:
            return None
        values = weight.detach().flatten()
        values = values[:: max(1, values.numel() // _SAMPLES)][:_SAMPLES].to("cpu", torch.bfloat16)
        digest.update(f"{tuple(weight.shape)}".encode())
        digest.update(values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def shipped(method: str, option: str, family: Family) -> ModulesFile:
    """Return the file of a method's modules that is shipped for a model.

    Args:
        method: whose.
        option: of the method that names another file.
        family: the model. Its weights decide, where it has none (meta device) its sizes.

    Raises:
        ValueError: nothing is shipped for it.
    """
    folder = Path(str(resources.files("sparsevlm.mini"))) / "weights" / "modules"
    file = read_modules(folder / f"{method}.safetensors", method)
    mine = fingerprint(family.outer)
    sizes = (str(family.decoder.config.hidden_size), str(family.n_layers))
    fits = (
        (file.facts["hidden"], file.facts["n_layers"]) == sizes if mine is None else mine == file.facts["fingerprint"]
    )
    if not fits:
        raise ValueError(
            f"method {method!r} is trained, and modules are shipped for the model `mini` only. Use {option}=<file>, or "
            f"make one: python -m sparsevlm.mini.training.modules {method}"
        )
    return file


def write_modules(path: str | os.PathLike, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> Path:
    """Write a file of modules in bfloat16; it appears complete or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    stored = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(stored, draft, {"format": FORMAT, **{key: str(value) for key, value in facts.items()}})
    draft.chmod(0o644)  # safetensors makes it private
    os.replace(draft, path)
    return path


def read_modules(path: str | os.PathLike, method: str) -> ModulesFile:
    """Read a file of modules.

    Raises:
        FileNotFoundError: there is none.
        ValueError: another file, a damaged one, or one of another method.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of modules {str(path)!r}. Give the path of a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is damaged or no safetensors file ({reason}). Use a whole file of modules") from None
    if facts.get("format") != FORMAT:
        raise ValueError(
            f"{path} is no file of modules (format {facts.get('format')!r} instead of {FORMAT!r}). Use one that "
            f"python -m sparsevlm.mini.training.modules {method} wrote"
        )
    if facts.get("method") != method:
        raise ValueError(f"{path} holds modules of {facts.get('method')}, not of {method}. Use a file of this method")
    return ModulesFile(path, facts, tensors)
