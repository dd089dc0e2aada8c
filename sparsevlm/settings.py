"""Methods with budget and options as they are written on a command line: one spelling for all commands."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from typing import Any

Setting = tuple[str, "int | str | None", dict[str, Any]]
_YAML_WORDS = {"true": "True", "false": "False", "null": "None"}


def parse_setting(text: str) -> Setting:
    """Parse "method:budget[:option=value...]".

    "sparsevlm:64:raters=all:layers=(1,4)" -> ("sparsevlm", 64, {"raters": "all", "layers": (1, 4)}); the budget may be
    empty (None) where options say how many tokens stay.

    Raises:
        ValueError: not of this form.
    """
    name, _, rest = text.partition(":")
    budget, *options = rest.split(":") if rest else [""]
    try:
        return name, parse_value(budget) if budget else None, parse_options(options)
    except ValueError as error:
        raise ValueError(f"setting {text!r} is not method:budget[:option=value...]: {error}") from error


def parse_options(texts: Iterable[str]) -> dict[str, Any]:
    """Parse "option=value" texts.

    Raises:
        ValueError: one is not of this form, or an option is given twice.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise ValueError(f"option {text!r} is not name=value. Use for example raters=all")
        if name in options:
            raise ValueError(f"option {name!r} is given twice")
        options[name] = parse_value(value)
    return options


def parse_integers(text: str, separator: str = ",") -> list[int]:
    """Parse integers >= 0 between separators: "192,128,64" -> [192, 128, 64].

    Raises:
        ValueError: something else.
    """
    try:
        numbers = [int(part) for part in text.split(separator)]
    except ValueError:
        raise ValueError(f"{text!r} must be integers separated by {separator!r}") from None
    if min(numbers) < 0:
        raise ValueError(f"{text!r} must be integers >= 0")
    return numbers


def parse_value(text: Any) -> Any:
    """Parse the value of an option: a number, true, false, null (also as Python writes them), a list, or else a text.

    Lists are written (2,6,12), [2,6,12] or 2/6/12 (where commas separate the options) and become tuples. What is no
    text is returned as it is.
    """
    if not isinstance(text, str):
        return text
    if re.fullmatch(r"\d+(/\d+)+", text):
        return tuple(int(number) for number in text.split("/"))
    try:
        value = ast.literal_eval(_YAML_WORDS.get(text, text))
    except (ValueError, SyntaxError):
        return text
    return tuple(value) if isinstance(value, list) else value
