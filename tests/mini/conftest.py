"""Caches of the hub libraries go to a temporary folder."""

import os
import tempfile

if "HF_HOME" not in os.environ:
    _home = tempfile.TemporaryDirectory(prefix="hf-home-")  # removed at exit
    os.environ["HF_HOME"] = _home.name

import pytest  # noqa: E402

import sparsevlm.mini  # noqa: E402  first: makes transformers importable beside a CPU-only torch


@pytest.fixture(scope="session")
def processor():
    """The processor of the shipped checkpoint, loaded as that of a real one is."""
    from transformers import AutoTokenizer, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = sparsevlm.mini.weights_dir()
    config, _ = LlavaProcessor.get_processor_dict(folder)
    config.pop("processor_class", None)
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        chat_template=(folder / "chat_template.jinja").read_text(),
        patch_size=config["patch_size"],
        vision_feature_select_strategy=config["vision_feature_select_strategy"],
        num_additional_image_tokens=config["num_additional_image_tokens"],
    )
