import dataclasses
import json
import shutil
import sys
from pathlib import Path

import hydra
import pytest
import yaml
from omegaconf import OmegaConf

import sparsevlm
from eval.errors import UserError
from eval.runs.configs import CONFIGS
from eval.runs.settings import RunSettings, fingerprint, make_run
from eval.tasks import TASKS
from sparsevlm.methods import method_class
from sparsevlm.mini import weights_dir


def compose(*overrides: str) -> dict:
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = OmegaConf.to_container(hydra.compose("config", list(overrides)), resolve=True)
    config.pop("experiment")
    return config


def settle(*overrides: str) -> RunSettings:
    return make_run(compose(*overrides))


def names(group: str) -> list[str]:
    return sorted(p.stem for p in (CONFIGS / group).glob("*.yaml") if p.stem != "_base")


class TestConfigFiles:
    def test_every_method_has_a_file_with_its_options_and_defaults(self):
        assert names("method") == sparsevlm.methods()
        for name in sparsevlm.methods():
            listed = yaml.safe_load((CONFIGS / "method" / f"{name}.yaml").read_text())
            options = {f.name: f.default for f in dataclasses.fields(method_class(name)) if f.name != "budget"}
            assert listed == {"name": name, **json.loads(json.dumps(options))}, name  # YAML has lists, not tuples

    def test_every_task_can_be_chosen(self):
        assert all(compose(f"task={name}")["task"]["name"] == name for name in TASKS)

    def test_a_model_is_three_lines(self, tmp_path, monkeypatch):
        copy = Path(shutil.copytree(CONFIGS, tmp_path / "configs"))
        (copy / "model" / "mine.yaml").write_text("defaults: [_base]\nname: mine\npretrained: mini\n")
        monkeypatch.setattr(sys.modules[__name__], "CONFIGS", copy)
        mine, mini = settle("model=mine", "limit=2"), settle("limit=2")
        assert mine.model == dataclasses.replace(mini.model, name="mine")

    def test_a_model_without_a_name(self):
        with pytest.raises(UserError, match="model has no name.* Use model=<name> with a name of configs/model"):
            settle("model=_base")

    @pytest.mark.parametrize("name", names("model"))
    def test_models(self, name):
        config = compose(f"model={name}")
        assert config["model"]["name"] == name
        config["model"]["pretrained"] = "mini"  # the others' weights are not here
        assert make_run(config).model.image_aspect_ratio == "crop"

    def test_the_papers_setting(self):
        model = compose("experiment=llava_1_5_7b_paper")["model"]
        assert (model["pretrained"], model["prompt"], model["image_aspect_ratio"]) == (
            "llava-1.5-7b",
            "vicuna_v1",
            "pad",
        )

    def test_each_file_says_how_to_run_it(self):
        for path in CONFIGS.rglob("*.yaml"):
            comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
            assert any("python -m eval.run" in line for line in comments), path


class TestBudget:
    @pytest.mark.parametrize("budget", ["192", "64", "1", "100", "576"])
    def test_any_number(self, budget):
        run = settle("method=random", f"budget={budget}")
        assert run.budget == run.method.budget == int(budget)

    @pytest.mark.parametrize("budget", ["0", "-3", "577", "10000", "abc", "1.5"])
    @pytest.mark.parametrize("method", ["none", "sparsevlm"])
    def test_what_is_no_budget(self, budget, method):
        with pytest.raises(UserError, match=f"budget '?{budget}"):
            settle(f"method={method}", f"budget={budget}")

    def test_none_keeps_everything_whatever_the_budget(self):
        runs = [settle("method=none", *budget) for budget in ([], ["budget=192"], ["budget=64"], ["budget=full"])]
        assert {run.budget for run in runs} == {"full"}
        assert len({run.run_id() for run in runs}) == 1

    def test_knobs_instead_of_a_budget(self):
        run = settle("method=sparsevlm", "method.layers=[1,2,6]", "method.keep=[300,200,110]")
        assert run.budget == "explicit" and run.method.budget is None and run.method.keep == (300, 200, 110)
        assert settle("method=sparsevlm_rank", "method.lam=0.7").budget == "explicit"

    def test_a_method_that_would_drop_nothing(self):
        with pytest.raises(UserError, match="drops nothing without a budget"):
            settle("method=sparsevlm")
        assert settle("method=sparsevlm", "budget=full").budget == "full"

    def test_layers_that_the_model_does_not_have(self):
        with pytest.raises(UserError, match="do not fit a model of 12 layers"):
            settle("method=sparsevlm", "budget=64", "method.layers=[2,6,15]")


class TestHash:
    BASE = ("method=sparsevlm", "budget=64", "limit=8", "model.device=cpu")

    @pytest.mark.parametrize(
        "same", ["batch_size=3", "results_dir=/elsewhere", "method.raters=paper", "model.dtype=float32"]
    )
    def test_what_changes_no_number(self, same):
        assert settle(*self.BASE, same).run_id() == settle(*self.BASE).run_id()

    def test_the_device_changes_no_number(self):
        base = settle(*self.BASE)
        elsewhere = dataclasses.replace(base, model=dataclasses.replace(base.model, device="cuda:1"))
        assert elsewhere.config_hash() == base.config_hash()

    @pytest.mark.parametrize(
        "other",
        ["limit=9", "task.seed=1", "budget=65", "method.raters=all", "model.dtype=bfloat16", "max_new_tokens=2",
         "model.image_aspect_ratio=pad", "method=sparsevlm_plus", "method.layers=[1,2,6]"],
    )  # fmt: skip
    def test_what_changes_numbers(self, other):
        assert settle(*self.BASE, other).config_hash() != settle(*self.BASE).config_hash()

    def test_the_prompt(self, tiny_llava_folder):
        base = (*self.BASE, f"model.pretrained={tiny_llava_folder}")
        assert settle(*base, "model.prompt=vicuna_v1").config_hash() != settle(*base).config_hash()

    def test_a_prompt_that_the_model_cannot_spell_has_no_identity(self):
        with pytest.raises(UserError, match="vocabulary cannot spell the prompt 'vicuna_v1'"):
            settle(*self.BASE, "model.prompt=vicuna_v1").config_hash()

    def test_without_a_limit_is_the_whole_task(self):
        whole = TASKS["minivqa"].size
        assert settle().config_hash() == settle(f"limit={whole}").config_hash() != settle("limit=8").config_hash()

    def test_weights_count_by_content_not_by_place(self, tmp_path):
        copy = Path(shutil.copytree(weights_dir(), tmp_path / "copy"))
        assert fingerprint(copy) == fingerprint(weights_dir())
        assert settle(f"model.pretrained={copy}").config_hash() == settle().config_hash()
        content = bytearray((copy / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (copy / "model.safetensors").write_bytes(content)
        assert fingerprint(copy) != fingerprint(weights_dir())

    def test_samples_of_large_files_reach_both_ends(self, tmp_path, monkeypatch):
        monkeypatch.setattr("eval.runs.settings._WHOLE_FILE_BYTES", 0)
        size, found = 10 << 20, set()
        for changed in (None, 0, size // 2, size - 1):
            content = bytearray(size)
            for i in range(size // 2 - 70_000, size // 2 + 70_000) if changed == size // 2 else [changed]:
                if i is not None:
                    content[i] = 1
            (tmp_path / "model.safetensors").write_bytes(content)
            found.add(fingerprint(tmp_path))
        assert len(found) == 4

    def test_the_folders_name(self):
        run = settle(*self.BASE)
        task, model, method, budget, digest = run.run_id().split("__")
        assert (task, model, method, budget) == ("minivqa", "mini", "sparsevlm", "64")
        assert len(digest) == 8 and int(digest, 16) >= 0


class TestMistakes:
    @pytest.mark.parametrize("given", ["limit=0", "limit=1.5", "limit=true", "batch_size=0", "task.seed=-1"])
    def test_numbers(self, given):
        with pytest.raises(UserError, match=given.split("=")[0]):
            settle(given)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ("model.pretrained=/no/such/folder", "no checkpoint folder"),
            ("model.pretrained=minni", "Did you mean 'mini'"),
            ("model.prompt=vicuna", "unknown prompt"),
            ("model.dtype=float8", "unknown dtype"),
            ("+foo=1", "unknown config key 'foo'"),
            ("+model.foo=1", "unknown config key 'model.foo'"),
            ("+method.seed=1", "no option 'seed'"),
            ("task.name=minivq", "Did you mean 'minivqa'"),
        ],
    )
    def test_names(self, given, message):
        with pytest.raises(UserError, match=message):
            settle(given)

    def test_a_broken_checkpoint(self, tmp_path):
        copy = Path(shutil.copytree(weights_dir(), tmp_path / "copy"))
        content = (copy / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match="model.safetensors of .* is damaged"):
            settle(f"model.pretrained={copy}")
