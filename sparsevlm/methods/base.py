"""Base of all methods: a dataclass of options that plans how many tokens stay and scores them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import KW_ONLY, dataclass, fields
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsevlm.budget import Schedule, check_budget

if TYPE_CHECKING:
    from sparsevlm.runtime.bias import LogitBias
    from sparsevlm.runtime.families import Family
    from sparsevlm.runtime.prefill import Prefill
    from sparsevlm.runtime.stage import Stage
    from sparsevlm.runtime.trace import StageRecord, Trace


@dataclass(frozen=True)
class Method:
    """Base of all methods. A subclass sets `name`, adds its options as fields and overrides what differs.

    Calling a method with a model gives a context manager: inside it the model prunes, after it the model is what it
    was before. The runtime uses the class attributes and the members below `__call__` only. A method never changes:
    what it must remember belongs to the block (`attach`) or to the prompt (`Prefill.scratch`), so that one object may
    be used in several models, copied, compared and pickled at any time.

    Attributes:
        budget: mean visual tokens per layer as they leave the layers (see `sparsevlm.budget`), a share of them between
            0 and 1, "full", or None when the method's own options say how many tokens stay.
    """

    _: KW_ONLY
    budget: int | float | str | None = None

    name: ClassVar[str] = ""
    # read by the runtime; a method may make options of them
    early_drop = True  # a pruning layer computes only the rows that outlive it (see runtime/early.py)
    # position ids of survivors: their own, or "renumber" to 0 ... n - 1; sliding windows count in them
    positions = "original"
    recycle = 0.0  # share of the dropped tokens that is merged instead (`core.recycling`); needs `merge_tokens`
    cluster = 0.1  # merged tokens per recycled one
    recycled_at = "end"  # merged tokens come after the kept visual ones, or take the place of their "centre"
    needs_text: ClassVar[bool] = False  # tokens are rated by text after the image; a prompt without it stays whole
    reads_text: ClassVar[bool] = True  # what stays depends on the text after the image
    scores_next: ClassVar[bool] = False  # score a stage with the norm and projections of the layer after it
    scores_entered: ClassVar[bool] = False  # also looks at the states that entered the layer (`Prefill.entered`)
    rereads = False  # generated tokens read the prompt's keys otherwise, too: a cache goes on in such a block only
    keeps_tokens: ClassVar[bool] = False  # it removes computation instead of tokens: reports say "tokens kept: all"
    removes: ClassVar[list[str]] = []  # of such a method the options that are set to remove something
    adds_bias = False  # adds to attention logits (`logit_bias`); needs the sdpa or the eager backend
    adaptive: ClassVar[bool] = False  # counts depend on the picture: the host must wait for the device at each stage

    def __post_init__(self) -> None:
        self._set("budget", check_budget(self.budget))
        for option in fields(self):
            if option.name != "budget":
                self._set(option.name, checked(option.name, getattr(self, option.name), str(option.type)))

    def _set(self, option: str, value: Any) -> None:
        """Replace an option by its normal form, from `__post_init__`."""
        object.__setattr__(self, option, value)

    def __call__(self, model: nn.Module, visual_mask: Tensor | None = None) -> AbstractContextManager[Trace]:
        """Install the method in `model` for the duration of a `with` block, which receives the trace.

        Inside it the model belongs to this method and to the thread that entered the block; it cannot be copied there.
        A cache that was pruned goes on inside a block of the same method only, with the attention_mask that it began
        with (on a device that is not compared at single steps of a loop of your own, which would have to wait). Prompts
        are prefilled as a whole (`prefill_chunk_size` is ignored). What torch.compile has compiled is compiled anew for
        the block.

        Args:
            model: a vision-language model of a family in `sparsevlm.runtime.families.RECORDS`, or a Llama, Mistral,
                Qwen2 or Qwen3 text model; also inside a `peft.PeftModel`.
            visual_mask: [B, L] bool, where the visual tokens of the one prompt of this block are, for callers that pass
                `inputs_embeds` with features in them. Otherwise they are found from `input_ids`, or from embeddings
                that come with pixel values.

        Raises:
            ValueError: unsupported model, pruning layers that do not fit it, or another method active on it; inside the
                block, a call that it cannot see or that would be pruned otherwise than as a whole.
        """
        from sparsevlm.runtime.hooks import install

        return install(self, model, visual_mask)

    # ---- called by the runtime -------------------------------------------------------------------------------------
    def check(self, family: Family) -> None:
        """Raise ValueError if the method cannot work on this model. Called on installation."""

    def attach(self, family: Family) -> Any:
        """Return what the method knows of this model while it is installed in it. Called after `check`.

        The result is passed to `hooks`, `announce` and `schedule`, and prefills carry it as `attached`.
        """
        return None

    def hooks(self, attached: Any) -> list[RemovableHandle]:
        """Register further hooks (vision tower, projector) and return them; they are removed with ours."""
        return []

    def check_call(self, attached: Any, arguments: dict[str, Any]) -> None:
        """Raise ValueError if the method cannot follow a call with these arguments, before pictures are encoded."""

    def announce(self, attached: Any, input_ids: Tensor) -> None:
        """Take note of the new tokens [B, L] of the prompts whose pictures are encoded next."""

    def look_ahead(
        self, attached: Any, input_ids: Tensor | None, visual: Tensor | None, arguments: dict[str, Any]
    ) -> None:
        """Look at a call of the model, or of its generate(), before anything of it is computed.

        Args:
            attached: see `attach`.
            input_ids: [B, L] its new tokens; -1 = an embedding; None = unknown.
            visual: [B, L] bool, which of them are visual; None = none, or unknown.
            arguments: of the call, by name.
        """

    def forget(self, attached: Any) -> None:
        """Discard what was announced. Called when that call has failed."""

    def plan(self, n_visual: int, n_layers: int) -> Schedule:
        """Return the schedule for a prompt; by default nothing is dropped.

        Raises:
            ValueError: a budget that this prompt or model cannot meet.
        """
        return Schedule(n_visual, n_layers, (), (), (), ())

    def schedule(self, n_visual: int, n_layers: int, attached: Any) -> Schedule:
        """Return the same for a model in which the method is installed."""
        return self.plan(n_visual, n_layers)

    def stages(self, counts: Sequence[int], n_layers: int, attached: Any) -> list[int]:
        """Return the layers after which tokens may go, of prompts with these numbers of visual tokens."""
        schedules = [self.schedule(n, n_layers, attached) for n in counts if n]
        return sorted(
            {layer for s in schedules for layer, n in zip(s.layers, s.after, strict=True) if n < s.n_visual}
            | {layer for s in schedules for layer in s.layers if self.adaptive}
        )

    def positions_after(self, layer: int) -> str:
        """Return `positions` of the rows that a stage on the output of `layer` leaves (-1 = at the input)."""
        return self.positions

    def stand_at(self, prefill: Prefill, index: Tensor) -> Tensor:
        """Return the rows [B, N] whose positions rows `index` [B, N] take that keep "original" positions."""
        return index

    def logit_bias(self, prefill: Prefill) -> LogitBias | None:
        """Return what is added to attention logits from layer 0 on, once tokens are dropped at the input."""
        return None

    def begin(self, prefill: Prefill, embeddings: Tensor) -> None:
        """Look at the input embeddings [B, L, D] once per prompt, before layer 0; raters are chosen here."""

    def score(self, stage: Stage) -> Tensor:
        """Return scores [B, V] of the visual tokens that enter a stage; the highest stay."""
        raise NotImplementedError

    def keep_all(self, stage: Stage) -> None:
        """Follow a stage that drops nothing. Called there instead of `score`."""

    def keep_counts(self, stage: Stage) -> list[int]:
        """Return the tokens to keep per sample. Adaptive methods override this; it is called after their `score`."""
        return [s.at(stage.layer, n)[0] for s, n in zip(stage.prefill.schedules, stage.n_visual, strict=True)]

    def before_drop(self, prefill: Prefill, layer: int, hidden: Tensor) -> Tensor:
        """Return what the states [B, L, D] become before tokens are dropped from them after `layer`."""
        return hidden

    def gated_layer(self, attached: Any) -> int | None:
        """Return the first layer to whose cache generated tokens are written only if `writes` says so; None = all are.

        It is a layer that follows a pruning layer (`stages`).
        """
        return None

    def writes(self, attached: Any, states: Tensor) -> Tensor:
        """Return which generated tokens [B, n] later ones shall see, from their states [B, n, D] at `gated_layer`."""
        raise NotImplementedError(f"{self.name} gates generated tokens. Override writes to say which are kept")

    def annotate(self, record: StageRecord, prefill: Prefill) -> None:
        """Add to the trace's record of a stage what the runtime cannot know about it."""

    def merge_tokens(self, tokens: Tensor, clusters: Tensor, width: int, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return centres [B, width] and weights [B, width, m] that merge recycled tokens [B, m, D] into `width`."""
        raise NotImplementedError(f"{self.name} recycles tokens (recycle > 0). Override merge_tokens to merge them")


def int_tuple(value: Sequence[int] | int | None, what: str) -> tuple[int, ...] | None:
    """Normalise an option that lists integers (also from a config file or the command line).

    Raises:
        ValueError: an entry that is not an integer.
    """
    if value is None:
        return None
    items = [value] if isinstance(value, (int, float)) else list(value)
    try:
        if any(isinstance(v, bool) for v in items):
            raise TypeError
        out = tuple(int(v) for v in items)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{what} must be integers, not {value!r}") from None
    if any(float(v) != o for v, o in zip(items, out, strict=True)):
        raise ValueError(f"{what} must be integers, not {value!r}")
    return out


#: Annotations of options whose values are checked against them, and what a message calls such a value.
_TYPES = {
    "bool": (bool, "true or false"),
    "int": (Real, "an integer"),  # whole floats become integers
    "float": (Real, "a number"),
    "str": (str, "a name"),
    "None": (type(None), "null"),
}


def checked(name: str, value: Any, kind: str) -> Any:
    """Return an option's value, a whole number as int where `kind`, its annotation, says so.

    Raises:
        ValueError: a value of another type, or a number that is infinite, not a number or not whole.
    """
    kinds = kind.split(" | ")
    if all(k in _TYPES for k in kinds):
        fits = any(isinstance(value, _TYPES[k][0]) and (k == "bool" or not isinstance(value, bool)) for k in kinds)
        if not fits:
            raise ValueError(f"{name} takes {' or '.join(_TYPES[k][1] for k in kinds)}, not {value!r}")
    elif isinstance(value, bool):
        raise ValueError(f"{name} takes numbers, not {value}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} takes a finite number, not {value}")
    if isinstance(value, float) and "int" in kind and "float" not in kind:
        if not value.is_integer():
            raise ValueError(f"{name} takes integers, not {value}")
        return int(value)
    return value


def one_of(value: str, known: Sequence[str], what: str) -> str:
    """Return `value` if it is among `known`, else raise a ValueError that lists them."""
    if value not in known:
        raise ValueError(f"{what} {value!r} is unknown; known: {', '.join(known)}")
    return value
