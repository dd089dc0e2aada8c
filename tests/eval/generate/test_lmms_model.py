import copy
from types import SimpleNamespace

import pytest
import torch

import sparsevlm  # isort: skip  - before lmms-eval

from lmms_eval.api.instance import GenerationResult

from eval.generate.generator import clean, generation_arguments, token_averages
from eval.generate.ledger import Ledger
from eval.generate.lmms_model import SparseVLMAdapter
from tests.eval.requests import GREEDY, make_documents, make_requests


@pytest.fixture(scope="module")
def documents():
    return make_documents(6)


@pytest.fixture
def adapter(mini, documents):
    """Makes an adapter over the embedded model that answers questions about `documents`."""

    def make(method="none", budget="full", **options):
        model, processor = mini
        made = SparseVLMAdapter(method=method, budget=budget, model=model, processor=processor, **options)
        made.task_dict["minivqa"] = {"test": documents}
        return made

    return make


class TestGenerationArguments:
    def test_the_tasks_dict_is_left_alone_and_foreign_keys_are_dropped(self):
        given = {**GREEDY, "temperature": 0, "num_beams": 3, "made_up": 1}
        before = copy.deepcopy(given)
        kwargs, until = generation_arguments(given, 128)
        assert given == before
        assert until == ["\n\n"]
        assert kwargs["max_new_tokens"] == 4 and kwargs["num_beams"] == 3
        assert not {"until", "image_aspect_ratio", "made_up"} & set(kwargs)

    def test_greedy_unless_asked_with_a_temperature(self):
        for given in ({}, {"do_sample": False, "temperature": 0.7}, {"do_sample": True, "temperature": 0}):
            kwargs, _ = generation_arguments(given, 128)
            assert kwargs["do_sample"] is False
            assert kwargs["temperature"] is kwargs["top_p"] is None  # the checkpoint's own do not come back
        kwargs, _ = generation_arguments({"do_sample": True, "temperature": 0.2}, 128)
        assert kwargs["do_sample"] is True and kwargs["temperature"] == 0.2

    def test_length_and_stops(self):
        assert generation_arguments({}, 77)[0]["max_new_tokens"] == 77
        assert generation_arguments({"until": "x"}, 1)[1] == ["x"]
        assert generation_arguments({"until": ["", "x"]}, 1)[1] == ["x"]


def test_clean():
    assert clean(" yes.\nUSER: more", ["USER", "more"]) == "yes."
    assert clean(" a\tb\x07c\n\nd\n", []) == "a\tb\x07c\n\nd"


def test_lmms_evals_own_spreadsheets_get_no_control_characters(adapter, documents, monkeypatch):
    monkeypatch.setattr("eval.generate.generator.clean", lambda text, until: "a\tb\x07c\x0bd")
    made = adapter()
    (result,) = made.generate_until(make_requests(documents[:1]))
    assert result.text == "a\tbcd" and made.state.answers["minivqa", 0].text == "a\tb\x07c\x0bd"


@pytest.mark.parametrize(
    ("method", "budget"), [("none", "full"), ("random", 64), ("sparsevlm", 64), ("sparsevlm_rank", None)]
)
def test_a_batch_answers_as_singles_do_and_in_the_order_of_the_requests(adapter, documents, method, budget):
    requests = make_requests(documents)
    one = adapter(method, budget, batch_size=1)
    many = adapter(method, budget, batch_size=4)
    single, batched = one.generate_until(requests), many.generate_until(requests)
    assert [r.text for r in batched] == [r.text for r in single]
    assert len({r.text for r in single}) > 3  # order matters
    for i in range(len(documents)):
        a, b = one.state.answers["minivqa", i], many.state.answers["minivqa", i]
        assert a.prompt == documents[i]["question"] and a.text == single[i].text
        assert (a.input_tokens, a.output_tokens, a.visual) == (b.input_tokens, b.output_tokens, b.visual)
        assert (a.entering, a.leaving) == (b.entering, b.leaving)


def test_answers_are_the_models_own(adapter, documents, mini):
    """Against plain transformers, without adapter and hooks."""
    model, processor = mini
    results = adapter(batch_size=3).generate_until(make_requests(documents[:4]))
    for document, result in zip(documents, results, strict=False):
        inputs = processor(document["question"], images=document["image"])
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert isinstance(result, GenerationResult)
        assert result.text == processor.decode(ids)
        assert result.token_counts.input_tokens == inputs["input_ids"].shape[1]
        assert result.token_counts.output_tokens == len(ids)


def test_token_averages_come_from_the_trace(adapter, documents):
    made = adapter("sparsevlm", 64, batch_size=2)
    made.generate_until(make_requests(documents[:2]))
    answer = made.state.answers["minivqa", 0]
    schedule = sparsevlm.build("sparsevlm", budget=64).plan(576, 12)
    assert (answer.visual, answer.entering, answer.leaving) == (576, schedule.entering, schedule.leaving)
    assert answer.leaving == pytest.approx(64, abs=0.5)
    unpruned = adapter()
    unpruned.generate_until(make_requests(documents[:1]))
    assert unpruned.state.answers["minivqa", 0].leaving == 576


def test_beams(adapter, documents):
    made = adapter("sparsevlm", 64, batch_size=2)
    made.generate_until(make_requests(documents[:3], {"num_beams": 3, "max_new_tokens": 4}))
    assert made.state.answers["minivqa", 2].leaving == pytest.approx(64, abs=0.5)
    rows = SimpleNamespace(entering=[1.0] * 3 + [2.0] * 3, leaving=[3.0] * 3 + [4.0] * 3)  # three beams of each
    assert token_averages(SimpleNamespace(prefills=[rows]), [576, 576]) == [(1, 3), (2, 4)]


def test_a_prompt_with_nothing_to_drop_leaves_no_record():
    assert token_averages(SimpleNamespace(prefills=[]), [576, 0]) == [(576, 576), (0, 0)]


def test_requests_with_other_arguments_are_not_mixed(adapter, documents, monkeypatch):
    made = adapter("random", 64, batch_size=8)
    lengths = []
    original = type(made.model).generate

    def spy(self, **kwargs):
        lengths.append((len(kwargs["input_ids"]), kwargs["max_new_tokens"]))
        return original(self, **kwargs)

    monkeypatch.setattr(type(made.model), "generate", spy)
    each = [{"max_new_tokens": 1 + i % 2} for i in range(4)]
    made.generate_until(make_requests(documents[:4], each))
    assert sorted(lengths) == [(2, 1), (2, 2)]
    assert [made.state.answers["minivqa", i].output_tokens for i in range(4)] == [1, 2, 1, 2]


def test_progress_counts_what_was_known_before(adapter, documents, tmp_path):
    seen = []
    for n in (3, 5):
        with Ledger(tmp_path / "l", "h") as ledger:
            made = adapter("random", 64, batch_size=2, ledger=ledger, progress=seen.append)
            made.generate_until(make_requests(documents[:n]))
    assert seen[:4] == [0, 2, 1, 3] and sum(seen[4:]) == 2


def test_identity_names_what_changes_answers(adapter, mini):
    name = str(adapter("sparsevlm", 64))
    assert name == str(adapter("sparsevlm", 64, batch_size=7))
    assert "0x" not in name
    assert len({name, str(adapter("sparsevlm", 65)), str(adapter("sparsevlm", 64, raters="all"))}) == 3


def test_the_model_survives_lmms_evals_cleaning(adapter, mini):
    made = adapter()
    made.clean()
    assert made.model is mini[0]


class TestModelArguments:
    def test_options_and_batch_size(self):
        text = (
            "pretrained=mini,method=sparsevlm,budget=96,raters=all,layers=1/2/6,recycle=0.0,batch_size=8,dtype=bfloat16"
        )
        made = SparseVLMAdapter.create_from_arg_string(text, {"batch_size": 1, "device": "cpu", "max_batch_size": None})
        assert made.batch_size == 8
        assert made.method.layers == (1, 2, 6)
        assert (made.method.raters, made.method.recycle, made.method.budget) == ("all", 0.0, 96)
        assert made.model.dtype == torch.bfloat16 and made.device.type == "cpu"

    def test_what_the_arguments_do_not_say_comes_from_lmms_eval(self):
        assert SparseVLMAdapter.create_from_arg_string("pretrained=mini", {"batch_size": "4"}).batch_size == 4

    @pytest.mark.parametrize(
        "text", ["method=sparsevlm,budget=64,rater=all", "method=fastvlm", "method=random,budget=0"]
    )
    def test_unknown_options_and_methods(self, text):
        with pytest.raises(ValueError, match="no option 'rater'|unknown method|below 1"):
            SparseVLMAdapter.create_from_arg_string(f"pretrained=mini,{text}")

    def test_a_built_method_takes_no_options(self, mini):
        with pytest.raises(ValueError, match="takes no options: raters"):
            SparseVLMAdapter(method=sparsevlm.build("none"), model=mini[0], processor=mini[1], raters="all")
