"""A judge that cannot be reached, or cannot be read, never becomes a score."""

import json
import time

import pytest

from eval.errors import UserError
from eval.tasks import judge as module
from eval.tasks.judge import Judge, JudgeError, exact_match, scorer
from eval.tasks.judgements import read_llava_bench, read_mmvet, read_video_qa
from tests.eval.tasks.judge_server import VERSION, endpoint, verdict


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setattr(module, "CHECK_SECONDS", 1)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with endpoint() as made:
        yield made


def ask(judge: Judge, prediction: str = "dot") -> dict:
    return scorer("video_qa", judge)({"question": "what moves?", "answer": "dot"}, [prediction])


def mmvet(judge: Judge, prediction: str, runs: int = 1) -> dict:
    return scorer("mmvet", judge, runs)({"question": "x?", "answer": "-1<AND>-5"}, [prediction])


class TestScores:
    def test_questions_about_videos(self, served):
        judge = Judge("m", served.url)
        assert {k: v for k, v in ask(judge).items() if k.startswith("gpt")} == {"gpt_accuracy": 1.0, "gpt_score": 4.0}
        assert ask(judge, "cat")["gpt_accuracy"] == 0.0 == ask(judge, "")["gpt_score"]
        assert judge.versions == {VERSION}
        asked = served.requests[0]
        assert asked["model"] == "m" and asked["path"] == "/v1/chat/completions"
        assert "temperature" not in asked and "max_tokens" not in asked  # Video-LLaVA's script gives neither
        assert asked["key"] == "Bearer secret"

    def test_the_prompt_is_lmms_evals_own(self, served, monkeypatch):
        """Video-ChatGPT's, word for word."""
        monkeypatch.setenv("HF_HOME", "/nowhere")
        from lmms_eval.tasks.activitynetqa import utils

        sent = {}

        def post(url, headers, json, timeout):
            sent.update(json)
            raise KeyboardInterrupt

        monkeypatch.setattr(utils.requests, "post", post)
        with pytest.raises(KeyboardInterrupt):
            utils.get_eval("what moves?", "dot", "cat", 64)
        ask(Judge("m", served.url), "cat")
        assert served.requests[0]["messages"] == sent["messages"]

    def test_mmvet(self, served):
        judge = Judge("m", served.url)
        assert mmvet(judge, "-1 and -5")["gpt_eval_score"] == 1
        assert mmvet(judge, "-1")["gpt_eval_score"] == 0
        assert served.requests[-1]["messages"][0]["content"].endswith("\nx? | -1 <AND> -5 | -1 | ")

    def test_several_runs_each_ask_anew(self, served):
        served.reply = lambda messages: f"0.{len(served.requests)}"
        judge = Judge("m", served.url)
        found = mmvet(judge, "-1", runs=3)
        assert [found[f"gpt_eval_score_run{i}"] for i in (1, 2, 3)] == [0.1, 0.2, 0.3]
        assert found["gpt_eval_score"] == pytest.approx(0.2) and found["judge_replies"] == ["0.1", "0.2", "0.3"]
        assert mmvet(judge, "-1", runs=3) == found and len(served.requests) == 3

    def test_llava_bench(self, served):
        """Against LLaVA's eval_gpt_review_bench.py: captions, question, GPT-4's answer, the model's, and the rule."""
        served.reply = lambda messages: "8 6\nThe first is better."
        doc = {"question": "What?", "gpt_answer": "A dog.", "caption": ["One.", "Two."], "category": "conv"}
        found = scorer("llava_bench", Judge("m", served.url))(doc, ["A cat."])
        assert (found["gpt4_rating"], found["rating"]) == (8, 6)
        (asked,) = served.requests
        system, user = (message["content"] for message in asked["messages"])
        assert system == "You are a helpful and precise assistant for checking the quality of the answer."
        assert user.startswith(
            "[Context]\nOne.\nTwo.\n\n[Question]\nWhat?\n\n[Assistant 1]\nA dog.\n\n[End of Assistant 1]\n\n"
            "[Assistant 2]\nA cat.\n\n[End of Assistant 2]\n\n[System]\nWe would like to request your feedback"
        )
        assert user.endswith("does not affect your judgment.\n\n")
        assert (asked["temperature"], asked["max_tokens"]) == (0.2, 1024)
        for reply in ("8", "8 good", "good", "11 2", ""):
            with pytest.raises(ValueError):
                read_llava_bench(reply)

    @pytest.mark.parametrize(
        ("reply", "expected"),
        [
            ("{'pred': 'yes', 'score': 4.8}", (1.0, 4.0)),
            ("Sure!\n```python\n{'pred': 'No', 'score': 0}\n```", (0.0, 0.0)),
            ('{"pred": "yes", "score": "5"}', (1.0, 5.0)),
            ("{'pred': 'Yes, they match', 'score': 4}", (1.0, 4.0)),
        ],
    )
    def test_readable_replies(self, reply, expected):
        assert tuple(read_video_qa(reply).values()) == expected

    @pytest.mark.parametrize(
        "reply", ["", "yes", "{'pred': 'maybe', 'score': 3}", "{'score': 3}", "{'pred': 'yes', 'score': 9}"]
    )
    def test_unreadable_replies(self, reply):
        with pytest.raises(ValueError):
            read_video_qa(reply)

    def test_mmvet_replies(self):
        assert read_mmvet("0.5 because") == {"gpt_eval_score": 0.5}
        for reply in ("", "good", "7", "0."):
            with pytest.raises(ValueError):
                read_mmvet(reply)


class TestFailures:
    def test_an_endpoint_that_is_not_there(self):
        with pytest.raises(
            UserError, match="does not answer .*check task.judge_url, .* or give task.judge=exact_match"
        ):
            Judge("m", "http://127.0.0.1:9/v1").check()

    def test_an_endpoint_that_hangs(self, served):
        served.reply = None
        started = time.monotonic()
        with pytest.raises(UserError, match="does not answer .APITimeoutError"):
            Judge("m", served.url).check()
        assert time.monotonic() - started < 20

    def test_an_endpoint_that_refuses(self, served):
        served.status = 401
        with pytest.raises(UserError, match="does not answer .AuthenticationError"):
            Judge("m", served.url).check()
        served.status = 200
        Judge("m", served.url).check()

    def test_one_that_stops_answering_ends_the_run_at_once(self, served):
        judge = Judge("m", served.url)
        ask(judge)
        served.status = 400
        with pytest.raises(JudgeError, match="stopped answering .*nothing was scored in its place"):
            ask(judge, "cat")
        count = len(served.requests)
        with pytest.raises(JudgeError, match="stopped answering"):
            ask(judge, "dog")
        assert len(served.requests) == count  # it is not asked for each of thousands of questions

    def test_an_unreadable_reply_is_asked_for_again_and_then_ends_the_run(self, served):
        served.reply = lambda messages: "Well..." if len(served.requests) < 3 else verdict(messages)
        assert ask(Judge("m", served.url))["gpt_accuracy"] == 1
        assert len(served.requests) == 3 and served.requests[0]["messages"] == served.requests[2]["messages"]
        served.reply = lambda messages: "Well..."
        with pytest.raises(
            JudgeError, match="replied 'Well...', which is no score, about 'what moves.', answered with 'cat'"
        ):
            ask(Judge("m", served.url), "cat")

    def test_mmvet_asks_again_as_its_authors_do(self, served):
        served.reply = lambda messages: "Well..."
        with pytest.raises(JudgeError, match="is no score"):
            mmvet(Judge("m", served.url), "-1")
        assert [r["temperature"] for r in served.requests] == [0, 0, 0.5, 1, 1.5]
        assert {r["max_tokens"] for r in served.requests} == {3}
        first, *rest = (r["messages"][0]["content"] for r in served.requests)
        assert set(rest) == {f"{first}\nPredict the correctness of the answer (digit): "}


def test_replies_are_kept_and_asked_once(served, tmp_path):
    file = tmp_path / "judge.jsonl"
    first = Judge("m", served.url)
    first.keep_in(file)
    one, two = ask(first), ask(first, "cat")
    file.write_text(file.read_text() + '{"request": "torn')
    again = Judge("m", served.url)
    again.keep_in(file)
    count = len(served.requests)
    assert (ask(again), ask(again, "cat")) == (one, two) and len(served.requests) == count
    assert again.versions == {VERSION}
    ask(again, "dog")
    assert len(served.requests) == count + 1
    assert json.loads(file.read_text().splitlines()[-1])["version"] == VERSION and "secret" not in file.read_text()
    ask(again)
    again.keep_in(tmp_path / "next.jsonl")  # the next run of the same process has its own file, with all it used
    assert again.versions == set()
    ask(again)
    assert len((tmp_path / "next.jsonl").read_text().splitlines()) == len(again.versions) == 1
    assert len(served.requests) == count + 1
    other = Judge("another", served.url)
    other.keep_in(file)
    ask(other)
    assert len(served.requests) == count + 2


@pytest.mark.parametrize(
    ("answer", "prediction", "score"),
    [
        ("dot", "A dot.", 1),
        ("dot", "a red dot", 0),
        ("dot", "", 0),
        ("-1<AND>-5", "x = -1 or x = -5", 1),
        ("-1<AND>-5", "x = -1", 0),
        ("red<OR>crimson", "Crimson", 1),
        ("red<OR>crimson", "red crimson", 0),
        ("3.5", "3.5", 1),
        ("3.5", "35", 0),
    ],
)
def test_exact_match(answer, prediction, score):
    assert exact_match(answer, prediction) == score


@pytest.mark.parametrize("line", ["[1]", "nonsense", '{"request": "a"}', "7"])
def test_a_damaged_file_of_replies_is_named(tmp_path, line):
    file = tmp_path / "judge.jsonl"
    file.write_text(f'{{"request": "a", "reply": "0.5", "version": "v"}}\n{line}\n')
    with pytest.raises(UserError, match=r"judge.jsonl: line 2 is no reply of a judge. Delete it to ask again"):
        Judge("m", "http://localhost:1/v1").keep_in(file)
