"""The paper's Table 1 in both editions, its video table and Table 2 (Qwen2-VL): ours | the paper's | a rerun's.

Ours come from run folders (`benchmarks.py` says which), the others from `eval/published.csv`. What nobody ran
here says "not run".
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from eval.runs.reader import Run
from scripts.published import look_up
from scripts.tables.benchmarks import (
    CONBENCH,
    GQA,
    JUDGED,
    MMBENCH,
    MME,
    MMVET,
    POPE,
    SCIENCEQA,
    SEEDBENCH,
    TEXTVQA,
    TEXTVQA_OCR,
    VIDEO,
    VQAV2,
    Benchmark,
    left_out,
    limited,
    other_judge,
    paper_runs,
    value,
)
from scripts.tables.formats import FLAGGED, NOT_JUDGED, NOT_RUN, NOTHING, Cell, Part, Table, cell

RERUN = ("RESTORE", "ICML 2026", "Table 1")
UNPRUNED = "none"


@dataclass(frozen=True)
class Edition:
    """One table of one edition of the paper.

    Attributes:
        name: of the table's files.
        title: for people.
        published: paper, version and table in `eval/published.csv`.
        model: of the configuration.
        experiment: what is given to `eval.run` for the paper's settings.
        benchmarks: columns.
        methods: rows per budget, in the paper's order.
        budgets: in the paper's order.
        limit: questions per benchmark that the edition asks; None = all.
        source_model: model in `eval/published.csv`; "" = as `model`.
        protocol: what is known of how the published numbers were made, for the caption.
    """

    name: str
    title: str
    published: tuple[str, str, str]
    model: str
    experiment: str
    benchmarks: Sequence[Benchmark]
    methods: Sequence[str]
    budgets: Sequence[int]
    limit: int | None = None
    source_model: str = ""
    protocol: str = ""

    def command(self, tasks: Iterable[str]) -> str:
        """What fills the table's gaps."""
        return (
            f".venv/bin/python -m eval.run -m {self.experiment} method={','.join([UNPRUNED, *self.methods])} "
            f"budget={','.join(map(str, self.budgets))} task={','.join(dict.fromkeys(tasks))}"
        )


_BASELINES = ("tome", "fastv", "pyramiddrop", "sparsevlm")
_LLAVA = ("llava_1_5_7b", "experiment=llava_1_5_7b_paper")
_VIDEO = ("video_llava_7b", "experiment=video_llava_7b_paper")
_VIDEO_ROWS = (VIDEO, ("fastv", "sparsevlm"))
EDITIONS = (
    Edition("table1_icml", "Table 1 of the ICML paper (v4): LLaVA-1.5-7B", ("SparseVLM", "v4", "Table 1"), *_LLAVA,
            (GQA, MMBENCH, MME, POPE, SCIENCEQA, SEEDBENCH, TEXTVQA, MMVET), _BASELINES, (192, 128, 64)),
    Edition("table1_v1", "Table 1 of the first version (v1): LLaVA-1.5-7B", ("SparseVLM", "v1", "Table 1"), *_LLAVA,
            (GQA, MMBENCH, MME, POPE, SCIENCEQA, VQAV2, TEXTVQA, CONBENCH), ("tome", "fastv", "sparsevlm"),
            (192, 128, 64)),
    Edition("video_icml", "Video table of the ICML paper (v4): Video-LLaVA-7B", ("SparseVLM", "v4", "Table 3"), *_VIDEO,
            *_VIDEO_ROWS, (194,), limit=1000),
    Edition("video_v1", "Video table of the first version (v1): Video-LLaVA-7B", ("SparseVLM", "v1", "Table 2"),
            _VIDEO[0], f"{_VIDEO[1]} limit=null", *_VIDEO_ROWS, (135,)),
    Edition("table2_icml", "Table 2 of the ICML paper (v4): Qwen2-VL", ("SparseVLM", "v4", "Table 2"), "qwen2_vl_7b",
            "experiment=qwen2_vl_7b_paper", (MMBENCH, POPE, TEXTVQA_OCR), ("sparsevlm",), (600, 500, 400),
            source_model="qwen2_vl",
            protocol="The paper does not say the model's size, the layers or the lists, and there is no code. Its "
            "about 1320 visual tokens on all three benchmarks fit pictures scaled up to at least 1,003,520 pixels "
            "(1280 tokens), as VLMEvalKit does for Qwen2-VL; ours: the 7B model with these limits, layers and lists "
            "scaled from LLaVA-1.5's, survivors keep their positions. A picture with fewer tokens keeps all."),
)  # fmt: skip


@dataclass(frozen=True)
class _Number:
    """A value, how it is printed, and where it is from."""

    value: float
    text: str
    runs: tuple[str, ...] = ()
    source: str = ""
    counts: bool = True  # in averages: not if only some of the questions were asked


Numbers = Mapping[tuple[str, int | str, str], _Number]  # (method, budget, column) -> number


def paper_table(edition: Edition, runs: Sequence[Run]) -> Table:
    """One of EDITIONS, with what was run."""
    chosen = paper_runs(runs, edition.model)
    ours = _ours(edition, chosen)
    paper = _published(edition, *edition.published)
    rerun = _published(edition, *RERUN)
    kinds = {"ours": ours, "paper": paper} | ({"rerun": rerun} if rerun else {})
    rows, tasks = [], []
    for method, budget in _settings(edition, kinds):
        row = [cell(method), cell(str(budget))]
        for benchmark in edition.benchmarks:
            found = {kind: numbers.get((method, budget, benchmark.label)) for kind, numbers in kinds.items()}
            found["ours"] = mine = ours.get((method, budget, benchmark.ours))
            row += _cells(found, bool(benchmark.apart))
            if mine is None or not mine.counts:
                tasks.append(benchmark.task)
        rows.append([*row, *_averages(edition, kinds, method, budget)])
    names = [name for b in edition.benchmarks for name in ((b.label, b.apart) if b.apart else (b.label,))]
    return Table(
        edition.name,
        edition.title,
        _caption(
            edition, kinds, [b.task for b in edition.benchmarks if b.task in tasks], left_out(runs, edition.model)
        ),
        ["method", "tokens", *names, *_average_names(edition)],
        rows,
    )


def _ours(edition: Edition, chosen: Mapping[tuple, Run]) -> Numbers:
    found = {}
    for (task, method, budget), run in chosen.items():
        for benchmark in edition.benchmarks:
            if benchmark.task != task:
                continue
            number, n = value(run, benchmark), run.metrics["n"]
            if number is None:
                found[method, budget, benchmark.label] = _Number(0.0, NOT_JUDGED, (run.folder.name,), counts=False)
                continue
            whole = not limited(run) or n == edition.limit
            remarks = [
                "" if whole else f" (n={n})",
                f" (judge: {judge})" if (judge := other_judge(run, benchmark)) else "",
            ]
            text = f"{number:.{benchmark.digits}f}" + "".join(remarks)
            found[method, budget, benchmark.ours] = _Number(number, text, (run.folder.name,), counts=whole)
    return found


def _published(edition: Edition, *where: str) -> Numbers:
    rows = look_up(*where, model=edition.source_model or edition.model)
    columns = {(b.task, b.published): b.label for b in edition.benchmarks} | {("average", "retained"): "average"}
    found = {}
    for row in rows.to_dict("records"):
        label = columns.get((row["benchmark"], row["metric"]))
        if label is not None:
            budget = "full" if row["method"] == UNPRUNED else int(row["tokens"])
            remarks = [f"{row['flag']}: {row['recomputed'] or 'see note'}" if row["flag"] else "", row["note"]]
            source = f"{row['paper']} {row['version']}, {row['table']}: {row['source']}"
            found[row["method"], budget, label] = _Number(
                row["number"],
                row["value"] + (FLAGGED if row["flag"] else ""),
                source=". ".join([source, *filter(None, remarks)]),
            )
    return found


def _settings(edition: Edition, kinds: Mapping[str, Numbers]) -> list[tuple[str, int | str]]:
    """Rows: unpruned, then per budget the paper's methods, those of the rerun, and what else was run."""
    rows: list[tuple[str, int | str]] = [(UNPRUNED, "full")]
    extra = {(m, b) for k in kinds for m, b, _ in kinds[k] if m not in (*edition.methods, UNPRUNED)}
    budgets = [*edition.budgets, *sorted({b for _, b in extra} - set(edition.budgets), key=str, reverse=True)]
    for budget in budgets:
        if budget in edition.budgets:
            rows += [(method, budget) for method in edition.methods]
        rows += sorted((m, b) for m, b in extra if b == budget)
    return rows


def _triple(found: Mapping[str, _Number | None]) -> Cell:
    empty = {"ours": NOT_RUN, "paper": NOTHING, "rerun": NOTHING}
    return tuple(
        Part(empty[kind], kind) if n is None else Part(n.text, kind, n.runs, n.source) for kind, n in found.items()
    )


def _averages(edition: Edition, kinds: Mapping[str, Numbers], method: str, budget: int | str) -> list[Cell]:
    """By the paper's rule (as printed, where the paper prints it), and by the median."""
    mean: dict[str, _Number | None] = {}
    median: dict[str, _Number | None] = {}
    accuracies = [b for b in edition.benchmarks if b.published == "score"]
    for kind, numbers in kinds.items():
        ratios, runs = [], []
        for benchmark in accuracies:
            column = benchmark.ours if kind == "ours" else benchmark.label
            now, full = (numbers.get((*key, column)) for key in ((method, budget), (UNPRUNED, "full")))
            if now is not None and full is not None and now.counts and full.counts and full.value:
                ratios.append(100 * now.value / full.value)
                runs += [*now.runs, *full.runs]
        part = f" ({len(ratios)} of {len(accuracies)})" if len(ratios) < len(accuracies) else ""
        for target, rule in ((mean, statistics.fmean), (median, statistics.median)):
            number = rule(ratios) if ratios else 0.0
            source = "" if kind == "ours" else "computed here from the scores of this row"
            text = f"{number:.1f}{part}"
            target[kind] = _Number(number, text, tuple(dict.fromkeys(runs)), source) if ratios else None
    printed = kinds["paper"].get((method, budget, "average"))
    both = [{**mean, "paper": printed or mean["paper"]}, median]
    return [cell for found in both for cell in _cells(found, _apart(edition))]


def _cells(found: Mapping[str, _Number | None], apart: bool) -> list[Cell]:
    """One cell, or two: what is published, and ours."""
    if not apart:
        return [_triple(found)]
    return [_triple({kind: n for kind, n in found.items() if kind != "ours"}), _triple({"ours": found["ours"]})]


def _apart(edition: Edition) -> bool:
    """Whether ours is a column of its own for any benchmark; then our averages are, too."""
    return any(b.apart for b in edition.benchmarks)


def _average_names(edition: Edition) -> list[str]:
    names = ["average %", "median %"]
    return [n for name in names for n in (name, f"{name} (ours)")] if _apart(edition) else names


def _caption(edition: Edition, kinds: Iterable[str], tasks: Sequence[str], others: int) -> str:
    names = {
        "ours": "ours",
        "paper": " ".join(edition.published[:2]) + f", {edition.published[2]}",
        "rerun": "rerun by RESTORE (ICML 2026: official code of each method in one environment)",
    }
    text = (
        f"{edition.title}. Each cell: {' | '.join(names[kind] for kind in kinds)}. {NOT_RUN}: nobody ran it here; "
        f"{NOTHING}: not published; {FLAGGED}: not to be relied on, see `eval/published.csv`. average: mean over the "
        "benchmarks of score / unpruned score (the paper's rule; the paper's as printed); median: the median of the "
        "same ratios, which one benchmark cannot lift. (k of m): over the k benchmarks that there are; (n=...): the "
        "first questions only, in no average."
    )
    text += "".join(f" {b.ours}: {b.remark}." for b in edition.benchmarks if b.remark)
    if any(b.judge for b in edition.benchmarks):
        text += " (judge: ...): not judged by the model that judged the published numbers."
    text += f" {edition.protocol}" if edition.protocol else ""
    if edition.limit:
        text += f" The first {edition.limit} questions of each benchmark; averages are of accuracies."
    if others:
        text += f" {others} runs with another prompt, padding or task option are in tables of their own."
    if tasks:
        text += f" What is missing: `{edition.command(tasks)}`"
        judged = [b.label.split(" ")[0] for b in edition.benchmarks if b.task in tasks and b in JUDGED]
        if judged:
            text += f" ({', '.join(dict.fromkeys(judged))}: a language model judges: set SPARSEVLM_JUDGE)"
    return text
