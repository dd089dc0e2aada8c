"""load(): the same path for the embedded model and checkpoints laid out like the real ones."""

import json
import shutil

import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sparsevlm
from sparsevlm.models import n_visual_tokens
from tests import hub_layout

PICTURE = Image.radial_gradient("L").convert("RGB")


def stored(folder) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint under the hub's names."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}
    return tensors


@pytest.mark.parametrize("fixture", ["tiny_llava_folder", "tiny_video_llava_folder"])
def test_every_stored_weight_is_in_the_model(fixture, request):
    folder = request.getfixturevalue(fixture)
    model, _ = sparsevlm.load(folder)
    loaded, tensors = {hub_layout._hub_name(k): v for k, v in model.state_dict().items()}, stored(folder)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name].float()) for name in tensors)
    assert not model.training


def test_mini_goes_the_same_way_and_generates():
    model, processor = sparsevlm.load("mini")
    assert isinstance(model, transformers.LlavaForConditionalGeneration)
    assert model.dtype == torch.float32 and n_visual_tokens(model) == 576
    inputs = processor(text="what digit is red ?", images=PICTURE)
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert processor.decode(out[0, inputs["input_ids"].shape[1] :]).strip()


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")  # the hub's bars are switched off for all tests
def test_mini_loads_without_a_progress_bar_and_leaves_the_setting(monkeypatch, capfd):
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", True)
    sparsevlm.load("mini")
    assert "Loading weights" not in capfd.readouterr().err
    assert transformers.utils.logging.is_progress_bar_enabled()


@pytest.mark.parametrize("processor_config", ["full", "nulls", None])
def test_7b_of_every_age(tmp_path, processor_config):
    folder = hub_layout.save_llava_7b(tmp_path, layers=2, processor_config=processor_config)
    model, processor = sparsevlm.load(folder)
    inputs = processor(text="Is there a cat?", images=PICTURE)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 576 == n_visual_tokens(model)
    out = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 2
    assert (out[0, :-2] == inputs["input_ids"][0]).all()


def test_13b(tmp_path):
    folder = hub_layout.save_llava_13b(tmp_path)
    assert len(list(folder.glob("*.safetensors"))) == 6
    model, processor = sparsevlm.load(folder)
    assert model.config.text_config.num_hidden_layers == 40
    assert torch.isfinite(model(**processor(text="Is there a cat?", images=PICTURE)).logits).all()


def test_video_llava(tiny_video_llava_folder):
    model, processor = sparsevlm.load(tiny_video_llava_folder)
    assert (n_visual_tokens(model), n_visual_tokens(model, "video")) == (256, 8 * 257)
    inputs = processor(text=["Is there a cat?", "What?"], images=[PICTURE, None], videos=[None, [PICTURE] * 3])
    assert torch.isfinite(model(**inputs).logits).all()  # the model checks the numbers of placeholders itself
    out = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    assert out.shape == (2, inputs["input_ids"].shape[1] + 2)


def test_n_visual_tokens(tiny_llava_folder):
    config = transformers.LlavaConfig.from_pretrained(tiny_llava_folder)
    config.vision_feature_select_strategy = "full"
    assert n_visual_tokens(config) == 577
    with pytest.raises(ValueError, match="'llava' takes no input of kind 'video'"):
        n_visual_tokens(config, "video")


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, torch.float32),
        ("auto", torch.float16),
        ("bfloat16", torch.bfloat16),
        (torch.float16, torch.float16),
    ],
)
def test_dtype(tiny_llava_folder, dtype, expected):
    assert sparsevlm.load(tiny_llava_folder, dtype=dtype)[0].dtype == expected


def test_attention_backend(tiny_llava_folder):
    assert sparsevlm.load(tiny_llava_folder)[0].config.text_config._attn_implementation == "sdpa"
    eager, _ = sparsevlm.load(tiny_llava_folder, attn_implementation="eager")
    assert eager.config.text_config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp16"}, "unknown dtype 'fp16'; known: auto, float32, float16, bfloat16"),
        ({"device": "gpu"}, "unknown device 'gpu'; use 'cpu', 'cuda'"),
        ({"device": "cuda:99"}, "no device 'cuda:99': torch sees"),
        ({"prompt": "vicuna"}, "unknown prompt 'vicuna'; known: hub, vicuna_v1, llava_v1"),
        ({"image_aspect_ratio": "square"}, "unknown image_aspect_ratio 'square'; known: crop, pad"),
    ],
)
def test_options_are_checked_before_anything_is_read(options, message):
    with pytest.raises(ValueError, match=message):
        sparsevlm.load("no such model", **options)


def test_missing_weights_are_never_made_up(tiny_llava_folder, tmp_path):
    folder = shutil.copytree(tiny_llava_folder, tmp_path / "copy")
    name = "multi_modal_projector.linear_1.weight"
    file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights of Llava.*linear_1.weight.*download it again"):
        sparsevlm.load(folder)


@pytest.mark.gpu
def test_on_a_gpu_the_checkpoints_own_dtype(tiny_llava_folder):
    model, processor = sparsevlm.load(tiny_llava_folder, device="cuda")
    assert (model.device.type, model.dtype) == ("cuda", torch.float16)
    inputs = processor(text="Is there a cat?", images=PICTURE).to("cuda")
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 1
