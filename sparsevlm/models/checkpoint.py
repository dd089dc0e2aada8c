"""From a name to a complete local folder: aliases, hub ids and paths, and everything that can be wrong with them."""

from __future__ import annotations

import difflib
import json
import os
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from sparsevlm.runtime.families import RECORDS, RUNNING_STATE

EMBEDDED = ("mini", "mini-video", "mini-guide")
HUB_ALIASES = {
    "llava-1.5-7b": "llava-hf/llava-1.5-7b-hf",
    "llava-1.5-13b": "llava-hf/llava-1.5-13b-hf",
    "video-llava-7b": "LanguageBind/Video-LLaVA-7B-hf",
    "llava-next-7b": "llava-hf/llava-v1.6-vicuna-7b-hf",
    "llava-onevision-7b": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "internvl3-8b": "OpenGVLab/InternVL3-8B-hf",
    "qwen2-vl-7b": "Qwen/Qwen2-VL-7B-Instruct",
    "qwen2.5-vl-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen3-vl-8b": "Qwen/Qwen3-VL-8B-Instruct",
}
#: model_type of config.json -> class of transformers that loads it.
FAMILIES = {
    "llava": "LlavaForConditionalGeneration",
    "video_llava": "VideoLlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
}

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
#: What of a hub repository is fetched; nothing in folders below.
CHECKPOINT_FILES = ("*.json", "*.jinja", "*.safetensors", "tokenizer.model")
_INDEX = "model.safetensors.index.json"


def find_checkpoint(name: str | os.PathLike, revision: str | None = None) -> Path:
    """The folder of a checkpoint, complete and of a supported family; downloads from the hub if need be.

    Args:
        name: an alias (it wins over a folder of the same name: write ``./mini`` for that), a folder, or a hub id.
        revision: branch, tag or commit of a hub repository.

    Raises:
        FileNotFoundError: no such alias, folder, repository or revision, or files of the checkpoint are missing.
        ValueError: a model family or a weight format that is not supported, or a damaged file.
        PermissionError: the repository is gated or private.
        ConnectionError: the hub cannot be reached and the checkpoint is not in the local cache.
    """
    name = os.fspath(name)
    repository = HUB_ALIASES.get(name)
    if repository is None:
        folder = _local_folder(name)
        if folder is not None:
            if revision is not None:
                raise ValueError(
                    f"revision={revision!r} is for hub ids; {name!r} is a local folder: leave revision out"
                )
            check_family(folder, name)
            check_weights(folder, name)
            return folder
        repository = name
    # The configuration first: a wrong family is told before gigabytes are fetched.
    check_family(_download(repository, name, revision, ["config.json"]), name)
    folder = _download(repository, name, revision, list(CHECKPOINT_FILES))
    check_weights(folder, name)
    return folder


def _local_folder(name: str) -> Path | None:
    """The folder that `name` means, None if it must be a hub id."""
    if name in EMBEDDED:
        return _embedded_folder(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise FileNotFoundError(f"{name!r} is a file; give the checkpoint's folder ({str(path.parent)!r})")
    if _HUB_ID.fullmatch(name) and not name.startswith("."):
        return None
    known = [*EMBEDDED, *HUB_ALIASES]
    if os.sep in name or name.startswith(("~", ".")):
        raise FileNotFoundError(f"there is no checkpoint folder {name!r}; check the path (it must hold config.json)")
    near = difflib.get_close_matches(name, known, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise FileNotFoundError(
        f"unknown model {name!r}.{hint} Known names: {', '.join(known)}; or give a hub id (org/name) or a local folder"
    )


def _embedded_folder(name: str) -> Path:
    from sparsevlm.mini import weights_dir

    try:
        folder = Path(weights_dir(name))
    except ValueError:  # weights_dir knows no such checkpoint
        folder = None
    if folder is None or not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"the weights of the embedded model {name!r} are missing from this installation; reinstall sparsevlm"
        )
    return folder


def _download(repository: str, name: str, revision: str | None, files: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    label = repository if repository == name else f"{repository} ({name})"
    manual = "or download it elsewhere and give its folder"
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=files, ignore_patterns=["*/*"]))
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"{label} is gated: accept its licence on the hub and log in (`hf auth login` or HF_TOKEN), {manual}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{label} has no revision {revision!r}; leave revision out for the newest") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no local folder {name!r} and no hub repository {repository!r} that you can read; check the "
            "spelling, and log in (`hf auth login` or HF_TOKEN) if it is private"
        ) from error
    except errors.IncompleteSnapshotError as error:
        raise ConnectionError(
            f"{label} is in the local cache only in part and the hub cannot be reached; go online (unset "
            f"HF_HUB_OFFLINE) to fetch the rest, {manual}"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{label} is neither a local folder nor in the local cache, and the hub cannot be reached; go online "
            f"(unset HF_HUB_OFFLINE), {manual}"
        ) from error
    except (errors.HfHubHTTPError, ConnectionError) as error:
        raise ConnectionError(f"download of {label} failed ({_first_line(error)}); try again, {manual}") from error


def check_family(folder: Path, name: str) -> str:
    """The class of transformers that loads a checkpoint.

    Raises:
        FileNotFoundError: no config.json.
        ValueError: config.json cannot be read, or the family is not supported.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{name!r} has no config.json: {folder} is not a checkpoint folder")
    config = read_json(path)
    kind, made_for = config.get("model_type"), " ".join(config.get("architectures") or [])
    supported = f"supported: {', '.join(FAMILIES)} (for example {HUB_ALIASES['llava-1.5-7b']})"
    if "LlavaLlamaForCausalLM" in made_for:
        raise ValueError(
            f"{name!r} is in the original authors' format ({made_for}); use its conversion for transformers; "
            + supported
        )
    if kind not in FAMILIES:
        layers = (config.get("text_config") or config).get("layer_types") or ()
        reason = RUNNING_STATE if "linear_attention" in layers else ""
        raise ValueError(f"{name!r} is a model of type {kind!r}, which cannot be loaded here; {supported}.{reason}")
    tower = (config.get("vision_config") or {}).get("model_type", "clip_vision_model")
    if RECORDS[kind].grid and tower != "clip_vision_model":
        raise ValueError(f"{name!r} has a vision tower of type {tower!r}; supported: clip_vision_model")
    return FAMILIES[kind]


def check_weights(folder: Path, name: str) -> list[Path]:
    """The weight files of a checkpoint, all there and whole (only headers are read).

    Raises:
        FileNotFoundError: no weights, or a file that the index names is missing.
        ValueError: weights only as pickles, a file cut short, or a git-lfs pointer instead of a file.
    """
    index = folder / _INDEX
    if index.is_file():
        files = sorted(set(read_json(index)["weight_map"].values()))
        missing = [f for f in files if not (folder / f).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{name!r} is incomplete: {len(missing)} of {len(files)} weight files are missing "
                f"({', '.join(missing)}); download it again into {folder}"
            )
    else:
        files = [f for f in ("model.safetensors",) if (folder / f).is_file()]
    if not files:
        pickles = any(folder.glob("*.bin")) or any(folder.glob("*.bin.index.json"))
        if pickles:
            raise ValueError(
                f"{name!r} has its weights only as .bin files, which can run code when opened and are never loaded; "
                "take a revision with .safetensors files or convert it (safetensors.torch.save_file)"
            )
        raise FileNotFoundError(
            f"{name!r} has no weights: neither model.safetensors nor {_INDEX} in {folder}; download them (only "
            "safetensors are loaded)"
        )
    paths = [folder / f for f in files]
    for path in paths:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            reason = _first_line(error)
            with path.open("rb") as file:
                if file.read(7) == b"version":
                    reason = "it is a git-lfs pointer: run `git lfs pull`"
            raise ValueError(
                f"{path.name} of {name!r} is damaged ({reason}); delete it and download it again"
            ) from error
    return paths


def read_json(path: Path) -> dict:
    """The content of a JSON file of a checkpoint; ValueError naming the file if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (it holds no keys); download it again")
    return content


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a checkpoint.

    Raises:
        ValueError: values that its family does not take.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        vision = config.vision_config
        for key in ("image_size", "patch_size") if RECORDS[config.model_type].grid else ():
            if not isinstance(getattr(vision, key), int) or getattr(vision, key) < 1:
                raise ValueError(f"vision_config.{key} must be an integer of 1 or more, not {getattr(vision, key)!r}")
    except Exception as error:  # transformers checks types with errors of its own, and some values not at all
        reason = re.sub(r"\b\w*Error: ", "", " ".join(str(error).split())).replace("NoneType", "null")
        raise ValueError(f"{folder / 'config.json'} is damaged ({reason}); download it again") from error
    return config


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
