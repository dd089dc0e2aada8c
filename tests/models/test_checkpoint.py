"""From a name to a folder: every way to name a checkpoint, and every way it can be unusable."""

import json
import shutil

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from sparsevlm.models.checkpoint import HUB_ALIASES, check_family, check_weights, find_checkpoint


@pytest.fixture
def copy(tiny_llava_folder, tmp_path):
    """A copy of the tiny checkpoint to damage."""
    return shutil.copytree(tiny_llava_folder, tmp_path / "copy")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """An empty hub cache, offline (conftest.py)."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put_in_cache(cache, repository, folder):
    base = cache / f"models--{repository.replace('/', '--')}"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text("a" * 40)
    return shutil.copytree(folder, base / "snapshots" / ("a" * 40))


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_local_folders(tiny_llava_folder, tiny_video_llava_folder, monkeypatch):
    assert find_checkpoint(tiny_llava_folder) == find_checkpoint(str(tiny_llava_folder)) == tiny_llava_folder
    assert check_family(tiny_llava_folder, "") == "LlavaForConditionalGeneration"
    assert check_family(tiny_video_llava_folder, "") == "VideoLlavaForConditionalGeneration"
    assert len(check_weights(tiny_llava_folder, "")) == 3
    monkeypatch.chdir(tiny_llava_folder.parent)
    assert find_checkpoint(tiny_llava_folder.name).samefile(tiny_llava_folder)


def test_mini():
    assert (find_checkpoint("mini") / "model.safetensors").is_file()


@pytest.mark.parametrize("name", [*HUB_ALIASES, "someone/tiny"])
def test_hub_ids_and_aliases_come_from_the_cache(name, tiny_llava_folder, empty_cache):
    snapshot = put_in_cache(empty_cache, HUB_ALIASES.get(name, name), tiny_llava_folder)
    assert find_checkpoint(name).samefile(snapshot)
    assert find_checkpoint(name, revision="a" * 40).samefile(snapshot)


def test_wrong_family_is_told_before_the_weights_are_fetched(tiny_llava_folder, monkeypatch, tmp_path):
    fetched = []

    def snapshot_download(repository, revision, allow_patterns, ignore_patterns):
        fetched.append((repository, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    (tmp_path / "config.json").write_text('{"model_type": "gemma3"}')
    with pytest.raises(ValueError, match="'gemma3'"):
        find_checkpoint("org/name", revision="v1")
    assert fetched == [("org/name", "v1", ["config.json"])]
    shutil.copytree(tiny_llava_folder, tmp_path, dirs_exist_ok=True)
    assert find_checkpoint("org/name") == tmp_path
    assert not any("bin" in pattern or "*.py" in pattern for pattern in fetched[-1][2])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lava-1.5-7b", "Did you mean 'llava-1.5-7b'.*Known names: mini, mini-video, .*hub id .* or a local folder"),
        ("./nowhere", "no checkpoint folder './nowhere'"),
        ("/nowhere/at/all", "no checkpoint folder"),
        ("~/nowhere", "no checkpoint folder"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(FileNotFoundError, match=message):
        find_checkpoint(name)


def test_embedded_weights_that_are_missing(monkeypatch, tmp_path):
    import sparsevlm.mini

    monkeypatch.setattr(sparsevlm.mini, "weights_dir", lambda name: tmp_path / name)
    for name in ("mini", "mini-video"):
        with pytest.raises(FileNotFoundError, match=f"'{name}' are missing from this installation; reinstall"):
            find_checkpoint(name)


def test_file_instead_of_folder(copy):
    with pytest.raises(FileNotFoundError, match="is a file; give the checkpoint's folder"):
        find_checkpoint(copy / "config.json")


def test_revision_is_for_the_hub(copy):
    with pytest.raises(ValueError, match="leave revision out"):
        find_checkpoint(copy, revision="main")


def test_a_family_that_cannot_be_pruned_is_told_with_the_reason(monkeypatch, tmp_path):
    text = {"model_type": "qwen3_5_text", "layer_types": ["linear_attention", "full_attention"]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": text}))
    with pytest.raises(ValueError, match="'qwen3_5', which cannot be loaded here.*keep a running state"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gemma3", None])
def test_unsupported_family(copy, kind):
    edit(copy / "config.json", model_type=kind)
    with pytest.raises(ValueError, match="supported: llava, video_llava, .*qwen3_vl .*llava-hf/llava-1.5-7b-hf"):
        find_checkpoint(copy)


def test_the_authors_own_format(copy):
    edit(copy / "config.json", architectures=["LlavaLlamaForCausalLM"])
    with pytest.raises(ValueError, match="original authors' format.*conversion.*llava-hf/llava-1.5-7b-hf"):
        find_checkpoint(copy)


def test_unsupported_vision_tower(copy):
    edit(copy / "config.json", vision_config={"model_type": "pixtral"})
    with pytest.raises(ValueError, match="'pixtral'; supported: clip_vision_model"):
        find_checkpoint(copy)


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        find_checkpoint(tmp_path)


def test_damaged_config(copy):
    (copy / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match="config.json is damaged .*download it again"):
        find_checkpoint(copy)


def test_missing_shard(copy, empty_cache):
    (copy / "model-00002-of-00003.safetensors").unlink()
    message = r"incomplete: 1 of 3 weight files are missing \(model-00002-of-00003.safetensors\); download it again"
    with pytest.raises(FileNotFoundError, match=message):
        find_checkpoint(copy)
    put_in_cache(empty_cache, "someone/tiny", copy)
    with pytest.raises(FileNotFoundError, match=message):
        find_checkpoint("someone/tiny")


def test_shard_cut_short(copy):
    shard = copy / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="model-00003-of-00003.safetensors.* is damaged .*delete it and download"):
        find_checkpoint(copy)


def test_git_lfs_pointer(copy):
    (copy / "model-00001-of-00003.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        find_checkpoint(copy)


def test_only_pickles(copy):
    for file in copy.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="no weights"):
        find_checkpoint(copy)
    (copy / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ValueError, match="only as .bin files.*never loaded.*convert"):
        find_checkpoint(copy)


def test_no_network(empty_cache):
    with pytest.raises(
        ConnectionError, match=r"llava-hf/llava-1.5-7b-hf \(llava-1.5-7b\) is neither .*give its folder"
    ):
        find_checkpoint("llava-1.5-7b")


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (errors.GatedRepoError, PermissionError, "org/name is gated: accept its licence on the hub and log in"),
        (errors.RepositoryNotFoundError, FileNotFoundError, "no local folder 'org/name' and no hub repository"),
        (errors.RevisionNotFoundError, FileNotFoundError, "no revision 'v9'"),
        (errors.HfHubHTTPError, ConnectionError, "download of org/name failed .503 Server Error.; try again"),
        (lambda m, response: errors.IncompleteSnapshotError(m, "x"), ConnectionError, "only in part.*go online"),
    ],
)
def test_hub_refusals(monkeypatch, error, kind, message):
    class Response:
        headers, request = {}, None

    def refuse(*_, **__):
        raise error("503 Server Error\nmore", response=Response())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(kind, match=message) as caught:
        find_checkpoint("org/name", revision="v9")
    assert "\n" not in str(caught.value)
