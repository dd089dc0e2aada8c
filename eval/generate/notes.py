"""What an evaluation notes about pruning, of questions whose answer's place in the picture is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lmms_eval.api.instance import Instance
from torch import Tensor

from sparsevlm.runtime.trace import Trace

TARGETS = "target_patches"


def targets_of(request: Instance, documents: Mapping) -> list[int] | None:
    """Return the visual tokens that show the answer, of tasks whose documents say it; read without the picture."""
    _, _, _, doc_id, task, split = request.args
    found = documents[task][split]
    if TARGETS not in getattr(found, "column_names", ()):
        return None
    return found.select_columns([TARGETS])[doc_id][TARGETS]


def notes_of(trace: Trace, ids: Tensor, targets: Sequence[list[int] | None], tokenizer) -> list[dict]:
    """Return per sample, where its targets are known:

    - `target_kept`: the share of them that the first pruning stage keeps; not where the kept tokens are no patches
    - `raters`: the words that rate, if any do

    Args:
        ids: [B, L] token ids of the prompts.
        targets: of :func:`targets_of`, per sample.
    """
    if not trace.prefills or not trace.prefills[0].stages:
        return [{} for _ in targets]
    record, notes = trace.prefills[0], []
    beams = len(record.stages[0].origin) // len(targets)
    for i, wanted in enumerate(targets):
        note: dict = {}
        if wanted is not None:
            origin = record.stages[0].origin[i * beams].tolist()
            if wanted and not all(index < 0 for index in origin):
                note["target_kept"] = len(set(wanted) & set(origin)) / len(wanted)
            raters = record.raters[i * beams].tolist()
            if raters:
                note["raters"] = tokenizer.convert_ids_to_tokens(ids[i, raters].tolist())
        notes.append(note)
    return notes
