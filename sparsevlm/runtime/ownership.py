"""One owner per model: inside a block the model belongs to one method and to the thread that entered the block.

There every hooked module is an instance of a subclass of its own class. That is what

- `torch.compile` guards on: it takes no notice of hooks that were absent when a graph was made, so a graph of the
  unpruned model would be run inside the block, without them. Compiled before, inside or by `generate()` itself, a
  function is compiled anew for the block, and afterwards its earlier graphs hold again;
- refuses copies, which would keep hooks that nobody removes;
- sees `generate()` however it is reached, `type(model).generate(model, ...)` included (see runtime/generation.py).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from torch import nn

from sparsevlm.runtime import generation
from sparsevlm.runtime.families import PROJECTIONS, Family

if TYPE_CHECKING:
    from sparsevlm.runtime.hooks import Hooks

_owners: WeakKeyDictionary[nn.Module, Hooks] = WeakKeyDictionary()  # by decoder
_lock = threading.Lock()


@contextmanager
def owning(hooks: Hooks) -> Iterator[None]:
    """Own the decoder for the block.

    Raises:
        ValueError: it belongs to another block.
    """
    decoder = hooks.family.decoder
    with _lock:
        if decoder in _owners:
            raise ValueError("a method is already active on this model; leave its `with` block first")
        _owners[decoder] = hooks
    try:
        yield
    finally:
        with _lock:
            del _owners[decoder]


def owned(decoder: nn.Module) -> bool:
    """Whether a method is active on the model of this decoder."""
    return decoder in _owners


@contextmanager
def asleep(decoder: nn.Module) -> Iterator[None]:
    """Let the model of this decoder compute as if no method were active on it, for what the method runs through it."""
    hooks = _owners[decoder]
    hooks.asleep = True
    try:
        yield
    finally:
        hooks.asleep = False


def own(model: nn.Module, family: Family, changed: list[tuple[nn.Module, type]]) -> None:
    """Give the model, and every module below it that has hooks or will get them, a subclass of its class.

    Args:
        changed: filled with the modules and what their classes were, for `disown`.

    Raises:
        ValueError: a module (a vision tower, say) belongs to another model's block already.
    """
    modules = {module for module in family.outer.modules() if module._forward_hooks or module._forward_pre_hooks}
    for layer in family.decoder.layers:
        modules |= {getattr(layer.self_attn, name) for name in PROJECTIONS}
    for module in {model} | modules:
        cls = type(module)
        if hasattr(cls, "_unpruned"):
            raise ValueError(
                f"this model shares its {cls.__name__} with another one on which a method is active; leave that "
                "`with` block first"
            )
        made = _subclass(cls, module is family.outer)
        object.__setattr__(module, "__class__", made)  # an OptimizedModule would set it on what it wraps
        changed.append((module, cls))


def disown(changed: list[tuple[nn.Module, type]]) -> None:
    """Give the modules their classes back."""
    while changed:
        module, cls = changed.pop()
        object.__setattr__(module, "__class__", cls)


@cache
def _subclass(cls: type[nn.Module], outer: bool) -> type[nn.Module]:
    """The class of modules inside a block; `outer`: of the outermost module that has hooks."""
    members = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    members |= {"_unpruned": cls, "__reduce_ex__": _refuse_copy, **generation.overrides(cls)}
    if outer:
        members["__call__"] = _failing_call(cls)
    return type(cls)(cls.__name__, (cls,), members)


def _failing_call(cls: type[nn.Module]):
    """`__call__` that lets the hooks forget a call that fails.

    A forward hook with always_call=True would do, but torch.compile guards on its number: another graph for each block.
    """

    def __call__(self, *args, **kwargs):
        try:
            return cls.__call__(self, *args, **kwargs)
        except BaseException:
            failed(self)
            raise

    return __call__


def failed(outer: nn.Module) -> None:
    """Tell the hooks of `outer` that its call has failed."""
    for hooks in list(_owners.values()):
        if hooks.family.outer is outer:
            hooks.call_failed()


def _refuse_copy(self: nn.Module, protocol: int):
    raise ValueError(
        f"a method is active on this {type(self).__name__}, and a copy would keep its hooks. Copy or pickle it outside "
        "the `with` block (state_dict() and save_pretrained() work inside it, too)"
    )


def check_thread(owner: int) -> None:
    """Refuse calls from a thread that has not entered the block.

    Raises:
        ValueError: it is not thread `owner`.
    """
    if threading.get_ident() != owner:
        raise ValueError(
            "a method is active on this model in another thread, whose calls these would disturb. Enter the `with` "
            "block in the thread that calls the model, and give each thread that runs at the same time its own model"
        )
