"""Where things are in a model: the module that sees `input_ids`, the decoder, its projections. One place to extend."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsevlm.runtime.network import Network

TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen3")  # also by themselves, with visual_mask=
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Record:
    """What is known of a vision-language model by its `model_type`.

    Attributes:
        text: the text models that it may contain.
        towers: attributes of the outer module that are vision towers, and what they encode.
        grid: whether a picture is a square grid of patches of which the projector makes one row per placeholder, in
            order. What acts in the tower or the projector counts on it; elsewhere rows are laid out anew afterwards
            (tiles, line breaks, merged patches), and such a method would be wrong.
        title: what users call it.
        axes: position ids of a token: 3 (time, row, column) with M-RoPE, else 1.
    """

    text: tuple[str, ...]
    towers: dict[str, str]
    grid: bool
    title: str
    axes: int = 1


_CLIP, _VISUAL = {"vision_tower": "image"}, {"visual": "image"}
RECORDS = {
    "llava": Record(TEXT_MODELS, _CLIP, True, "LLaVA-1.5"),
    "video_llava": Record(TEXT_MODELS, {"image_tower": "image", "video_tower": "video"}, True, "Video-LLaVA"),
    "llava_next": Record(TEXT_MODELS, _CLIP, False, "LLaVA-NeXT"),
    "llava_onevision": Record(TEXT_MODELS, _CLIP, False, "LLaVA-OneVision"),
    "internvl": Record(TEXT_MODELS, _CLIP, False, "InternVL3"),
    "qwen2_vl": Record(("qwen2_vl_text",), _VISUAL, False, "Qwen2-VL", axes=3),
    "qwen2_5_vl": Record(("qwen2_5_vl_text",), _VISUAL, False, "Qwen2.5-VL", axes=3),
    "qwen3_vl": Record(("qwen3_vl_text",), _VISUAL, False, "Qwen3-VL", axes=3),
}
#: Why models with such layers (Qwen3.5) are refused.
RUNNING_STATE = (
    " Some of its layers keep a running state instead of keys and values (linear attention): a dropped token would "
    "live on there, so dropping it is not the same as hiding it."
)


@dataclass(frozen=True)
class Family:
    """The parts of a model that the hooks need.

    Attributes:
        outer: module whose forward receives `input_ids` and pixels (the decoder itself for a plain text model).
        decoder: the text model: `.layers`, `.rotary_emb`, `.config`.
        visual_ids: ids of the placeholder tokens of images and videos; empty for a plain text model.
        rotate_half: the family's, of its rotary embedding.
        model: the model itself, with its output head if it has one.
        record: of a vision-language model; None for a plain text model.
    """

    outer: Network
    decoder: Network
    visual_ids: tuple[int, ...]
    rotate_half: Callable
    model: Network
    record: Record | None = None

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary embedding of [B, H, N, d] by tables [B, N, d], as the family's apply_rotary_pos_emb."""
        return torch.addcmul(x * cos[:, None], self.rotate_half(x), sin[:, None])

    @property
    def n_layers(self) -> int:
        return len(self.decoder.layers)

    @property
    def axes(self) -> int:
        """Position ids of a token; see `Record`."""
        return 1 if self.record is None else self.record.axes

    @property
    def injections(self) -> int:
        """Layers after which the text model adds further features to visual tokens (DeepStack): the first ones."""
        if not hasattr(self.decoder, "_deepstack_process"):
            return 0
        return len(self.outer.config.vision_config.deepstack_visual_indexes)

    def positions_after(self, method, layer: int) -> str:
        """`method.positions_after(layer)`; "original" where positions have several axes, which have no next number."""
        return method.positions_after(layer) if self.axes == 1 else "original"

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
    record = RECORDS.get(kind)
    if record is not None:
        outer = model if hasattr(model, "language_model") else model.model
        decoder = outer.language_model
        ids = [getattr(config, n, None) for n in ("image_token_id", "video_token_id")]
        visual_ids = tuple(i for i in ids if i is not None)
    elif kind in TEXT_MODELS:
        decoder = model if hasattr(model, "layers") else model.model
        outer, visual_ids = decoder, ()
    else:
        raise ValueError(
            f"models of type {kind!r} are not supported.{_reason(config)} Use one of {', '.join(RECORDS)}, or a "
            f"text model by itself with visual_mask= ({', '.join(TEXT_MODELS)})"
        )
    text_kind, known = decoder.config.model_type, TEXT_MODELS if record is None else record.text
    if text_kind not in known:
        raise ValueError(
            f"the text model {text_kind!r} is not supported in a model of type {kind!r}.{_reason(decoder.config)} Use "
            f"one over {', '.join(known)}"
        )
    attention = decoder.layers[0].self_attn
    missing = [p for p in PROJECTIONS if not hasattr(attention, p)]
    if missing:
        raise ValueError(f"the attention of {text_kind!r} has no {', '.join(missing)} (fused projections?)")
    rotate_half = getattr(sys.modules[type(attention).__module__], "rotate_half", None)
    if rotate_half is None:
        raise ValueError(f"no rotary position embedding found for {text_kind!r}")
    family = Family(outer, decoder, visual_ids, rotate_half, model, record)
    if family.injections >= family.n_layers:
        raise ValueError(
            f"this {kind!r} model adds visual features after {family.injections} layers and has {family.n_layers}: "
            "pruning needs a layer that follows. Use a deeper model"
        )
    return family


def _rope(config) -> dict:
    """Parameters of the rotary embedding of a text model."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return rope if isinstance(rope, dict) else {}


def _reason(config) -> str:
    """What is known to stand in the way, for the error message."""
    text = getattr(config, "text_config", None) or config
    if "linear_attention" in (getattr(text, "layer_types", None) or ()):
        return RUNNING_STATE
    if "mrope_section" in _rope(text):
        return " Its rotary embedding has several axes (M-RoPE), which are followed in the Qwen models named here only."
    if str(getattr(text, "model_type", "")).startswith("phi3"):
        return " Its query, key and value projections are fused, which scoring does not handle yet."
    return ""
