"""Installing a method in a model: pre-hooks on the decoder layers, state on the cache, nothing replaced.

Pruning on the output of layer p happens in the pre-hook of layer p + 1: transformers' own output-recording hooks then
see layer p unpruned and p + 1 pruned, whatever the order of installation.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparsevlm.runtime import axes, bias, generation, inputs, ownership
from sparsevlm.runtime.cache_guard import admit, lock, unlock
from sparsevlm.runtime.cache_state import CacheState, cached_length, seen_tokens, state_of
from sparsevlm.runtime.continuing import Continuing, keep_first_mask
from sparsevlm.runtime.families import locate, unwrapped
from sparsevlm.runtime.injections import Injections
from sparsevlm.runtime.parts import part
from sparsevlm.runtime.places import restored
from sparsevlm.runtime.prefill import Prefill
from sparsevlm.runtime.projections import Projections
from sparsevlm.runtime.prompt import Prompt, read_prompt
from sparsevlm.runtime.trace import Trace

_PASSED_BY = (
    "inside the `with` block of a method its layers can be called only through the {0} that they are part of: call the "
    "model itself (model(...), model.generate(...)), not a part or the forward() of a part"
)


@contextmanager
def install(method, model: nn.Module, visual_mask: Tensor | None = None) -> Iterator[Trace]:
    """Context manager behind `method(model)`; see `Method.__call__`."""
    hooks = Hooks(method, getattr(model, "_orig_mod", model), visual_mask)  # torch.compile(model) wraps the model
    with ownership.owning(hooks):
        try:
            hooks.add()
            yield hooks.trace
        finally:
            hooks.remove()


class Hooks:
    """The hooks of one method in one model.

    Attributes:
        thread: the one that may call the model.
        gated: first layer to whose cache the method decides what is written; None = everything.
        calling: whether the outermost module is being called.
        visual, mask, prefill: of that call; nothing is left of it when it ends, also by an error.
        asleep: whether the method itself calls the model (`ownership.asleep`).
        generating: whether `generate()` runs; prompt_length, prunable: of its prompt.
    """

    def __init__(self, method, model: nn.Module, visual_mask: Tensor | None):
        self.method, self.model = method, unwrapped(model)
        self.family = locate(self.model)
        if visual_mask is None and not self.family.visual_ids:
            raise ValueError("a plain text model needs visual_mask=: a [B, L] bool tensor, True at visual tokens")
        if visual_mask is not None and (visual_mask.dim() != 2 or visual_mask.dtype != torch.bool):
            raise ValueError(f"visual_mask must be [B, L] bool, not {tuple(visual_mask.shape)} {visual_mask.dtype}")
        method.check(self.family)
        self.attached = method.attach(self.family)
        self.gated = method.gated_layer(self.attached)
        self.given = None if visual_mask is None else inputs.GivenMask(visual_mask)
        self.trace = Trace()
        self.handles: list = []
        self.classes: list[tuple[nn.Module, type]] = []  # what modules were instances of
        self.thread = threading.get_ident()
        self.described = repr(method)
        outer = getattr(self.family.outer, "_orig_mod", self.family.outer)
        self.parameters = list(inspect.signature(type(outer).forward).parameters)[1:]
        self.generating, self.prunable, self.warned, self.asleep = False, False, False, False
        self.prompt_length: int | None = None
        self.own_positions = True  # position_ids of the call are the caller's own, not generate()'s
        self.own_generate = vars(model).get("generate")  # set on this object by the user
        self.projections, self.later, self.injections = Projections(self), Continuing(self), Injections(self.family)
        self.cache_state: CacheState | None = None  # of a pruned cache that the call goes on with
        self._forget()

    # ---- installing ------------------------------------------------------------------------------------------------
    def add(self) -> None:
        family = self.family
        keep = self.handles.append
        keep(family.outer.register_forward_pre_hook(self._on_call, with_kwargs=True))
        if family.injections:
            keep(family.decoder.register_forward_pre_hook(self.injections.take, with_kwargs=True))
        keep(family.decoder.register_forward_hook(self._on_output))
        keep(family.outer.register_forward_hook(self._after_call))  # last, also on the same module
        for i, layer in enumerate(family.decoder.layers):
            keep(layer.register_forward_pre_hook(functools.partial(self._on_layer, i), with_kwargs=True))
        self.handles += self.method.hooks(self.attached)
        ownership.own(self.model, family, self.classes)
        generation.entered(self.model, self)
        if self.own_generate is not None:
            call = functools.partial(generation.inside_generate, self, self.own_generate)
            self.model.generate = functools.wraps(self.own_generate)(lambda *args, **kwargs: call(args, kwargs))

    def remove(self) -> None:
        if self.own_generate is not None:
            self.model.generate = self.own_generate
        generation.left(self.model)
        ownership.disown(self.classes)
        while self.handles:
            self.handles.pop().remove()
        self._forget()

    def check_thread(self) -> None:
        """Refuse calls from other threads than the one that entered the block."""
        if not torch.compiler.is_compiling():  # generate() has checked already
            ownership.check_thread(self.thread)

    # ---- one call --------------------------------------------------------------------------------------------------
    def _on_call(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """The outermost module: find the visual tokens. Decode steps do nothing here, so nothing is waited for."""
        if self.asleep:
            return
        self.check_thread()
        if args:
            kwargs = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        embeds, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        self._forget()
        self.calling, self.mask, self.positions = True, kwargs.get("attention_mask"), kwargs.get("position_ids")
        self.cache_state = admit(cache, self.described)
        ids = self._ids(kwargs.get("input_ids"), kwargs)
        self._announce(ids, kwargs)
        pictured = ids is not None and inputs.has_pixels(kwargs)
        if self.given is not None:
            self.visual = self.given.of(ids if embeds is None else embeds, cache, self.generating)
            if self.visual is not None and pictured:
                self.given.check_placeholders(self.visual, inputs.visual_tokens(self.family, ids))
        elif pictured:
            self.visual = inputs.visual_tokens(self.family, ids)
        else:
            inputs.refuse_unmarked(embeds, cache)
        if self.visual is not None and not self.generating:
            axes.check_pictures(self.family, kwargs.get("input_ids"), kwargs)
            if not torch.compiler.is_compiling():
                generation.refuse_from_above(self.family.outer)
        if not self.generating:  # else generate() has shown its prompt
            self.method.look_ahead(self.attached, ids, self.visual, kwargs)

    def _after_call(self, module: nn.Module, args: tuple, out) -> None:
        if not self.asleep:
            self._forget()

    def call_failed(self) -> None:
        """Leave nothing of a call for the next one."""
        if threading.get_ident() != self.thread:  # one that was refused
            return
        self.method.forget(self.attached)
        if self.prefill is not None and self.prefill.cache is not None:  # in the middle
            lock(self.prefill.cache, None)
        self._forget()

    def _forget(self) -> None:
        if self.cache_state is not None:
            self.cache_state.admitted = False
        self.calling, self.cache_state = False, None
        self.visual: Tensor | None = None
        self.mask = self.positions = None  # attention_mask and position_ids, as the caller gave them
        self.prefill: Prefill | None = None
        self.later.step = None
        self.injections.forget()

    def check_prompt(self, ids: Tensor | None, kwargs: dict) -> None:
        """Refuse what generate() could not prune, and announce the pictures of its prompt."""
        tokens = ids if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        if self.given is not None and isinstance(tokens, Tensor) and not seen_tokens(kwargs.get("past_key_values")):
            self.given.check_prompt(tokens)
        if inputs.has_pixels(kwargs) or (self.given is not None and not seen_tokens(kwargs.get("past_key_values"))):
            axes.check_pictures(self.family, ids, kwargs)
        ids = self._ids(ids, kwargs)
        if ids is not None:
            ids = inputs.new_tokens(ids, kwargs)
            self._announce(ids, kwargs)
        visual = None
        if ids is not None and inputs.has_pixels(kwargs):
            visual = inputs.visual_tokens(self.family, ids) if self.given is None else self.given.mask
        self.method.look_ahead(self.attached, ids, visual, kwargs)

    def may_prune(self, kwargs: dict) -> bool:
        """Whether a call with these arguments may bring visual tokens."""
        return self.given is not None or inputs.has_pixels(kwargs)

    def _ids(self, ids: Tensor | None, kwargs: dict) -> Tensor | None:
        """The ids [B, L] of a call; of embeddings that come with pictures those of the placeholders among them."""
        embeds = kwargs.get("inputs_embeds")
        if embeds is not None and self.family.visual_ids and inputs.has_pixels(kwargs):
            return inputs.placeholder_ids(self.family, embeds)
        return ids if isinstance(ids, Tensor) else None

    def _announce(self, ids: Tensor | None, kwargs: dict) -> None:
        """Tell the method whose pictures are about to be encoded: those of `ids`, tokens that no cache holds yet."""
        if ids is not None and inputs.has_pixels(kwargs, inputs.RAW_PIXELS):
            with part("prompt"):
                self.method.check_call(self.attached, kwargs)
                self.method.announce(self.attached, ids)

    def _on_layer(self, i: int, layer: nn.Module, args: tuple, kwargs: dict):
        """Before each decoder layer.

        Raises:
            ValueError: the decoder or a layer was called directly, and where visual tokens are is not known.
        """
        if self.asleep:
            return None
        self.check_thread()
        if not self.calling:
            raise ValueError(_PASSED_BY.format(type(self.family.outer).__name__))
        hidden = args[0] if args else kwargs["hidden_states"]
        cache = kwargs.get("past_key_values")
        if i == 0:
            self._begin(hidden, kwargs, cache)
        new = self.injections.add(i, hidden, None if self.prefill is None else self.prefill.source)
        if self.prefill is not None:
            new = self.prefill.enter(i, new)
            masks = self.prefill.segment_masks
        else:
            masks = self.later.masks(i, new, kwargs, cache)
        if masks is None and new is hidden:
            return None
        if masks is not None:
            with part("masks"):
                kwargs = {**kwargs, **masks.kwargs(i, new)}
        if args:
            return (new, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": new}

    def _begin(self, hidden: Tensor, kwargs: dict, cache) -> None:
        """Layer 0: read the prompt, or find that this call has nothing to prune."""
        visual, self.visual = self.visual, None
        length = hidden.shape[1]
        if cache is not None and length > 1 and cached_length(cache, 0) == 0:
            unlock(cache)  # a fresh or reset cache
        if visual is None:
            state, own = getattr(cache, "sparsevlm", None), self.positions is None
            axes.check_step(self.family, kwargs["position_embeddings"], length, state, own)
            self._refuse_parts(cache, length, None)
            return
        if self.given is not None and cache is not None:
            state_of(cache).block = self.given.block
        past = seen_tokens(cache)
        held = cached_length(cache, 0)
        self.later.settle_mask(length, cache)
        key_mask = inputs.key_mask_of(self.mask, kwargs["attention_mask"], past, held, length)
        limit = None
        if self.prompt_length is not None and self.prompt_length > past:
            limit = min(self.prompt_length - past, length)
        with part("prompt"):
            prompt = read_prompt(visual, key_mask, past, limit, self.method.needs_text)
        self._refuse_parts(cache, length, prompt)
        if prompt is None:
            return
        if prompt.open_ended and cache is not None and not self.generating:  # generate() answers whole prompts
            stages = self.method.stages([n for n in prompt.n_visual if n], self.family.n_layers, self.attached)
            state_of(cache).open_ended = bool(stages)
        if not prompt.visual.any():
            return
        self._check_call(prompt, key_mask, held, cache)
        if cache is not None:
            state_of(cache).tell(past + length, key_mask, length, prompt.padded)
            state_of(cache).deltas = getattr(self.family.outer, "rope_deltas", None)
        if prompt.padded:
            key_mask = key_mask.to(hidden.device)
            if cache is not None:
                key_mask = keep_first_mask(cache, key_mask, length)
        self.prefill = Prefill(self.method, self.attached, self.family, prompt, hidden, kwargs, cache, key_mask)
        self.trace.prefills.append(self.prefill.record)
        self.projections.hook(self.prefill.points)

    def _check_call(self, prompt: Prompt, key_mask: Tensor | None, held: int, cache) -> None:
        """Refuse masks and positions of the caller's own that could not be followed once tokens are dropped."""
        stages = self.method.stages(prompt.counts, self.family.n_layers, self.attached)
        if not stages:
            return
        numbering = {self.family.positions_after(self.method, layer) for layer in stages}
        inputs.check_backend(self.family, "original" in numbering)
        if self.method.adds_bias:
            bias.check_backend(self.family)
        if self.prompt_length is None:  # generate() takes 2D masks only
            inputs.check_mask(self.mask, self.family, key_mask, held, prompt.length)
        if self.own_positions:
            flash = "flash" in self.family.decoder.config._attn_implementation and len(prompt.real) == 1
            packed = self.mask is None and (cache is None or flash)
            positions = axes.counted(self.family, self.positions)
            inputs.check_positions(positions, prompt.real, packed, "renumber" in numbering)

    def _refuse_parts(self, cache, length: int, prompt: Prompt | None) -> None:
        """Refuse a prompt that comes in parts, where it would be pruned otherwise than as a whole.

        Raises:
            ValueError: text after images on which it would have had a say, or the next part of an image.
        """
        state: CacheState | None = getattr(cache, "sparsevlm", None)
        if state is None or not state.open_ended:
            return
        own = length > 1 and (self.prompt_length is None or seen_tokens(cache) < self.prompt_length)  # not generated
        if own and (self.method.reads_text or (prompt is not None and prompt.visual[:, 0].any())):
            raise ValueError(
                "this call goes on with a prompt whose last call ended with an image: in parts it would be pruned "
                "otherwise than as a whole, or not at all. Pass images and the text after them in one call"
            )
        state.open_ended = False

    def _on_output(self, module: nn.Module, args: tuple, out):
        """Give the caller a sequence of the length it passed in."""
        if self.asleep:
            return None
        prefill, self.prefill, self.later.step = self.prefill, None, None
        if prefill is None:
            return None
        if prefill.cache is not None and (prefill.source is not None or self.gated is not None or self.method.rereads):
            lock(prefill.cache, self.described)
        if prefill.source is None:  # no row has moved
            return None
        with part("gathering"):
            out.last_hidden_state = restored(prefill, out.last_hidden_state)
        return out
