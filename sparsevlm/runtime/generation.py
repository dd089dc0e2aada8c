"""What a block changes in `generate()`: the method is told of the prompt, which is prefilled as a whole."""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import GenerationMixin

if TYPE_CHECKING:
    from sparsevlm.runtime.hooks import Hooks

_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__
_hooks: WeakKeyDictionary[nn.Module, Hooks] = WeakKeyDictionary()  # of models that are being pruned


def entered(model: nn.Module, hooks: Hooks) -> None:
    """Let the overrides find the hooks of a model."""
    _hooks[model] = hooks


def left(model: nn.Module) -> None:
    _hooks.pop(model, None)


def overrides(cls: type[nn.Module]) -> dict:
    """Methods of the subclass that a model of class `cls` has inside a block."""
    if not hasattr(cls, "generate"):
        return {}

    @functools.wraps(cls.generate)  # looked up again at each call: somebody may have replaced it on the class since
    def pruned_generate(self, *args, **kwargs):
        hooks = _hooks.get(self)
        if hooks is None:  # a bound method that outlived the block
            return cls.generate(self, *args, **kwargs)
        return inside_generate(hooks, functools.partial(cls.generate, self), args, kwargs)

    @functools.wraps(cls._prepare_generation_config)
    def prepare_generation_config(self, *args, **kwargs):
        config, model_kwargs = cls._prepare_generation_config(self, *args, **kwargs)
        hooks = _hooks.get(self)
        if hooks is not None:
            _check(hooks, config)
        return config, model_kwargs

    made = {"generate": pruned_generate, "_prepare_generation_config": prepare_generation_config}
    if hasattr(cls, "init_continuous_batching"):
        made["init_continuous_batching"] = _refuse_batching(cls.init_continuous_batching)
    return made


def _refuse_batching(original):
    """generate_batch() and cache_implementation="paged" pack several prompts into one row, in a thread of their own."""

    @functools.wraps(original)
    def init_continuous_batching(self, *args, **kwargs):
        if self not in _hooks:
            return original(self, *args, **kwargs)
        raise ValueError(
            "continuous batching (generate_batch, a paged cache) cannot be pruned: it packs prompts into one row. Use "
            "model.generate(...)"
        )

    return init_continuous_batching


def inside_generate(hooks: Hooks, original, args: tuple, kwargs: dict):
    """Note how long the prompt is: assisted decoding and use_cache=False put other tokens into a prefill."""
    hooks.check_thread()
    ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    prompt = next((x for x in (kwargs.get("attention_mask"), kwargs.get("inputs_embeds"), ids) if x is not None), None)
    outer = hooks.generating, hooks.prompt_length, hooks.prunable, hooks.own_positions
    hooks.generating, hooks.own_positions = True, kwargs.get("position_ids") is not None
    hooks.prompt_length = prompt.shape[1] if isinstance(prompt, Tensor) and prompt.dim() > 1 else None
    hooks.prunable = hooks.may_prune(kwargs)
    try:
        hooks.check_prompt(ids, kwargs)
        return original(*args, **kwargs)
    except BaseException:
        hooks.method.forget(hooks.attached)
        raise
    finally:
        hooks.generating, hooks.prompt_length, hooks.prunable, hooks.own_positions = outer


def refuse_from_above(outer: nn.Module) -> None:
    """Refuse a call made by the generate() of a model that `outer` is a part of, where a block knows only the part.

    Without a cache, say, its generated words would be taken for the prompt's.

    Raises:
        ValueError: there is such a generate() among the calling functions.
    """
    frame = sys._getframe()
    while frame is not None:
        model = frame.f_locals["self"] if frame.f_code is _GENERATE else None
        if model is not None and any(module is outer for module in model.modules()):
            raise ValueError(
                f"the `with` block was entered with a part of the {type(model).__name__} whose generate() runs, so the "
                "method does not know the prompt. Enter it with the whole model"
            )
        frame = frame.f_back


def _check(hooks: Hooks, config) -> None:
    """Called by transformers' generate() before it computes anything, however it was reached.

    Raises:
        ValueError: by a way that passes the method by.
    """
    hooks.check_thread()
    if not hooks.generating:
        raise ValueError(
            "this generate() was taken from the model or its class outside the `with` block, so the method does not "
            "know the prompt. Use model.generate(...)"
        )
    if config.prefill_chunk_size is not None and hooks.prunable:
        if not hooks.warned:
            warnings.warn(
                f"prefill_chunk_size={config.prefill_chunk_size} is ignored for prompts that are pruned: which tokens "
                "stay is decided with the whole prompt, which is computed in one piece",
                stacklevel=4,
            )
        hooks.warned = True
        config.prefill_chunk_size = None
