"""Published numbers: the file is sound, and exactly the flagged numbers do not follow from the others."""

import pytest

from scripts import recompute
from scripts.published import PATH, decimals, look_up, published

ICML = ("SparseVLM", "v4", "Table 1")


def value(paper, version, table, **columns):
    (text,) = look_up(paper, version, table, **columns)["value"]
    return float(text)


def test_every_number_that_can_be_recomputed_follows_unless_it_is_flagged():
    frame = published()
    found = recompute.checks(frame)
    assert len(found) > 300 and len({c.row for c in found}) == len(found)
    wrong = {c.row: c.value for c in found if not recompute.follows(c, frame)}
    flagged = frame[frame["flag"].isin(["misprint", "mixed rows", "stale"]) & (frame["recomputed"] != "")]
    assert set(wrong) == set(flagged.index) and len(wrong) == 22
    for row, text in flagged["recomputed"].items():
        assert round(wrong[row], decimals(text)) == pytest.approx(float(text))


@pytest.mark.parametrize(
    "changed",
    [
        (*ICML, {"method": "fastv", "tokens": 64, "benchmark": "pope", "metric": "retained"}),
        (*ICML, {"method": "sparsevlm", "tokens": 128, "benchmark": "average", "metric": "retained"}),
        ("SparseVLM", "v1", "Table 1", {"method": "tome", "tokens": 64, "benchmark": "average"}),
        ("SparseVLM", "v4", "Table 3", {"method": "sparsevlm", "benchmark": "average", "metric": "judge_score"}),
        ("SparseVLM", "v4", "Table 2", {"method": "sparsevlm", "tokens": 500, "benchmark": "average"}),
        ("SparseVLM", "v4", "Introduction", {"metric": "gain_over_fastv_largest", "model": "llava_1_5_7b"}),
        ("RESTORE", "ICML 2026", "Table 1", {"method": "tome", "tokens": 128, "benchmark": "average"}),
        ("DART", "EMNLP 2025", "Table 2", {"method": "fastv", "metric": "speedup"}),
        ("SparseVLM code", "main, 1_0", "score.py", {"tokens": 128, "metric": "tokens_leaving"}),
    ],
    ids=str,
)
def test_a_wrong_digit_is_found(changed):
    *where, columns = changed
    frame = published().copy()
    (row,) = look_up(*where, **columns).index
    frame.loc[row, "number"] += 0.4
    frame.loc[row, "value"] = f"{frame.loc[row, 'number']:.{decimals(frame.loc[row, 'value'])}f}"
    assert row in {c.row for c in recompute.checks(frame) if not recompute.follows(c, frame)}


def test_the_headline_mixes_two_rows():
    """54 % of the FLOPs, 37 % of the latency, 97 % of the accuracy: from Table 1, by hand."""
    saved = {}
    for tokens in (192, 128):
        for metric in ("flops", "latency"):
            now = value(*ICML, method="sparsevlm", tokens=tokens, metric=metric)
            saved[tokens, metric] = 100 * (1 - now / value(*ICML, method="none", metric=metric))
    kept = {t: value(*ICML, method="sparsevlm", tokens=t, benchmark="average") for t in (192, 128)}
    assert (round(saved[192, "flops"]), round(saved[192, "latency"]), round(kept[192])) == (54, 37, 99)
    assert (round(saved[128, "flops"]), round(saved[128, "latency"]), round(kept[128])) == (63, 42, 97)
    (claim,) = look_up("SparseVLM", "v4", "Abstract", metric="retained").to_dict("records")
    assert claim["flag"] == "mixed rows" and claim["value"] == "97" and claim["recomputed"] == "99.1"


def test_mm_vet_lifts_the_average_of_192_tokens():
    rows = look_up(*ICML, method="sparsevlm", tokens=192, metric="score")
    full = look_up(*ICML, method="none", metric="score").set_index("benchmark")["number"]
    ratios = {b: 100 * x / full[b] for b, x in zip(rows["benchmark"], rows["number"], strict=True)}
    assert sum(ratios.values()) / 8 == pytest.approx(99.1, abs=0.05) and ratios.pop("mmvet") > 107
    (average,) = look_up(*ICML, method="sparsevlm", tokens=192, benchmark="average").to_dict("records")
    assert average["flag"] == "lifted" and float(average["recomputed"]) == round(sum(ratios.values()) / 7, 1)


def test_no_source_is_left_out_and_names_are_ours():
    frame = published()
    assert len(frame) > 1100 and not frame["source"].eq("").any()
    rerun = look_up("RESTORE", "ICML 2026", method="divprune", tokens=64, benchmark="gqa")
    assert rerun["value"].tolist() == ["57.1"] and rerun["kind"].tolist() == ["rerun"]
    assert value(*ICML, method="sparsevlm", tokens=64, benchmark="pope", metric="score") == 77.5


@pytest.mark.parametrize(
    "old, new, message",
    [
        (",rerun,", ",hearsay,", "unknown kind 'hearsay'"),
        ("paper,version", "papers,version", "expected paper, version"),
        (",61.9,", ",61.9x,", "61.9x"),
    ],
)
def test_a_file_that_is_not_sound_is_refused(tmp_path, old, new, message):
    text = PATH.read_text(encoding="utf-8")
    path = tmp_path / "published.csv"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        published(path)


def test_a_number_twice_is_refused(tmp_path):
    lines = PATH.read_text(encoding="utf-8").splitlines(keepends=True)
    path = tmp_path / "published.csv"
    path.write_text("".join([*lines[:6], lines[3], *lines[6:]]), encoding="utf-8")
    with pytest.raises(ValueError, match="line 7 stands there twice"):
        published(path)
