"""Mistakes that the fuzzer must find: `python -m tests.fuzz.mutations` says after how many cases it does.

Each entry puts one mistake into the library through pytest's monkeypatch.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from sparsevlm.core.scores import rank_by_score
from sparsevlm.methods import _vision, sparsevlm
from sparsevlm.runtime import continuing, early, hooks, inputs, prefill, rows, stage
from sparsevlm.runtime.cache_state import CacheState, Segment, extended, state_of
from sparsevlm.runtime.masks import SegmentMasks
from tests.fuzz.__main__ import run_chunk

MUTATIONS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {}
LIMIT = 600  # cases within which each is found


def mutation(function: Callable[[pytest.MonkeyPatch], None]) -> Callable:
    MUTATIONS[function.__doc__.rstrip(".")] = function
    return function


@mutation
def off_by_one(patch):
    """Tokens that follow a renumbered prompt stand one place too early."""
    renumber = prefill.renumber
    patch.setattr(prefill, "renumber", lambda self, *a: renumber(self, *a) + 1)


@mutation
def shift_sign(patch):
    """The shift of positions has the wrong sign."""
    renumber = prefill.renumber
    patch.setattr(prefill, "renumber", lambda self, *a: -renumber(self, *a))


@mutation
def renumber_nothing(patch):
    """Survivors keep their positions, later tokens do not know."""
    renumber = prefill.renumber

    def keep_tables(self, *arguments):
        old = self.tables
        out = renumber(self, *arguments)
        self.tables = old if old is not None and old.shape[1] == self.tables.shape[1] else self.tables.roll(1, 1)
        return out

    patch.setattr(prefill, "renumber", keep_tables)


@mutation
def forgotten_padding(patch):
    """Padding of earlier calls is looked at by later ones."""
    patch.setattr(continuing, "extended", lambda mask, *a: extended(None, *a))


@mutation
def order_rolled(patch):
    """The best token is dropped in place of the one at the margin."""
    patch.setattr(prefill, "rank_by_score", lambda *a: rank_by_score(*a).roll(-1, 1))


@mutation
def misaligned_text(patch):
    """Text behind pictures is looked for where right padding was."""
    patch.setattr(prefill.Prefill, "_align_text", lambda self: None)


@mutation
def recycled_elsewhere(patch):
    """Merged tokens come at the place of their centre where they belong to the end, and the other way round."""

    class Turned:
        def __init__(self, method, recycled_at: str):
            self.merge_tokens, self.recycled_at = method.merge_tokens, recycled_at

    for form in (rows.Block, rows.Scattered):
        merge = form.merge

        def turned(self, d, hidden, source, method, *rest, merge=merge):
            other = {"end": "centre", "centre": "end"}[method.recycled_at]
            return merge(self, d, hidden, source, Turned(method, other), *rest)

        patch.setattr(form, "merge", turned)


@mutation
def segment_lost(patch):
    """The cache does not learn that its later layers are shorter."""
    patch.setattr(CacheState, "split", lambda self, layer: Segment())


@mutation
def first_key_hidden(patch):
    """With early drop, rows of the pruning layer do not see the first key."""
    allowed = early._allowed

    def hide(*arguments):
        out = allowed(*arguments).clone()
        out[:, :, 1:, 0] = False
        return out

    patch.setattr(early, "_allowed", hide)


@mutation
def early_keys_shortened(patch):
    """With early drop, the cache of the pruning layer holds the keys of the row before."""
    drop = early.drop_early

    def rolled(p, decision, at):
        made = at.module_inputs()
        made.keys = made.keys.roll(1, 2)
        return drop(p, decision, at)

    patch.setattr(prefill, "drop_early", rolled)


@mutation
def beams_tiled(patch):
    """The visual mask is repeated prompt after prompt, while beams are repeated within prompts."""
    given = inputs.GivenMask.of

    def tiled(self, *arguments):
        out = given(self, *arguments)
        if out is None or out.shape[0] == self.mask.shape[0]:
            return out
        count = self.mask.shape[0]
        return out.view(count, -1, out.shape[1]).transpose(0, 1).flatten(0, 1)

    patch.setattr(inputs.GivenMask, "of", tiled)


@mutation
def spent_from_the_end(patch):
    """What is left over of a budget goes to the last pictures of a prompt."""
    share = _vision.share
    patch.setattr(_vision, "share", lambda budget, sizes: share(budget, sizes)[::-1])


@mutation
def all_text_rates(patch):
    """Every text token rates."""
    select = sparsevlm.select_raters
    patch.setattr(sparsevlm, "select_raters", lambda *a: select(*a[:4], "all"))


@mutation
def sums_for_means(patch):
    """Merged tokens are divided by their number, without the authors' 1e-6."""
    weigh = sparsevlm.merge_weights

    def exact(group, width, valid, how, dtype):
        out = weigh(group, width, valid, how, dtype)
        return out / out.sum(-1, keepdim=True).clamp(min=1e-9) if how == "mean" else out

    patch.setattr(sparsevlm, "merge_weights", exact)


@mutation
def dropped_input_not_counted(patch):
    """Tokens dropped before the first layer are missing in the length that the cache reports."""
    patch.setattr(prefill, "report_seen_tokens", lambda cache: None)


@mutation
def next_token_off_the_last_place(patch):
    """After a prompt that ends with a picture, the next token is read off the last row, whatever is there."""
    read = hooks.read_prompt

    def last(visual, *arguments):
        out = read(visual, *arguments)
        if out is not None:
            out.last = [visual.shape[1] - 1] * visual.shape[0]
        return out

    patch.setattr(hooks, "read_prompt", last)


@mutation
def counted_twice(patch):
    """A later turn counts what it has dropped itself to what earlier ones dropped."""
    patch.setattr(prefill, "earlier_state", lambda cache: None if cache is None else state_of(cache))


@mutation
def no_query_norm(patch):
    """Scores leave out the norm of queries and keys (Qwen3)."""
    heads = stage.Stage.heads
    patch.setattr(stage.Stage, "heads", lambda self, x, attention, norm: heads(self, x, attention, "no " + norm))


@mutation
def padding_seen(patch):
    """Layers after a stage look at the padding that unequal prompts leave."""
    kwargs = SegmentMasks.kwargs

    def without(self, *arguments):
        self.key_mask = None
        return kwargs(self, *arguments)

    patch.setattr(SegmentMasks, "kwargs", without)


@mutation
def handed_keys_rolled(patch):
    """Keys that scoring hands to the layer are those of the row before."""

    def whole(made):
        return stage.Handed(made.layer, {"k_proj": made.raw_keys.roll(1, 1)})

    patch.setattr(prefill.Handed, "whole", whole)


@mutation
def all_columns(patch):
    """Of a row's attention, the columns of the tokens beside the visual ones are taken."""
    for form in (rows.Block, rows.Scattered):
        columns = form.columns
        patch.setattr(form, "columns", lambda self, x, columns=columns: columns(self, x.roll(1, -1)))


def cases_until_found(name: str, limit: int = LIMIT) -> tuple[int, str] | None:
    """How many cases it takes until one fails, and how it fails; None = not within `limit`."""
    tally = Counter()
    with pytest.MonkeyPatch.context() as patch:
        MUTATIONS[name](patch)
        for chunk in range(0, limit, 100):
            found = run_chunk(7 + chunk, 100, tally, shrink=False)
            if found is not None:
                done = sum(n for k, n in tally.items() if k in ("exact", "refused", "undecided"))
                return done + 1, f"{type(found[1]).__name__}: {found[1]}".splitlines()[0]
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.mutations", description=__doc__)
    parser.add_argument("--limit", type=int, default=LIMIT, help=f"cases within which each must be found ({LIMIT})")
    limit, missed = parser.parse_args().limit, 0
    for name in MUTATIONS:
        found = cases_until_found(name, limit)
        missed += found is None
        print(f"{'not found' if found is None else f'{found[0]:4d} cases'}  {name}", flush=True)
        if found is not None:
            print(f"            {found[1][:110]}", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
