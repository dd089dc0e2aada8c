"""Finding and reading recordings, and making the model and the prompt that a run was recorded with.

Tests that compare with recordings carry the marker `recordings` and make one test of each file that they find:
`@pytest.mark.parametrize("path", files("cases"), ids=stem)`.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.goldens import recipe

#: The recordings that come with the tests.
SHIPPED = Path(__file__).parent


def folder() -> Path:
    """Folder of the recordings: the environment variable SPARSEVLM_GOLDENS, by default those that come with the tests.

    Raises:
        FileNotFoundError: the variable names no folder.
    """
    chosen = Path(os.environ.get("SPARSEVLM_GOLDENS") or SHIPPED)
    if not chosen.is_dir():
        raise FileNotFoundError(f"SPARSEVLM_GOLDENS={chosen} is no folder; unset it for the recordings in {SHIPPED}")
    return chosen


def files(kind: str, pattern: str = "*.npz") -> list[Path]:
    """Recordings in the subfolder `kind` ("cases", "peers", "eval", ...), by name; none without such a folder."""
    return sorted((folder() / kind).glob(pattern))


def stem(path: Path) -> str:
    """The id of a recording's test."""
    return path.stem


@lru_cache(maxsize=1)
def recording(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Facts about a run, and its arrays (described in README.md)."""
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    return json.loads(str(arrays.pop("meta"))), arrays


@lru_cache(maxsize=4)
def llama(config: str, seed: int, qk_scale: float = 1.0, sha256: str | None = None) -> LlamaForCausalLM:
    """The model of a recording."""
    arguments = dict(recipe.CONFIGS[config])
    rope = {"rope_type": "default", "rope_theta": arguments.pop("rope_theta")}
    model = LlamaForCausalLM(
        LlamaConfig(**arguments, rope_parameters=rope, bos_token_id=1, eos_token_id=None, tie_word_embeddings=False)
    )
    weights = recipe.llama_state_dict(config, seed, qk_scale)
    assert sha256 in (None, recipe.sha256_of(weights))
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    model.generation_config.pad_token_id = 0
    return model.eval()


def prompt(
    config: str, seed: int, before: int, n_visual: int, n_text: int, sha256: str | None = None
) -> tuple[Tensor, Tensor]:
    """Embeddings [1, L, D] and the mask of the visual ones [1, L]."""
    embeds = recipe.inputs_embeds(config, seed, before, n_visual, n_text)
    assert sha256 in (None, recipe.sha256_of(embeds))
    visual = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    visual[:, before : before + n_visual] = True
    return torch.from_numpy(embeds), visual


def recorded_model_and_prompt(meta: dict) -> tuple[LlamaForCausalLM, Tensor, Tensor]:
    """Model, embeddings and visual mask of a recording, checked against its hashes."""
    model = llama(meta["config"], meta["seed"], meta.get("qk_scale", 1.0), meta["weights_sha256"])
    shape = meta["pre"], meta["n_vis"], meta["n_text"]
    return model, *prompt(meta["config"], meta["seed"], *shape, meta["embeds_sha256"])
