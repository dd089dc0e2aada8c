"""Damaged files and a full disk: what `eval.run` makes of them is what it makes of whole ones, or one clear line.

    python -m tests.fuzz.damage --cases 100 --seed 0

Kinds of case: pictures, checkpoints, ledgers of unfinished runs, files of finished runs, and a disk that is full at the
k-th sync, rename or new folder. Wherever the same command then goes on, its results must be those of an undisturbed
run (without what depends on when and how fast).
"""

from __future__ import annotations

import sparsevlm  # noqa: F401  # isort: skip  - before lmms-eval

import argparse
import contextlib
import errno
import io
import json
import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from eval.generate.generator import Generator
from eval.runs import evaluate
from scripts import make_tables
from sparsevlm.mini import weights_dir
from tests.eval.runs.kills import outcome
from tests.fuzz.runs import Ended, Failed, check_folder, command, finished, workplace

RUN = ["method=random", "budget=16", "limit=3", "batch_size=1"]
UNHANDLED = ("KeyError", "TypeError", "AttributeError", "IndexError", "JSONDecodeError", "Traceback", "NoneType")


def clear(ended: Ended, folder: Path, *named: str) -> None:
    """See that a command failed with one clear line that names what is wrong, and left no results."""
    if ended.raised is not None:
        raise Failed(f"raised {ended.raised}")
    if ended.status not in (1, 2) or len(ended.errors) != 1:
        raise Failed(f"status {ended.status}, {len(ended.errors)} errors: {ended.err[-600:]!r}")
    if found := [word for word in UNHANDLED if word in ended.err]:
        raise Failed(f"said {found}: {ended.errors[0]}")
    if missing := [word for word in named if word not in ended.errors[0]]:
        raise Failed(f"does not name {missing}: {ended.errors[0]}")
    if runs := finished(folder):
        raise Failed(f"failed, but left {runs[0].name}")


def complete(ended: Ended, folder: Path) -> None:
    """See that a command succeeded, with complete results."""
    if ended.raised is not None or ended.status != 0 or ended.errors:
        raise Failed(f"status {ended.status}: {ended.raised or ended.err[-600:]}")
    (run,) = finished(folder)
    check_folder(run)


def complete_or_clear(ended: Ended, folder: Path) -> str:
    """Either of the two; returns which."""
    if ended.status == 0 and ended.raised is None:
        complete(ended, folder)
        return "complete"
    clear(ended, folder)
    return "refused"


@cache
def undisturbed() -> dict[str, bytes]:
    """What RUN gives when nothing is wrong."""
    with workplace() as folder:
        complete(command(RUN), folder)
        return outcome(folder / "results")


def resumed(folder: Path, arguments: list[str] = RUN) -> None:
    """See that the command given again ends with the results of an undisturbed run."""
    complete(command(arguments), folder)
    if outcome(folder / "results") != undisturbed():
        raise Failed("after going on, the results are not those of an undisturbed run")


# ---- pictures ------------------------------------------------------------------------------------------------------
def _encoded(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def picture(rng: random.Random) -> tuple[str, bytes, bool]:
    """A picture file: its name, its bytes, and whether it must be refused."""
    size = rng.choice(((168, 168), (31, 60), (500, 20)))
    noise = Image.fromarray(np.random.RandomState(rng.getrandbits(32)).randint(0, 256, (*size, 3), np.uint8))
    png, jpeg = _encoded(noise, "PNG"), _encoded(noise, "JPEG")
    header = bytearray(png)
    header[16:24] = (10**5).to_bytes(4, "big") * 2  # ten thousand million pixels; the checksum is wrong, too
    kinds = {
        "truncated png": (png[: rng.randrange(40, len(png) - 20)], True),
        "truncated jpeg": (jpeg[: rng.randrange(10, len(jpeg) // 2)], True),
        "empty": (b"", True),
        "text": (b"<html>404 not found</html>", True),
        "huge header": (bytes(header), True),
        "1 x 1": (_encoded(Image.new("RGB", (1, 1)), "PNG"), False),
        "narrow": (_encoded(Image.new("RGB", (1, 500)), "PNG"), True),
        "CMYK": (_encoded(noise.convert("CMYK"), "JPEG"), False),
        "grey": (_encoded(noise.convert("L"), "PNG"), False),
        "16 bit": (_encoded(Image.fromarray(np.full(size, 60000, np.uint16)), "PNG"), False),
        "palette": (_encoded(noise.convert("P"), "PNG", transparency=3), False),
        "animated": (_encoded(noise, "GIF", save_all=True, append_images=[noise.rotate(90)] * 2), False),
    }
    name = rng.choice(sorted(kinds))
    return name, *kinds[name]


def pictures(rng: random.Random) -> str:
    """One question's picture is damaged or unusual; with on_error=record it is left out and counted."""
    name, content, broken = picture(rng)
    with workplace() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEVLM_CACHE", str(folder / "cache"))
        (folder / "cache").mkdir()
        from eval.tasks.minivqa.dataset import FILE_NAME, build_dataset

        file = build_dataset(0, 3, folder / "cache" / "minivqa") / FILE_NAME
        table = parquet.read_table(file)
        rows = table.to_pylist()
        rows[1]["image"]["bytes"] = content
        parquet.write_table(type(table).from_pylist(rows, table.schema), file)
        ended = command(RUN)
        if not broken:
            return f"{name}: {complete_or_clear(ended, folder)}"
        clear(ended, folder, "picture", "1")
        ended = command([*RUN, "on_error=record"])
        if ended.status != 3 or ended.raised or "1 questions EXCLUDED" not in ended.out:
            raise Failed(f"{name}: with on_error=record, status {ended.status}: {ended.raised or ended.err[-400:]}")
        check_folder(finished(folder)[0])
        return f"{name}: refused"


# ---- checkpoints ---------------------------------------------------------------------------------------------------
def _weights(change: Callable[[dict, str], None]) -> Callable[[Path, random.Random], None]:
    def damage(copy: Path, rng: random.Random) -> None:
        weights = load_file(copy / "model.safetensors")
        change(weights, rng.choice(sorted(weights)))
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})

    return damage


def _other_shape(weights: dict, name: str) -> None:
    weights[name] = torch.zeros(*weights[name].shape[:-1], weights[name].shape[-1] + 1)


def _cut(copy: Path, rng: random.Random) -> None:
    path = rng.choice(sorted(p for p in copy.iterdir() if p.name in MUST_HAVE))
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content) - 2)])


def _gone(copy: Path, rng: random.Random) -> None:
    (copy / rng.choice(MUST_HAVE)).unlink()


def _config(change: Callable[[dict, random.Random], object]) -> Callable[[Path, random.Random], None]:
    def damage(copy: Path, rng: random.Random) -> None:
        path = copy / "config.json"
        config = json.loads(path.read_text())
        changed = change(config, rng)
        path.write_text(json.dumps(config if changed is None else changed))

    return damage


def _junk_in_config(config: dict, rng: random.Random) -> None:
    part = rng.choice((config, config["text_config"], config["vision_config"]))
    part[rng.choice(sorted(part))] = rng.choice((None, -1, 0, 2.5, "abc", [], {}, True, 10**9))


def _another_tokenizer(copy: Path, rng: random.Random) -> None:
    path = copy / "tokenizer.json"
    path.write_text(path.read_text().replace("<image>", "<picture>"))


MUST_HAVE = ("config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json")
CHECKPOINTS: dict[str, tuple[Callable[[Path, random.Random], None], bool]] = {  # damage, and whether it must be refused
    "file cut short": (_cut, True),
    "file missing": (_gone, True),
    "weight missing": (_weights(lambda w, name: w.pop(name)), True),
    "weight of another shape": (_weights(_other_shape), True),
    "weight too many": (_weights(lambda w, name: w.update({f"{name}.more": torch.zeros(2)})), False),
    "weights not numbers": (_weights(lambda w, name: w[name].fill_(float("nan"))), True),
    "unknown architecture": (_config(lambda c, rng: c.update(model_type=rng.choice(("blip", "", 3, None)))), True),
    "no object": (_config(lambda c, rng: rng.choice(([], 3, "text", [c]))), True),
    "no text_config": (_config(lambda c, rng: c.pop(rng.choice(("text_config", "vision_config"))) and None), False),
    "junk in the config": (_config(_junk_in_config), False),
    "another tokenizer": (_another_tokenizer, True),
    "tokenizer of nothing": (lambda copy, rng: (copy / "tokenizer.json").write_text("{}"), True),
}


def checkpoints(rng: random.Random) -> str:
    """A copy of the embedded checkpoint is damaged."""
    name = rng.choice(sorted(CHECKPOINTS))
    damage, broken = CHECKPOINTS[name]
    with workplace() as folder:
        shutil.copytree(weights_dir("mini"), folder / "copy")
        damage(folder / "copy", rng)
        try:
            ended = command(["model.pretrained=./copy", *RUN])
            if broken and ended.status == 0:
                raise Failed("results of a damaged checkpoint")
            return f"{name}: {complete_or_clear(ended, folder)}"
        except Failed as error:
            raise Failed(f"{name}: {error}") from None
        finally:
            evaluate._load.cache_clear()
            evaluate._store.cache_clear()


# ---- ledgers and finished folders ----------------------------------------------------------------------------------
@contextlib.contextmanager
def breaking(at: int) -> Iterator[None]:
    """The model fails after `at` answers."""
    original, calls = Generator._generate, []

    def generate(self, *arguments):
        calls.append(1)
        if len(calls) > at:
            raise RuntimeError("the machine goes down")
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generator, "_generate", generate)
        yield


def _spoilt(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """The bytes of a file of JSON lines, damaged in one way."""
    lines = content.splitlines(keepends=True) or [b"{}\n"]
    i = rng.randrange(len(lines))
    row = json.loads(lines[i])
    row[rng.choice(sorted(row))] = rng.choice((None, 5, "junk", [], {}))
    flipped = bytearray(content)
    flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    ways = {
        "torn": content[: rng.randrange(len(content))],
        "garbage line": b"".join([*lines[:i], b"\xff\xfe\x00 garbage\n", *lines[i:]]),
        "not an object": b"".join([*lines, rng.choice((b"[]\n", b"3\n", b"null\n", b'"text"\n', b"\n"))]),
        "twice": content + lines[i],
        "another run's": content + lines[i].replace(b'"config": "', b'"config": "0'),
        "binary": bytes(rng.randrange(256) for _ in range(300)),
        "empty": b"",
        "junk value": b"".join([*lines[:i], json.dumps(row).encode() + b"\n", *lines[i + 1 :]]),
        "missing key": b"".join([*lines[:i], b'{"config": "' + row_hash(lines[i]) + b'"}\n', *lines[i + 1 :]]),
        "flipped bit": bytes(flipped),
    }
    name = rng.choice(sorted(ways))
    return name, ways[name]


def row_hash(line: bytes) -> bytes:
    return str(json.loads(line).get("config", "")).encode()


def ledgers(rng: random.Random) -> str:
    """An unfinished run's answers are damaged; the same command goes on."""
    expected = undisturbed()
    with workplace() as folder:
        with breaking(rng.choice((1, 2))):
            clear(command(RUN), folder, "goes down")
        (ledger,) = folder.rglob(".*.partial/ledger.jsonl")
        name, content = _spoilt(ledger.read_bytes(), rng)
        ledger.write_bytes(content)
        ended = command(RUN)
        if ended.status != 0:
            clear(ended, folder, "ledger")
            return f"{name}: refused"
        complete(ended, folder)
        if outcome(folder / "results") != expected:
            raise Failed(f"{name}: the results are not those of an undisturbed run")
        return f"{name}: complete"


def folders(rng: random.Random) -> str:
    """A file of a finished run is damaged: tables refuse it by name, and the same command does not vouch for it."""
    with workplace() as folder:
        complete(command(RUN), folder)
        (run,) = finished(folder)
        path = run / rng.choice(("metrics.json", "samples.jsonl", "config.yaml"))
        content = path.read_bytes()
        ways = {
            "cut short": content[: rng.randrange(max(1, len(content) - 2))],
            "empty": b"",
            "binary": bytes(rng.randrange(256) for _ in range(200)),
            "a list": b"[]",
            "null": b"null",
            "gone": None,
        }
        name = rng.choice(sorted(ways))
        path.unlink() if ways[name] is None else path.write_bytes(ways[name])
        err = io.StringIO()
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
                make_tables.main(["--results", "results"])
        except SystemExit as stopped:
            said = str(stopped.code)
            if run.name not in said or "\n" in said or any(word in said for word in UNHANDLED):
                raise Failed(f"{path.name} {name}: make_tables said {said!r}") from None
        else:
            raise Failed(f"{path.name} {name}: make_tables made tables of it")
        ended = command(RUN)
        if ended.raised is not None or "Traceback" in ended.err:
            raise Failed(f"{path.name} {name}: eval.run raised {ended.raised or ended.err}")
        if ended.status and (len(ended.errors) != 1 or any(w in ended.err for w in UNHANDLED)):
            raise Failed(f"{path.name} {name}: eval.run said {ended.err!r}")
        if ended.status and run.name not in ended.err:
            raise Failed(f"{path.name} {name}: eval.run does not name the folder: {ended.err!r}")
        if ended.status == 0 and path.name != "samples.jsonl":  # its size is all that a rerun could look at
            raise Failed(f"{path.name} {name}: eval.run says {ended.out!r}")
        return f"{path.name} {name}: refused"


# ---- a full disk ---------------------------------------------------------------------------------------------------
def disk(rng: random.Random) -> str:
    """The k-th write fails for want of room; afterwards the same command goes on to the same results."""
    undisturbed()
    name, at = rng.choice((("fsync", rng.randrange(9)), ("rename", 0), ("mkdir", rng.randrange(3))))
    calls: list[int] = []
    original = getattr(os, name)

    def full(*arguments, **kwargs):
        calls.append(1)
        if len(calls) == at + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments, **kwargs)

    with workplace() as folder:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, name, full)
            ended = command(RUN)
        if len(calls) <= at:
            complete(ended, folder)
            return f"{name}: not so often"
        if ended.status == 0 and name == "mkdir":  # of a cache that a library can do without
            resumed(folder)
            return f"{name} {at}: complete"
        clear(ended, folder, "No space left on device")
        resumed(folder)
        return f"{name} {at}: told, then complete"


KINDS = {f.__name__: f for f in (pictures, checkpoints, ledgers, folders, disk)}


def one(number: int, seed: int, kind: str | None = None) -> str:
    """Run a case; equal numbers give equal cases.

    Raises:
        Failed: something was silently wrong, or not told clearly.
    """
    rng = random.Random(f"{seed} {number}")
    kind = kind or sorted(KINDS)[number % len(KINDS)]
    return f"{kind}, {KINDS[kind](rng)}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.damage", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=50, help="how many (50)")
    parser.add_argument("--seed", type=int, default=0, help="equal seeds give equal cases")
    parser.add_argument("--kind", choices=sorted(KINDS), help="of this kind only (all in turn)")
    o = parser.parse_args(arguments)
    tally, failed = Counter(), 0
    for number in range(o.cases):
        try:
            tally[one(number, o.seed, o.kind)] += 1
        except AssertionError as error:
            failed += 1
            print(f"FAILED case {number}: {' '.join(str(error).split())}", flush=True)
    for ended, count in sorted(tally.items()):
        print(f"{count:4d} {ended}")
    print(f"{o.cases} cases, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
