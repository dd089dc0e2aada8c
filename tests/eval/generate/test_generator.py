"""Several methods on the same batches, and what happens when something fails."""

import random
import threading

import pytest
import torch

import sparsevlm  # isort: skip  - before lmms-eval

from eval.generate.features import FeatureStore
from eval.generate.generator import GenerationError, Generator, RunState, out_of_memory, plan_batches
from eval.generate.ledger import Ledger
from tests.eval.requests import GREEDY, make_documents, make_requests

N = 6


@pytest.fixture(scope="module")
def documents():
    return make_documents(N)


@pytest.fixture
def generator(mini, documents):
    def make(on_error="stop", feature_bytes=1 << 30, given=documents):
        return Generator(mini[1], FeatureStore(mini[0], feature_bytes), {"minivqa": {"test": given}}, on_error=on_error)

    return make


def state(name="random", budget=64, size=2, ledger=None) -> RunState:
    return RunState(sparsevlm.build(name, budget=budget), ledger, size)


def ask(made: Generator, documents, *states: RunState, size: int = 2, gen_kwargs=None) -> list[int]:
    came: list[int] = []
    made.ask(plan_batches(make_requests(documents, gen_kwargs), size), states, came.append)
    return came


def texts(state: RunState) -> dict:
    return {doc: a.text for (_, doc), a in state.answers.items()}


class Generate:
    """Takes the place of the model's generate(): `fails(documents of the call)` gives an exception or None."""

    def __init__(self, monkeypatch, made: Generator, fails=lambda documents: None):
        self.batches, self.pixels = [], []
        original, prepare = type(made.model).generate, Generator._generate

        def seen(generator, batch, state, known):
            self.batches.append([r.args[3] for r in batch])
            return prepare(generator, batch, state, known)

        def generate(model, **kwargs):
            self.pixels.append("pixel_values" in kwargs)
            if (error := fails(self.batches[-1])) is not None:
                raise error
            return original(model, **kwargs)

        monkeypatch.setattr(Generator, "_generate", seen)
        monkeypatch.setattr(type(made.model), "generate", generate)


class TestBatches:
    def test_fixed_by_questions_and_size_alone(self, documents):
        requests = make_requests(documents)
        shuffled = random.Random(0).sample(requests, N)
        lengths = [[len(r.args[0]) for r in batch] for batch in plan_batches(shuffled, 4)]
        assert [len(batch) for batch in lengths] == [4, 2]
        assert sum(lengths, []) == sorted((len(d["question"]) for d in documents), reverse=True)

    def test_other_arguments_are_not_mixed_and_copies_are_asked_once(self, documents):
        requests = make_requests(documents, [{"max_new_tokens": 1 + i % 2} for i in range(N)])
        batches = plan_batches([*requests, requests[-1]], 8)
        assert sorted(sorted(r.args[3] for r in batch) for batch in batches) == [[0, 2, 4], [1, 3, 5]]

    def test_a_partly_known_batch_is_asked_whole_again(self, generator, documents, tmp_path, monkeypatch):
        """So that an answer never depends on where an earlier attempt was cut off."""
        first = state(ledger=Ledger(tmp_path / "l", "h"))
        ask(generator(), documents, first)
        first.ledger.close()
        lines = (tmp_path / "l").read_bytes().splitlines(keepends=True)
        (tmp_path / "l").write_bytes(b"".join(lines[:3]))
        second = state(ledger=Ledger(tmp_path / "l", "h"))
        assert second.look_up(make_requests(documents)) == 3
        calls = Generate(monkeypatch, made := generator())
        assert sum(ask(made, documents, second)) == 3
        assert [len(b) for b in calls.batches] == [2, 2]
        assert {k: a.text for k, a in second.answers.items()} == {k: a.text for k, a in first.answers.items()}
        second.ledger.close()


class TestSharedFeatures:
    METHODS = [("none", "full"), ("random", 64), ("sparsevlm", 64), ("tome", 64), ("downsample", 64)]

    @pytest.mark.parametrize("feature_bytes", [0, 1 << 30])
    def test_a_sweep_answers_as_single_runs_do_to_the_last_bit(self, generator, documents, feature_bytes, monkeypatch):
        """Compared by the logits of the first token, over batches of another size than the pictures'."""
        logits: list[torch.Tensor] = []
        made = generator(feature_bytes=feature_bytes)
        handle = made.model.lm_head.register_forward_hook(lambda module, args, out: logits.append(out[:, -1].clone()))
        together = [state(*m) for m in self.METHODS]
        ask(made, documents, *together)
        swept, calls = list(logits), made.features.encoded
        assert calls == N  # one for each picture, whatever the number of methods
        logits.clear()
        for i, method in enumerate(self.METHODS):
            alone = state(*method)
            ask(generator(feature_bytes=0), documents, alone)
            assert texts(alone) == texts(together[i])
        handle.remove()
        assert len(logits) == len(swept)
        as_set = sorted(t.numpy().tobytes() for t in logits)
        assert as_set == sorted(t.numpy().tobytes() for t in swept)

    def test_methods_of_the_vision_tower_get_pixels(self, generator, documents, monkeypatch):
        calls = Generate(monkeypatch, made := generator())
        ask(made, documents[:1], *(state(*m) for m in self.METHODS))
        assert calls.pixels == [False, False, False, True, True]

    def test_a_picture_that_comes_again_is_not_encoded_again(self, generator, documents):
        made = generator(given=documents[:1] * N)
        ask(made, documents[:1] * N, state())
        assert (made.features.encoded, made.features.reused) == (1, N - 1)

    def test_memory_is_bounded_and_the_oldest_goes(self, mini):
        model, processor = mini
        pixels = torch.randn(5, 3, 168, 168)
        one = 576 * model.config.text_config.hidden_size * 4
        store = FeatureStore(model, 2 * one)
        for i in (0, 1, 0, 2, 0, 1):  # 1 had to go for 2
            store.encode(pixels[i : i + 1], "image")
            assert store._kept.bytes <= 2 * one
        assert (store.encoded, store.reused) == (4, 2)
        assert FeatureStore(model, one - 1).encode(pixels[:1], "image")  # too large to keep

    def test_pixels_kind_and_type_tell_pictures_apart(self, mini):
        model, _ = mini
        pixels = torch.zeros(1, 3, 168, 168)
        other = pixels.clone()
        other[0, 2, 167, 167] = 1e-6
        store = FeatureStore(model, 1 << 30)
        for picture in (pixels, other, pixels.double()):
            store.encode(picture, "image")
        assert (store.encoded, store.reused) == (3, 0)

    def test_videos(self, tiny_video_llava_folder):
        model, processor = sparsevlm.load(tiny_video_llava_folder)
        clip = torch.randint(0, 255, (8, 60, 80, 3), dtype=torch.uint8).numpy()
        inputs = processor(["what is there?", "where?"], videos=[clip, clip[::-1].copy()])
        store = FeatureStore(model, 1 << 30)
        with torch.inference_mode():
            theirs = model.base_model.get_video_features(inputs["pixel_values_videos"], return_dict=True).pooler_output
        for _ in range(2):
            ours = store.encode(inputs["pixel_values_videos"], "video")
            assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-4)
        assert (store.encoded, store.reused) == (2, 2)


class TestMemory:
    @pytest.mark.parametrize(
        "error",
        [
            torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory: you tried"),
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            MemoryError(),
        ],
    )
    def test_known_forms(self, error):
        assert out_of_memory(error)
        assert not out_of_memory(RuntimeError("shapes do not match")) and not out_of_memory(ValueError("memory"))

    def test_batches_are_halved_and_stay_so(self, generator, documents, monkeypatch, capfd):
        full = state(size=6)
        ask(generator(), documents, full, size=6)
        calls = Generate(monkeypatch, made := generator(), lambda b: MemoryError() if len(b) > 2 else None)
        small = state(size=6)
        came = ask(made, documents, small, size=6)
        assert [len(b) for b in calls.batches] == [6, 3, 1, 1, 1, 1, 1, 1]
        assert small.largest == 1 and small.error is None and sum(came) == N
        assert texts(small) == texts(full)
        assert "going on with batches of 3" in capfd.readouterr().err
        calls.batches.clear()
        small.answers.clear()
        ask(made, documents[:4], small, size=4)
        assert [len(b) for b in calls.batches] == [1, 1, 1, 1]

    def test_one_lane_that_needs_more_does_not_slow_the_others(self, generator, documents, monkeypatch):
        made = generator()
        hungry, modest = state("none", "full", size=4), state("random", 16, size=4)
        original = type(made.model).generate

        def generate(model, **kwargs):
            if len(kwargs["input_ids"]) > 2 and hungry.method is active[-1]:
                raise RuntimeError("DefaultCPUAllocator: not enough memory")
            return original(model, **kwargs)

        active, prepare = [], Generator._generate
        monkeypatch.setattr(
            Generator, "_generate", lambda s, b, of, k: active.append(of.method) or prepare(s, b, of, k)
        )
        monkeypatch.setattr(type(made.model), "generate", generate)
        ask(made, documents[:4], hungry, modest, size=4)
        assert (hungry.largest, modest.largest) == (2, 4)
        assert len(hungry.answers) == len(modest.answers) == 4

    def test_a_single_question_that_does_not_fit_is_an_error_of_that_question(self, generator, documents, monkeypatch):
        Generate(monkeypatch, made := generator(), lambda b: MemoryError() if 3 in b else None)
        stopped = state(size=4)
        ask(made, documents, stopped, size=4)
        assert "task minivqa, document 3: MemoryError" in str(stopped.error)
        Generate(monkeypatch, made := generator("record"), lambda b: MemoryError() if 3 in b else None)
        recorded = state(size=4)
        ask(made, documents, recorded, size=4)
        assert set(recorded.failures) == {("minivqa", 3)} and len(recorded.answers) == N - 1


class TestBadSamples:
    def spoilt(self, documents, at: int) -> list[dict]:
        """Documents of which one has a picture that cannot be used."""
        return [d | {"image": "no picture"} if i == at else d for i, d in enumerate(documents)]

    def test_the_run_stops_and_names_the_one_document(self, generator, documents, tmp_path):
        given = self.spoilt(documents, 4)
        stopped, other = state(size=3, ledger=Ledger(tmp_path / "l", "h")), state("random", 16, size=3)
        ask(generator(given=given), given, stopped, other, size=3)
        assert isinstance(stopped.error, GenerationError)
        assert str(stopped.error).startswith("task minivqa, document 4: ")
        assert ("minivqa", 4) not in stopped.answers and not stopped.failures
        assert len(stopped.ledger) == len(stopped.answers)  # the others that were answered are kept
        stopped.ledger.close()

    def test_recorded_it_is_left_out_and_all_others_are_answered(self, generator, documents, tmp_path):
        whole = state(size=3)
        ask(generator(), documents, whole, size=3)
        given = self.spoilt(documents, 4)
        with Ledger(tmp_path / "l", "h") as ledger:
            made = state(size=3, ledger=ledger)
            came = ask(generator("record", given=given), given, made, size=3)
            assert sum(came) == N and made.error is None
            assert texts(made) == {i: t for i, t in texts(whole).items() if i != 4}
            failure = ledger.failure("minivqa", 4, documents[4]["question"])
            assert failure == made.failures["minivqa", 4] and "no picture" in failure.error

    def test_a_batch_that_only_fails_together_is_answered_one_by_one(self, generator, documents, monkeypatch):
        Generate(monkeypatch, made := generator(), lambda b: ValueError("odd") if len(b) > 1 else None)
        single = state(size=3)
        ask(made, documents, single, size=3)
        assert len(single.answers) == N and single.error is None and single.largest == 3

    def test_a_broken_device_is_no_documents_fault(self, generator, documents, monkeypatch):
        broken = torch.AcceleratorError("CUDA error: device-side assert triggered")
        Generate(monkeypatch, made := generator("record"), lambda b: broken)
        stopped = state(size=3)
        ask(made, documents, stopped, size=3)
        assert "device-side assert" in str(stopped.error) and not stopped.failures

    def test_a_method_that_fails_does_not_stop_the_others(self, generator, documents, monkeypatch):
        bad, good = state("sparsevlm", 64), state("random", 64)
        monkeypatch.setattr(type(bad.method), "begin", lambda *_: 1 / 0)
        ask(generator(), documents, bad, good)
        assert "ZeroDivisionError" in str(bad.error) and len(good.answers) == N

    def test_an_interruption_is_not_held_up(self, generator, documents, monkeypatch):
        Generate(monkeypatch, made := generator("record"), lambda b: KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            ask(made, documents, state())


def test_sampling_draws_the_same_whatever_was_asked_before(generator, documents):
    hot = GREEDY | {"do_sample": True, "temperature": 2.0}
    one, two = state("random", 16), state("random", 16)
    ask(generator(), documents, one, gen_kwargs=hot)
    torch.manual_seed(99)
    ask(generator(), documents, state("random", 64), two, gen_kwargs=hot)
    greedy = state("random", 16)
    ask(generator(), documents, greedy)
    assert texts(one) == texts(two) != texts(greedy)


def test_the_next_batch_is_prepared_while_the_model_works(generator, documents, monkeypatch):
    made, prepared, seen = generator(), [], []
    prepare, original = Generator._prepare, type(made.model).generate

    def preparing(generator, batch):
        out = prepare(generator, batch)
        prepared.append(len(batch))
        came.set()
        return out

    def generate(model, **kwargs):
        if len(seen) < 2:  # not the last of three batches
            while len(prepared) < len(seen) + 2:
                came.clear()
                assert came.wait(30)
        seen.append(len(prepared))
        return original(model, **kwargs)

    came = threading.Event()
    monkeypatch.setattr(Generator, "_prepare", preparing)
    monkeypatch.setattr(type(made.model), "generate", generate)
    assert sum(ask(made, documents, state())) == N
    assert seen == [2, 3, 3] and prepared == [2, 2, 2]
