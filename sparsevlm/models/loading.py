"""`load`: one path for the embedded model, the hub's checkpoints and local folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from sparsevlm.models.checkpoint import EMBEDDED, check_family, find_checkpoint, read_config
from sparsevlm.models.dynamic import DynamicProcessor
from sparsevlm.models.processor import Processor, check_options
from sparsevlm.runtime.families import RECORDS

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(
    name: str | os.PathLike,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device = "cpu",
    attn_implementation: str = "sdpa",
    revision: str | None = None,
    prompt: str = "hub",
    image_aspect_ratio: str = "crop",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> tuple[PreTrainedModel, Processor]:
    """Load a model, ready to generate, and its processor.

    The checkpoint must hold safetensors; no code of a checkpoint is ever run. By default prompts and pictures are as on
    the hub. LLaVA's and SparseVLM's papers evaluate pictures with ``prompt="vicuna_v1", image_aspect_ratio="pad"``,
    Video-LLaVA's and SparseVLM's videos with ``prompt="llava_v1"``. Frames of videos are always prepared as Video-LLaVA
    was trained (:func:`sparsevlm.models.pixels.clip_pixels`); the hub's processor differs.

    Args:
        name: "mini" (embedded), a name of `checkpoint.HUB_ALIASES` such as "llava-1.5-7b", a hub id or a local folder.
        dtype: "float32", "float16", "bfloat16", "auto" (the checkpoint's) or a torch dtype; None = float32 on the CPU,
            the checkpoint's elsewhere.
        device: where to put the model.
        attn_implementation: "sdpa", "eager", "flash_attention_2", ... as transformers names them.
        revision: branch, tag or commit of a hub repository.
        prompt: "hub" (the checkpoint's chat template), "vicuna_v1" or "llava_v1" (the authors' conversations, which
            open with a sentence about a curious user or a curious human).
        image_aspect_ratio: of pictures, "crop" (the hub's centre crop) or "pad" (to a square with the mean colour).
            Models whose visual tokens depend on the picture keep its shape, whatever this says, and refuse "pad".
        min_pixels, max_pixels: limits within which the Qwen models scale a picture, and InternVL cuts it into tiles;
            None = the checkpoint's. The same number twice gives all pictures as many tokens, to rounding.

    Raises:
        FileNotFoundError: unknown name, or files are missing.
        ValueError: unsupported model family or weight format, damaged files, or an option that is not known here.
        PermissionError, ConnectionError: the hub refuses or cannot be reached.
    """
    check_options(prompt, image_aspect_ratio)
    device = _device(device)
    dtype = _dtype(dtype, device)
    folder = find_checkpoint(name, revision)
    model_class = getattr(transformers, check_family(folder, str(name)))
    config = read_config(folder)
    processor = read_processor(
        folder,
        config,
        prompt=prompt,
        image_aspect_ratio=image_aspect_ratio,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
    )
    with _no_progress_bar() if name in EMBEDDED else nullcontext():
        model, report = model_class.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    if report["mismatched_keys"]:
        key, stored, expected = sorted(report["mismatched_keys"])[0]
        raise ValueError(
            f"{str(name)!r} has weights of other shapes than its config.json says ({key}: {list(stored)} instead of "
            f"{list(expected)}). Use the config.json that belongs to the weights"
        )
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would only warn and go on with random values
        raise ValueError(
            f"{str(name)!r} lacks {len(missing)} weights of {model_class.__name__} ({missing[0]}, ...): the checkpoint "
            "is incomplete or made for another model; download it again"
        )
    model = model.to(device).eval()
    broken = [key for key, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if broken:
        raise ValueError(
            f"{str(name)!r} has weights that are infinite or no numbers ({broken[0]}). Download the checkpoint again; "
            "use dtype='float32' or 'bfloat16' if they are larger than float16 can hold"
        )
    return model, processor


def read_processor(folder: Path, config: PreTrainedConfig, **options) -> Processor:
    """Return the processor of a checkpoint folder in the hub's layout.

    Args:
        options: `prompt`, `image_aspect_ratio`, `min_pixels` and `max_pixels`, as of :func:`load`.

    Raises:
        FileNotFoundError: tokenizer or image processor settings are missing.
        ValueError: settings that do not fit the model or each other, or unknown options.
    """
    check_options(options.get("prompt", "hub"), options.get("image_aspect_ratio", "crop"))
    options = {k: v for k, v in options.items() if k not in ("min_pixels", "max_pixels") or v is not None}
    kind = Processor if RECORDS[config.model_type].grid else DynamicProcessor
    return kind.from_folder(folder, config, **options)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """The embedded models load in milliseconds; transformers' bar would only be noise."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def _device(device: str | torch.device) -> torch.device:
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}; use 'cpu', 'cuda' or 'cuda:N'") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"no device {str(device)!r}: torch sees {torch.cuda.device_count()} CUDA devices; use 'cpu'")
    return device


def _dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype | str:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]
