"""The text of `flops_table.py`: tables of counted multiply-adds in Markdown."""

from __future__ import annotations

from sparsevlm.cost.flops import cells
from sparsevlm.markdown import markdown_of_records


def text(result: dict, uncounted: dict[str, str]) -> str:
    """Everything as Markdown; `uncounted`: methods left out, and why."""
    n = result["text_tokens"]
    left_out = "; ".join(f"{m} ({why})" for m, why in uncounted.items())
    out = [
        f"# Counted multiply-adds\n\nOne picture (Video-LLaVA: one video of 8 frames) and {n} other tokens, batch 1. "
        "By fvcore on the meta device; 1 GMAC = 2 GFLOP. Counted: the matrix products of the unmodified forward pass "
        "with the method's hooks: linear layers, QK^T and PV of attention (n x n: no credit for causality), patch "
        "embedding, the output head on the last token, and the method's own products. Not counted: element-wise work, "
        "norms, softmax, rotary embedding, sorting, the singular values behind a rank. *vision* and *projector* are "
        "the model's own layers as they run, *method* is what the method computes itself, wherever it does (tower, "
        "projector, language model). *prefill* is the language model with the method's work, of every method; *first "
        "token* is the prefill with tower and projector. *early_drop=False* is the plain form: every row of a pruning "
        f"layer computed. Methods left out: {left_out}.\n"
    ]
    for model in dict.fromkeys(row["model"] for row in result["rows"]):
        printed = [cells(row) for row in result["rows"] if row["model"] == model]
        for cell in printed:
            del cell["model"]
        out.append(f"## {model}\n\n{markdown_of_records(printed, 2)}\n")
    if "paper" in result:
        out.append(paper_text(result))
    return "\n".join(out)


def paper_text(result: dict) -> str:
    """The paper's column and claims beside ours."""
    rows = [
        {
            "method": r["method"],
            "budget": str(r["budget"]),
            "paper": f"{r['paper']:.2f}",
            "the paper's formula": f"{r['formula']:.3f}",
            "counted, plain": f"{r['counted_plain']:.3f}",
            "counted": f"{r['counted']:.3f}",
        }
        for r in result["paper"]
    ]
    claims = [
        {
            "claimed %": f"{r['claim']:g}",
            "where": r["where"],
            "what it is": r["meaning"],
            "formula %": f"{r['formula']:.1f}",
            "counted, plain %": f"{r['counted_plain']:.1f}",
            "counted %": f"{r['counted']:.1f}",
        }
        for r in result["claims"]
    ]
    return (
        "## The paper's column\n\nTable 1 of [v4](https://arxiv.org/abs/2410.04417v4), LLaVA-1.5-7B, in TMAC (10^12 "
        'multiply-adds; the paper writes "TFLOPs"), at 118 text tokens. The formula is the one of the authors\' code, '
        "4nd^2 + 2n^2d + 3ndm per layer, on the lengths that enter our layers; it leaves out the head, the scores and "
        "the recycling. Both counts are of the prefill: the language model with its head and the method's own work. "
        "*counted, plain*: fvcore, every row of a pruning layer computed, as in the authors' code; "
        "*counted*: the default, with early drop.\n\n"
        + markdown_of_records(rows, 2)
        + "\n\n## The paper's claims\n\nSavings of the prefill by SparseVLM, its own work included.\n\n"
        + markdown_of_records(claims, 3)
        + "\n"
    )
