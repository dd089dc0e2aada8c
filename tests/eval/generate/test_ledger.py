import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.generate.ledger import Answer, Ledger


def answer(doc_id=0, prompt="what?", text="red", task="t") -> Answer:
    return Answer(task, doc_id, prompt, text, 590, 2, 576, 231.0, 192.0, 0.25)


def test_answers_come_back_after_a_restart(tmp_path):
    kept = [answer(i, text=f"\u00e4 {i}\n") for i in range(3)]
    with Ledger(tmp_path / "l", "h") as ledger:
        assert len(ledger) == 0
        ledger.append(kept[:2])
        ledger.append(kept[2:])
        assert ledger.get("t", 1, "what?") == kept[1]
    with Ledger(tmp_path / "l", "h") as ledger:
        assert [ledger.get("t", i, "what?") for i in range(3)] == kept
        assert len(ledger) == 3


@pytest.mark.parametrize("other", [("u", 0, "what?"), ("t", 1, "what?"), ("t", 0, "who?")])
def test_task_document_and_prompt_must_agree(tmp_path, other):
    with Ledger(tmp_path / "l", "h") as ledger:
        ledger.append([answer()])
        assert ledger.get("t", 0, "what?") is not None
        assert ledger.get(*other) is None


def test_answers_of_another_configuration_are_ignored_and_kept(tmp_path):
    with Ledger(tmp_path / "l", "one") as ledger:
        ledger.append([answer()])
    with Ledger(tmp_path / "l", "two") as ledger:
        assert len(ledger) == 0
        ledger.append([answer(text="blue")])
    with Ledger(tmp_path / "l", "one") as ledger:
        assert ledger.get("t", 0, "what?").text == "red"


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 2000))
def test_torn_anywhere_the_whole_lines_survive_and_writing_goes_on(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("ledger") / "l"
    kept = [answer(i) for i in range(5)]
    with Ledger(path, "h") as ledger:
        ledger.append(kept)
    content = path.read_bytes()
    path.write_bytes(content[:cut])
    whole = content[:cut].count(b"\n")
    with Ledger(path, "h") as ledger:
        assert [i for i in range(5) if ledger.get("t", i, "what?")] == list(range(whole))
        ledger.append(kept[whole:])
    assert path.read_bytes() == content


@pytest.mark.parametrize("line", [b"\x00\xff\n", b"[1]\n", b"{}\n", b'{"config": "h", "task": "t"}\n'])
def test_a_damaged_line_costs_only_itself(tmp_path, line):
    path = tmp_path / "l"
    with Ledger(path, "h") as ledger:
        ledger.append([answer(0)])
    path.write_bytes(line + path.read_bytes())
    with Ledger(path, "h") as ledger:
        assert len(ledger) == 1


def test_only_one_writer_at_a_time(tmp_path):
    with Ledger(tmp_path / "l", "h"):
        with pytest.raises(BlockingIOError, match="another process"):
            Ledger(tmp_path / "l", "h")
    Ledger(tmp_path / "l", "h").close()
