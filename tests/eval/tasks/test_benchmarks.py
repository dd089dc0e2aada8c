"""Every benchmark's true task code on made-up data: who knows the answers gets full marks, who does not gets none."""

import hashlib
import json
from pathlib import Path

import lmms_eval.tasks
import numpy as np
import pytest
from lmms_eval.tasks import TaskManager, get_task_dict

from eval.errors import UserError
from eval.generate.generator import generation_arguments
from eval.tasks import TASKS, scores
from eval.tasks.adjust import nextqa_results
from eval.tasks.generated import Generated
from eval.tasks.loading import quiet_import
from tests.eval.tasks import hub_cache
from tests.eval.tasks.asked import evaluate, loaded, outcome
from tests.eval.tasks.oracle import Answers, falsehood, truth

BENCHMARKS = [name for name, task in TASKS.items() if not isinstance(task, Generated)]
SUBMITTED = [name for name in BENCHMARKS if "answered" in TASKS[name].metrics]  # nothing is scored
SCORED = [name for name in BENCHMARKS if name not in SUBMITTED]
FULL = {"fraction": 1, "percent": 100, "points": 400}  # MME: the made-up data have two of its 14 categories


def sometimes(task: str, doc: dict) -> str:
    """Right or wrong, depending on the question alone; the seed leaves no benchmark all right or all wrong."""
    keys = ("question_id", "index", "category", "question_field", "image_id", "video", "answer")
    name = "-".join(str(v) for v in (2713, *map(doc.get, keys)))
    return (truth, falsehood)[hashlib.sha256(name.encode()).digest()[0] % 2](task, doc)


def silence(task: str, doc: dict) -> str:
    return ""


class Asked:
    """All benchmarks, asked of one model in one go."""

    def __init__(self, say, judge, folder) -> None:
        self.loaded = {name: loaded(name, judge_url=judge.url) for name in BENCHMARKS}
        self.outcomes, self.models = {}, {}
        names = {name: TASKS[name].lmms for name in BENCHMARKS}
        again = {n for n in BENCHMARKS if n != next(other for other in names if names[other] == names[n])}
        for chosen in (set(BENCHMARKS) - again, again):  # lmms-eval knows a task by its name
            some = {name: one for name, one in self.loaded.items() if name in chosen}
            model = Answers(say)
            tasks = [task for one in some.values() for task in one.tasks]
            evaluated = evaluate(tasks, next(iter(some.values())).manager, model, folder)
            self.outcomes |= {name: outcome(one, evaluated) for name, one in some.items()}
            self.models |= dict.fromkeys(some, model)


@pytest.fixture(scope="package")
def asked(hub, judge, tmp_path_factory):
    """Model -> all benchmarks asked of it; each model once."""
    known = {}

    def get(say) -> Asked:
        if say not in known:
            known[say] = Asked(say, judge, tmp_path_factory.mktemp("submissions"))
        return known[say]

    return get


class TestMarks:
    @pytest.mark.parametrize("name", SCORED)
    def test_full_for_the_truth(self, asked, name):
        one = asked(truth).loaded[name]
        samples, metrics = asked(truth).outcomes[name]
        assert len(samples) == one.n > 0
        headline = next(iter(metrics))
        about = one.about(metrics)
        assert headline == about["metric"] and metrics[headline] == FULL[about["scale"]]

    @pytest.mark.parametrize("name", SCORED)
    @pytest.mark.parametrize("say", [falsehood, silence])
    def test_none_for_falsehoods_and_for_silence(self, asked, name, say):
        _, metrics = asked(say).outcomes[name]
        if (name, say) == ("pope", silence):  # what is no clear "no" counts as "yes", by the authors' rule
            return self.check_that_silence_is_yes(metrics)
        assert next(iter(metrics.values())) == 0
        assert all(v == 0 for k, v in metrics.items() if "yes_ratio" not in k and k != "gpt4_rating")

    def check_that_silence_is_yes(self, metrics):
        assert metrics["pope_f1_mean"] == pytest.approx(200 / 3) and metrics["pope_yes_ratio_random"] == 100
        assert metrics["unclear_answers"] == 12

    @pytest.mark.parametrize("name", SCORED)
    def test_scores_of_samples_are_numbers_of_the_headlines_unit(self, asked, name):
        samples, metrics = asked(sometimes).outcomes[name]
        headline = next(iter(metrics))
        scores = [s[headline] for s in samples if headline in s]
        if scores and name != "llava_bench":  # a ratio of sums
            assert sum(scores) / len(scores) == pytest.approx(metrics[headline])
        else:
            assert all(isinstance(s.get("correct", s.get("rating")), float) for s in samples)
        assert all(s["task"] in TASKS[name].lmms and s["key"][0] == s["task"] for s in samples)
        assert len({s["doc_id"] for s in samples}) == len(samples)

    @pytest.mark.parametrize("name", BENCHMARKS)
    def test_answers_are_greedy_and_have_an_end(self, asked, name):
        one, model = asked(truth).loaded[name], asked(truth).models[name]
        for task in one.tasks:
            given = [kwargs for (t, _), kwargs in model.arguments.items() if t == task.config.task]
            assert given
            for kwargs in given:
                arguments, _ = generation_arguments(kwargs, 128)
                assert arguments["do_sample"] is False and 16 <= arguments["max_new_tokens"] <= 1024


SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
PROMPTS = {  # as LLaVA's and Video-LLaVA's evaluation files put the first question
    "gqa": "Is the sky blue?" + SHORT,
    "mmbench": "What is it?\nA. cat\nB. dog" + LETTER,
    "mme": "Is it so?" + SHORT,
    "pope": "Is there a dog?" + SHORT,
    "scienceqa": "Context: Look at the picture.\nWhich is a mammal?\nA. cat\nB. rock" + LETTER,
    "vqav2": "What animal is this?" + SHORT,
    "textvqa": "What brand is this?\nReference OCR token: NOKIA, 3310" + SHORT,
    "conbench": "N/Y?",
    "seedbench": "What happens?\nA. one\nB. two\nC. three\nD. four" + LETTER,
    "mmvet": "What is x?",
    "tgif": "what is moving?",
    "msvd": "what is moving?",
    "msrvtt": "what is moving?",
    "activitynet": "is the person running",
    "vizwiz": "What Colour is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    + SHORT,
    "vizwiz_test": "What Colour is this?\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    + SHORT,
    "vqav2_testdev": "What animal is this?" + SHORT,
    "llava_bench": "What is conv?",
    "mmbench_cn": "一张照片。\n这是什么？\nA. 猫\nB. 狗\n请直接回答选项字母。",
    "scienceqa_full": "Which is a mammal?\nA. cat\nB. rock" + LETTER,
    "seedbench_image": "How many?\nA. one\nB. two\nC. three\nD. four" + LETTER,
    "nextqa": "why did the man run\nA. late\nB. fun\nC. sport\nD. fear\nE. bus" + LETTER,
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(asked, name):
    assert asked(truth).models[name].prompts[TASKS[name].lmms[0], 0] == PROMPTS[name]


def test_prompts_that_can_be_chosen(hub):
    def first(name, **options):
        (task,) = loaded(name, **options).tasks
        return task.doc_to_text(task.eval_docs[0])

    assert first("textvqa", ocr=False) == "What brand is this?" + SHORT
    assert first("mmbench", prompt="lmms_eval") == "What is it? There are several options:\nA. cat\nB. dog\n" + LETTER
    (mmbench,) = loaded("mmbench").tasks
    assert mmbench.doc_to_text(mmbench.eval_docs[2]).startswith("A zoo.\nWhat is it?\nA. cat")


@pytest.fixture(scope="module")
def shipped(hub, tmp_path_factory):
    """lmms-eval's tasks as they are."""
    folders = ["pope", "mme", "mmbench", "seedbench", "conbench", "mvbench", "videomme"]
    root = Path(lmms_eval.tasks.__file__).parent
    manager = TaskManager(include_path=[str(root / f) for f in folders], include_defaults=False, model_name="x")
    names = ["pope_adv", "pope_pop", "pope_random", "mme", "mmbench_en_dev_static", "ConBench", "videomme"]
    with quiet_import():
        tasks = get_task_dict([*names, *TASKS["mvbench"].lmms], manager, "simple")
    model = Answers(sometimes)
    return evaluate(list(tasks.values()), manager, model, tmp_path_factory.mktemp("shipped"))["results"]


class TestOwnAggregation:
    """Our aggregates are lmms-eval's own, where it has them, for a model that is sometimes right."""

    def ours(self, asked, name):
        return asked(sometimes).outcomes[name][1]

    def test_pope(self, asked, shipped):
        each = {s: 100 * shipped[f"pope_{s}"]["pope_f1_score,none"] for s in ("adv", "pop", "random")}
        found = self.ours(asked, "pope")
        assert 0 < found["pope_f1_mean"] < 100 and found["pope_f1_mean"] == pytest.approx(sum(each.values()) / 3)
        assert found["pope_f1_adversarial"] == pytest.approx(each["adv"])

    def test_mme(self, asked, shipped):
        found = self.ours(asked, "mme")
        for name in ("mme_perception_score", "mme_cognition_score"):
            assert found[name] == pytest.approx(shipped["mme"][f"{name},none"])
        assert 0 < found["mme_total"] < 400
        assert found["mme_total"] == found["mme_perception_score"] + found["mme_cognition_score"]

    @pytest.mark.parametrize(
        ("name", "task", "metric"),
        [
            ("mmbench", "mmbench_en_dev_static", "gpt_eval_score"),
            ("conbench", "ConBench", "ConScore_D"),
            ("videomme", "videomme", "videomme_perception_score"),
        ],
    )
    def test_groups(self, asked, shipped, name, task, metric):
        found = next(iter(self.ours(asked, name).values()))
        assert 0 < found < FULL[asked(sometimes).loaded[name].about([metric])["scale"]]
        assert found == pytest.approx(shipped[task][f"{metric},none"])

    def test_mvbench(self, asked, shipped):
        each = [shipped[name]["mvbench_accuracy,none"] for name in TASKS["mvbench"].lmms]
        assert self.ours(asked, "mvbench")["mvbench_mean"] == pytest.approx(sum(each) / 20) == 50


class TestSubmissions:
    """Against LLaVA's convert_vqav2_for_submission.py and convert_vizwiz_for_submission.py."""

    @pytest.mark.parametrize("name", SUBMITTED)
    def test_nothing_is_scored(self, asked, name):
        samples, metrics = asked(truth).outcomes[name]
        assert metrics == {"answered": len(samples)} and len(samples) == TASKS_SIZES[name]

    def files(self, asked, name, **options):
        return json.loads(loaded(name, **options).files(asked(truth).outcomes[name][0])["submission.json"])

    def test_vizwiz(self, asked):
        assert self.files(asked, "vizwiz_test") == [{"image": f"VizWiz_{i}.jpg", "answer": "cat"} for i in range(2)]

    def test_vqav2(self, asked, tmp_path):
        said = {20 + i: "cat" for i in range(3)}
        assert self.files(asked, "vqav2_testdev") == [{"question_id": k, "answer": v} for k, v in said.items()]
        numbers = [5, 22, 21, 9, 20]
        want = [{"question_id": n, "answer": said.get(n, "")} for n in numbers]
        official, llavas = tmp_path / "v2.json", tmp_path / "llava.jsonl"
        official.write_text(json.dumps({"questions": [{"question_id": n} for n in numbers]}))
        llavas.write_text("".join(json.dumps({"question_id": n}) + "\n" for n in numbers))
        for file in (official, llavas):
            assert self.files(asked, "vqav2_testdev", questions=str(file)) == want
        official.write_text("{")
        with pytest.raises(UserError, match="task.questions=.*cannot be read"):
            loaded("vqav2_testdev", questions=str(official))


TASKS_SIZES = {"vizwiz_test": 2, "vqav2_testdev": 3}


class TestLimits:
    @pytest.mark.parametrize(
        ("name", "limit", "n"),
        [
            ("gqa", 3, 3),
            ("mme", 3, 2),
            ("mme", 4, 4),
            ("mmbench", 3, 2),
            ("conbench", 5, 3),
            ("pope", 7, 6),
            ("mvbench", 25, 25),
        ],
    )
    def test_never_cut_a_group(self, hub, name, limit, n):
        one = loaded(name, limit)
        assert one.n == n
        rows = [task.config.task + str(doc) for task in one.tasks for doc in task.eval_docs_no_media]
        everything = [task.config.task + str(doc) for task in loaded(name).tasks for doc in task.eval_docs_no_media]
        assert set(rows) <= set(everything)

    def test_pairs_of_mme_stay_together(self, hub):
        (task,) = loaded("mme", 2).tasks
        assert len(set(task.eval_docs["question_id"])) == 1 and set(task.eval_docs["answer"]) == {"Yes", "No"}

    def test_splits_of_pope_are_asked_alike(self, hub):
        (task,) = loaded("pope", 6).tasks
        assert sorted(task.eval_docs["category"]) == sorted(["adversarial", "popular", "random"] * 2)


class TestTraps:
    """What lmms-eval's own functions would get wrong."""

    def test_gqa_shows_the_picture_of_the_question(self, hub):
        (task,) = loaded("gqa").tasks
        for doc in task.eval_docs:
            (shown,) = task.doc_to_visual(doc)
            assert np.array_equal(np.asarray(shown), np.asarray(hub_cache.picture(int(doc["imageId"][1:]))))

    def test_nextqa_never_guesses(self, hub):
        doc = {"answer": 0, **{f"a{i}": f"word{i}" for i in range(5)}}
        for text in ("", "I do not know", "nothing"):
            assert all(nextqa_results({**doc, "answer": i}, [text]) == {"exact_match": 0.0} for i in range(5))
        assert nextqa_results({**doc, "answer": 2}, ["C. word2"]) == {"exact_match": 1.0}

    def test_a_banana_is_no_missing_option(self):
        row = dict(A="banana", B="nan", C="nan", D="nan", answer="A", index=1, prediction="it is a banana", question="")
        samples = [{"doc": {"index": 1}, "gpt_eval_score": row, "submission": {}}]
        assert scores.mmbench(samples) == {"circular_accuracy": 100}

    def test_metrics_of_yes_and_no(self):
        """By hand: 2 true positives, 1 false positive, 1 false negative, 1 true negative."""
        pairs = [("yes", "yes"), ("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no")]
        found = {name: value / 100 for name, value in scores.yes_no_metrics(pairs).items()}
        want = {"accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 3 / 5}
        assert found == pytest.approx(want)
        assert set(scores.yes_no_metrics([("no", "yes")]).values()) == {0}

    def test_a_video_of_seedbench_is_shown_by_its_middle_frame(self, hub):
        (task,) = loaded("seedbench").tasks
        assert task.eval_docs["data_type"][0] == "video"
        (shown,) = task.doc_to_visual(task.eval_docs[0])
        assert np.array_equal(np.asarray(shown), np.asarray(hub_cache.picture(2)))  # of 1 to 3

    def test_an_excluded_question_takes_its_group_with_it(self):
        pair = [dict(doc=dict(category="count", question_id=q), correct=1.0) for q in "aab"]
        found = scores.mme(pair)
        assert found["mme_total"] == 200 == found["mme_perception_score"]
        forms = [dict(doc=dict(image_id=i), ConScore_D=dict(score=1)) for i in "aaabb"]
        assert scores.conbench(forms)["ConScore_D"] == 1 and "ConScore_D" not in forms[3]

    def test_an_empty_answer_counts_in_mvbench(self):
        samples = [dict(task="t", mvbench_accuracy=dict(pred_answer=p, score=s)) for p, s in (("(A)", 1), ("", 0))]
        assert scores.mvbench(samples)["mvbench_mean"] == 50
