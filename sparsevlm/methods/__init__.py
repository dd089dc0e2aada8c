"""Registry of methods: every module of this package but `base`, `bases` and `_...` is one method, named like its file.

The package itself can be called: `sparsevlm.methods()` lists the names.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
import types
from dataclasses import fields
from typing import Any

from sparsevlm.methods.base import Method

_BASES = ("base", "bases")
_REGISTERED: dict[str, type[Method]] = {}


def names() -> list[str]:
    """List the names of all methods, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in _BASES and m.name[0] != "_")


def register(cls: type[Method]) -> type[Method]:
    """Make a method that is defined elsewhere known to `build` by its name; :func:`names` does not list it.

    Raises:
        ValueError: a method of this package has the name.
    """
    if cls.name in names():
        raise ValueError(f"sparsevlm has a method {cls.name!r}. Use another name")
    _REGISTERED[cls.name] = cls
    return cls


def method_class(name: str) -> type[Method]:
    """Return the dataclass of a method.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    known = names()
    if name not in known:
        near = difflib.get_close_matches(str(name), known, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown method {name!r}.{hint} Known methods: {', '.join(known)}")
    module = importlib.import_module(f"{__name__}.{name}")
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Method) and value.__dict__.get("name") == name:
            return value
    raise ValueError(f"sparsevlm/methods/{name}.py defines no subclass of Method with name = {name!r}")


def build(name: str, **options: Any) -> Method:
    """Build a method from its name and options.

    Args:
        name: one of :func:`methods`.
        **options: the fields of the method's dataclass; `budget` is an int (mean visual tokens per LLM layer, counted
            as they leave the layers, the paper's count) or "full".

    Raises:
        ValueError: unknown method or option (the message lists the known ones), or a value the method cannot take.
    """
    cls = method_class(name)
    known = [f.name for f in fields(cls) if f.init]
    unknown = [o for o in options if o not in known]
    if unknown:
        raise ValueError(
            f"method {name!r} has no option {', '.join(map(repr, unknown))}. Its options: {', '.join(known)}"
        )
    return cls(**options)


class _Registry(types.ModuleType):
    def __call__(self) -> list[str]:
        """List the names of all methods, sorted."""
        return names()


sys.modules[__name__].__class__ = _Registry
