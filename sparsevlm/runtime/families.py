"""Where things are in a model: the module that sees `input_ids`, the decoder, its projections. One place to extend."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsevlm.runtime.network import Network

TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen3")
VISION_LANGUAGE_MODELS = ("llava", "video_llava")
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Family:
    """The parts of a model that the hooks need.

    Attributes:
        outer: module whose forward receives `input_ids` and pixels (the decoder itself for a plain text model).
        decoder: the text model: `.layers`, `.rotary_emb`, `.config`.
        visual_ids: ids of the placeholder tokens of images and videos; empty for a plain text model.
        rotate_half: the family's, of its rotary embedding.
    """

    outer: Network
    decoder: Network
    visual_ids: tuple[int, ...]
    rotate_half: Callable

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary embedding of [B, H, N, d] by tables [B, N, d], as the family's apply_rotary_pos_emb."""
        return torch.addcmul(x * cos[:, None], self.rotate_half(x), sin[:, None])

    @property
    def n_layers(self) -> int:
        return len(self.decoder.layers)

    @property
    def sliding(self) -> bool:
        """Whether any layer has a sliding window."""
        return any(self.window(layer) is not None for layer in range(self.n_layers))

    def window(self, layer: int) -> int | None:
        """Sliding window of a layer in tokens, None = full attention."""
        config = self.decoder.config
        types = getattr(config, "layer_types", None)
        if types is not None:
            return config.sliding_window if types[layer] == "sliding_attention" else None
        return getattr(config, "sliding_window", None)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a `peft.PeftModel`, whose adapters are in place there.

    Raises:
        ValueError: the wrapper adds tokens to prompts (prompt learning).
    """
    base = getattr(model, "get_base_model", None)
    if not callable(base):
        return model
    active = getattr(model, "active_peft_config", None)
    if getattr(active, "is_prompt_learning", False):
        raise ValueError(
            f"{type(model).__name__} adds virtual tokens to each prompt ({active.peft_type}), which pruning cannot "
            "tell from the prompt's own; use an adapter that changes weights (LoRA, ...), or the model inside it"
        )
    return base()


def locate(model: nn.Module) -> Family:
    """Find the parts of a supported model.

    Raises:
        ValueError: an unsupported model, saying why; nothing is installed.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind in VISION_LANGUAGE_MODELS:
        outer = model if hasattr(model, "language_model") else model.model
        decoder = outer.language_model
        ids = [getattr(config, n, None) for n in ("image_token_id", "video_token_id")]
        visual_ids = tuple(i for i in ids if i is not None)
    elif kind in TEXT_MODELS:
        decoder = model if hasattr(model, "layers") else model.model
        outer, visual_ids = decoder, ()
    else:
        raise ValueError(
            f"models of type {kind!r} are not supported. Supported: {', '.join(VISION_LANGUAGE_MODELS)} over "
            f"{', '.join(TEXT_MODELS)}, and these text models by themselves (with visual_mask=)." + _reason(config)
        )
    text_kind = decoder.config.model_type
    if text_kind not in TEXT_MODELS:
        raise ValueError(
            f"the text model {text_kind!r} is not supported; supported: {', '.join(TEXT_MODELS)}."
            + _reason(decoder.config)
        )
    attention = decoder.layers[0].self_attn
    missing = [p for p in PROJECTIONS if not hasattr(attention, p)]
    if missing:
        raise ValueError(f"the attention of {text_kind!r} has no {', '.join(missing)} (fused projections?)")
    rotate_half = getattr(sys.modules[type(attention).__module__], "rotate_half", None)
    if rotate_half is None:
        raise ValueError(f"no rotary position embedding found for {text_kind!r}")
    return Family(outer, decoder, visual_ids, rotate_half)


def _reason(config) -> str:
    """What is known to stand in the way, for the error message."""
    text = getattr(config, "text_config", None) or config
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if isinstance(rope, dict) and "mrope_section" in rope:
        return " Its rotary embedding has several axes (M-RoPE), which renumbering and scoring do not handle yet."
    if str(getattr(text, "model_type", "")).startswith("phi3"):
        return " Its query, key and value projections are fused, which scoring does not handle yet."
    return ""
