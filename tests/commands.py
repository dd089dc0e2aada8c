"""The commands that documents show: where they are found, and what is in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/benchmarks.md",
    "docs/costs.md",
    "docs/families.md",
    "results/README.md",
)
DOCSTRINGS = (
    "eval/run.py", "eval/__main__.py", "eval/processes.py", "eval/fetch.py",
    *(f"eval/measure/{name}.py" for name in ("flops", "half_precision", "latency", "layers", "sweep_cost")),
)  # fmt: skip
_STARTS = r"(?:\.venv/bin/)?python (?:-m |scripts/)|make (?!it|them|the |a |one)|accelerate-launch |pip install "


@dataclass(frozen=True)
class Command:
    """A command as a document shows it.

    Attributes:
        where: the document.
        text: on one line, without comments.
    """

    where: str
    text: str

    @property
    def words(self) -> list[str]:
        """As a shell splits it, without placeholders for more arguments."""
        return [word for word in shlex.split(self.text) if not word.endswith("...")]

    def after(self, *start: str) -> list[str] | None:
        """The arguments that follow a run of words, for example ("-m", "eval.run"); None if it is not there."""
        words = self.words
        for i in range(len(words) - len(start) + 1):
            if tuple(words[i : i + len(start)]) == start:
                return words[i + len(start) :]
        return None


def commands() -> list[Command]:
    """All of them, each once per document."""
    found = []
    for name in DOCUMENTS:
        if (ROOT / name).is_file():
            found += [Command(name, text) for text in _of_markdown((ROOT / name).read_text(encoding="utf-8"))]
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        comments = [line.partition("#")[2] for line in path.read_text(encoding="utf-8").splitlines() if "#" in line]
        found += [Command(str(path.relative_to(ROOT)), text) for text in _of_lines(comments)]
    for name in DOCSTRINGS:
        if (ROOT / name).is_file():
            docstring = (ROOT / name).read_text(encoding="utf-8").split('"""')[1]
            found += [Command(name, text) for text in _of_lines(docstring.splitlines())]
    return list(dict.fromkeys(found))


def _of_markdown(text: str) -> Iterator[str]:
    fenced = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
    for language, block in fenced.findall(text):
        if language == "bash":
            for line in block.replace("\\\n", " ").splitlines():
                if command := _without_comment(line):
                    yield command
    for span in re.findall(r"`([^`]+)`", fenced.sub("", text)):
        span = " ".join(span.split())
        if re.match(_STARTS, span):
            yield span


def _of_lines(lines: list[str]) -> Iterator[str]:
    """Commands in comments: from where one starts to the line's end, or to the quote that closes it."""
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    for line in text.splitlines():
        for quoted, bare in re.findall(rf"`((?:{_STARTS})[^`]*)`|((?:{_STARTS})[^`]*)", line):
            command = re.split(r" {6,}| \.\.\.(?: |$)", quoted or bare)[0]
            yield _without_comment(command if "(" in command else command.partition(")")[0])


def _without_comment(line: str) -> str:
    return " ".join(re.sub(r"(^|\s)#.*", "", line).split())


if __name__ == "__main__":
    for command in commands():
        print(f"{command.where}: {command.text}")
