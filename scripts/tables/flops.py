"""Tables of counted multiply-adds from the runs of `python -m eval.measure.flops`, and the paper's numbers beside them.

Of several counts of one setting the newest is shown. Rows of runs that booked the work otherwise are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eval.runs.reader import FLOPS, Run, label
from scripts.published import look_up
from scripts.tables.formats import Cell, Part, Table, cell

MODEL, TEXT_TOKENS = "llava_1_5_7b", 118  # at this length the authors' formula gives the paper's column
_PLAIN = {"early_drop": False}
_CLAIMS = (  # of the paper's text: version, where, metric, budget, text tokens, what it is
    ("v1", "Abstract", "flops_reduction_smallest", 128, 130, "budget 128; a range over lengths: 130 text tokens"),
    ("v1", "Abstract", "flops_reduction_largest", 128, 70, "the same at 70 text tokens"),
    ("v4", "Abstract", "flops_reduction", 192, 118, "budget 192 of table 1; the 97 % beside it are of budget 128"),
    ("v4", "Section 5.3", "flops_reduction", 128, 118, "budget 128 of table 1"),
    ("v1", "Section 5.3", "flops_reduction", 64, 118, "of VoCo-LLaMA's 9.6 T, not of the 4.62 T of table 1"),
)


@dataclass(frozen=True)
class Count:
    """One counted setting: its row (see `eval.measure.flops`) and the run folder that it is from."""

    row: dict
    run: str


Counts = dict[tuple[str, str, str, int], Count]  # by model, method with its options, budget, text tokens


def flops_tables(runs: Sequence[Run]) -> list[Table]:
    """Make the tables: one per model and prompt length, then the paper's column and claims if counted."""
    counts = _newest(runs)
    shown = dict.fromkeys((model, length) for model, _, _, length in counts)
    tables = [_all(counts, model, length) for model, length in shown]
    return tables + [table for table in (_paper_column(counts), _paper_claims(counts)) if table is not None]


def _newest(runs: Sequence[Run]) -> Counts:
    found: Counts = {}
    for run in sorted((r for r in runs if r.task == FLOPS), key=lambda r: r.metrics["date"]):
        for row in run.metrics["rows"]:
            if "method" in row.get("gmacs", {}):
                key = run.model, label(row["method"], row["options"]), str(row["budget"]), row["text_tokens"]
                found[key] = Count(row, run.folder.name)
    return found


def _saved(row: dict, full: dict, key: str = "prefill_gmacs") -> float:
    return 100 * (1 - row[key] / full[key])


def _all(counts: Counts, model: str, length: int) -> Table:
    """Every setting of a model at one prompt length."""
    chosen = {key: count for key, count in counts.items() if key[0] == model and key[3] == length}
    full = chosen.get((model, "none", "full", length))
    rows = []
    for (_, method, budget, _), count in chosen.items():
        row, gmacs = count.row, count.row["gmacs"]
        saved = ["–"] * 2 if full is None else [
            f"{_saved(row, full.row, key):.1f}" for key in ("prefill_gmacs", "first_token_gmacs")
        ]  # fmt: skip
        texts = [
            method, "explicit" if row["budget"] is None else budget, f"{row['entering']:.1f}", f"{row['leaving']:.1f}",
            f"{row['prefill_gmacs']:,.2f}", f"{2 * row['prefill_gmacs']:,.2f}", saved[0], f"{gmacs['method']:,.3f}",
            f"{gmacs.get('guide', 0.0):,.3f}",
            f"{gmacs['vision']:,.2f}", f"{gmacs['projector']:,.3f}", f"{row['first_token_gmacs']:,.2f}", saved[1],
            f"{gmacs['decode']:,.3f}",
        ]  # fmt: skip
        rows.append([cell(text, count.run) for text in texts])
    caption = (
        f"One picture (Video-LLaVA: one video of 8 frames) and {length} other tokens, batch 1. By fvcore on the meta "
        "device; 1 GMAC = 2 GFLOP. Counted: the matrix products of the unmodified forward pass with the method's "
        "hooks: linear layers, QK^T and PV of attention (n x n: no credit for causality), patch embedding, the output "
        "head on the last token, and the method's own products. Not counted: element-wise work, norms, softmax, rotary "
        "embedding, sorting, the singular values behind a rank. vision and projector are the model's own layers as "
        "they run, method is what the method computes itself, wherever it does (tower, projector, language model), "
        "guide a second model that runs first. prefill is the language model with the method's work, of every method; "
        "first token is the prefill with tower and projector. early_drop=False is the plain form: every row of a pruning layer computed."
    )
    columns = ["method", "budget", "entering", "leaving", "prefill GMAC", "GFLOP", "saved %", "of it method GMAC",
               "of it guide GMAC", "vision GMAC", "projector GMAC", "first token GMAC", "of it saved %",
               "decode GMAC/token"]  # fmt: skip
    return Table(f"flops__{model}__t{length}", f"Multiply-adds: {model}", caption, columns, rows)


def _forms(counts: Counts, method: str, budget: int | str, length: int) -> tuple[Count, Count] | None:
    """The plain and the default form of a setting of LLaVA-1.5-7B; None if it was not counted."""
    found = counts.get((MODEL, method, str(budget), length))
    plain = counts.get((MODEL, label(method, _PLAIN), str(budget), length), found)
    return None if found is None else (plain, found)


def _paper_column(counts: Counts) -> Table | None:
    """Table 1 of the paper beside our counts, in 10^12 multiply-adds (the paper's "TFLOPs")."""
    printed = look_up("SparseVLM", "v4", "Table 1", model=MODEL, benchmark="efficiency", metric="flops")
    rows: list[list[Cell]] = []
    for line in printed.itertuples():
        budget = "full" if line.method == "none" else line.tokens
        if forms := _forms(counts, line.method, budget, TEXT_TOKENS):
            plain, found = forms
            ours = plain.row["formula_gmacs"], plain.row["prefill_gmacs"], found.row["prefill_gmacs"]
            paper = (Part(f"{line.number:.2f}", source=line.source),)
            rows.append([cell(line.method), cell(str(budget)), paper,
                         *(cell(f"{gmacs / 1e3:.3f}", plain.run, found.run) for gmacs in ours)])  # fmt: skip
    caption = (
        "Table 1 of v4 of the paper (https://arxiv.org/abs/2410.04417v4), LLaVA-1.5-7B, in TMAC (10^12 multiply-adds; "
        f'the paper writes "TFLOPs"), at {TEXT_TOKENS} text tokens. The formula is the one of the authors\' code, '
        "4nd^2 + 2n^2d + 3ndm per layer, on the lengths that enter our layers; it leaves out the head, the scores and "
        "the recycling. Both counts are of the prefill: the language model with its head and the method's own work. "
        "counted, plain: fvcore, every row of a pruning layer computed, as in the authors' code; counted: the default, "
        "with early drop."
    )
    columns = ["method", "budget", "paper", "the paper's formula", "counted, plain", "counted"]
    return Table("flops_paper", "Multiply-adds beside the paper's", caption, columns, rows) if rows else None


def _paper_claims(counts: Counts) -> Table | None:
    """Savings that the paper states, beside ours of the setting each belongs to."""
    rows = []
    for version, where, metric, budget, length, meaning in _CLAIMS:
        (printed,) = look_up("SparseVLM", version, where, metric=metric, tokens=budget).itertuples()
        full, forms = counts.get((MODEL, "none", "full", length)), _forms(counts, "sparsevlm", budget, length)
        if full is not None and forms is not None:
            plain, found = forms
            saved = (
                _saved(plain.row, full.row, "formula_gmacs"), _saved(plain.row, full.row), _saved(found.row, full.row)
            )  # fmt: skip
            ours = [cell(f"{share:.1f}", full.run, plain.run, found.run) for share in saved]
            claimed = (Part(f"{printed.number:g}", source=printed.source),)
            rows.append([claimed, cell(f"{version}, {where}"), cell(meaning), *ours])
    caption = "Savings of the prefill of LLaVA-1.5-7B by SparseVLM that the paper states, its own work included."
    columns = ["claimed %", "where", "what it is", "formula %", "counted, plain %", "counted %"]
    return Table("flops_claims", "Claimed savings", caption, columns, rows, 3) if rows else None
