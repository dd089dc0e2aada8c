"""The two controls of the main table: questions that need no picture, and random tokens at the same cost."""

from __future__ import annotations

import numpy as np
import pytest

from eval.runs.reader import accuracy_groups, read_runs
from eval.runs.stats import bootstrap_ci
from eval.tasks.minivqa.utils import LANGUAGE_CONTROL, VISUAL, process_results
from scripts.make_tables import accuracy_table, caption
from scripts.tables.separation import separation_table
from scripts.tables.summary import summarise
from tests.scripts import folders

TYPES = ("count", "next", "read")
OURS = np.array([1, 1, 0, 0, 1, 1, 1, 1, 1], float)
THEIRS = np.array([0, 1, 0, 1, 1, 0, 1, 0, 1], float)
VISUAL_QUESTIONS = np.array([0, 2, 3, 5, 6, 8])  # those that are not of the type next


@pytest.fixture
def results(tmp_path):
    """Runs as they were made before visual accuracy was: two settings of SparseVLM and three controls."""
    tokens = (111.0, 64.0)
    folders.accuracy_run(tmp_path, scores=np.ones(9), types=TYPES)
    folders.accuracy_run(tmp_path, "random", 64, THEIRS, tokens=(64.0, 64.0), types=TYPES)
    folders.accuracy_run(tmp_path, "random_layer", 64, THEIRS, tokens=tokens, types=TYPES, match="sparsevlm")
    folders.accuracy_run(tmp_path, "random_layer", 64, 1 - THEIRS, tokens=(80.0, 64.0), types=TYPES, digest="f")
    folders.accuracy_run(tmp_path, "sparsevlm", 64, OURS, tokens=tokens, types=TYPES)
    return tmp_path


def summary(results):
    runs = read_runs(results)
    (group,) = accuracy_groups(runs)
    return summarise(group, runs)


def as_text(values, sign: str = "") -> str:
    mean, low, high = (100 * x for x in bootstrap_ci(list(values)))
    return f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def test_the_table_is_of_the_questions_that_need_the_picture(results):
    found = summary(results)
    assert found.metric == VISUAL
    table = accuracy_table(found).set_index("method")
    ours = table.loc["sparsevlm"]
    assert ours["visual accuracy % [95 %]"] == as_text(OURS[VISUAL_QUESTIONS])
    assert ours["difference, points [95 %]"] == as_text(OURS[VISUAL_QUESTIONS] - 1, "+")
    assert ours["retained %"] == f"{100 * OURS[VISUAL_QUESTIONS].mean():.1f}"
    text = caption(found)
    assert "the 6 questions that need the picture; the language control (`next`, 3 questions" in text
    assert "kept apart: 33.3 to 100.0 % in all runs here" in text


def test_the_matched_control_stands_beside_what_it_matches(results):
    table = accuracy_table(summary(results)).set_index("method")
    column = table["to the matched control, points [95 %]"]
    assert column["sparsevlm"] == as_text((OURS - THEIRS)[VISUAL_QUESTIONS], "+")
    assert column["random_layer (match=sparsevlm)"] == "0"
    # as many tokens leave, but others enter: it computes less
    assert column["random"] == column["random_layer"] == column["none"] == "–"
    assert "nothing but the choice differs" in caption(summary(results))


def test_separation_keeps_the_language_control_in_a_column_of_its_own(results):
    (group,) = accuracy_groups(read_runs(results))
    table = separation_table(group)
    assert "next (language control)" in table.columns and "to random_layer (match=sparsevlm)" in table.columns
    row = dict(zip(table.columns, next(r for r in table.texts if r[0] == "sparsevlm"), strict=True))
    assert row["visual accuracy %"] == as_text(OURS[VISUAL_QUESTIONS])
    assert row["next (language control)"] == f"{100 * OURS[1::3].mean():.1f}"
    assert row["to random_layer (match=sparsevlm)"].startswith(as_text((OURS - THEIRS)[VISUAL_QUESTIONS], "+"))


def test_groups_without_the_language_control_are_reported_as_before(tmp_path):
    folders.accuracy_run(tmp_path, types=("count", "read"))
    found = summary(tmp_path)
    assert found.metric == "accuracy" and "language control" not in caption(found)


def test_the_task_scores_the_language_control_apart():
    for kind in ("count", *LANGUAGE_CONTROL):
        doc = {"answer": "7", "question_type": kind}
        found = process_results(doc, [" 7. "])
        assert found["accuracy"] == found[f"accuracy_{kind}"] == 1.0
        assert (VISUAL in found) == (kind not in LANGUAGE_CONTROL)
