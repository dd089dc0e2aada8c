"""How many kept tokens half precision shares with float32, stage by stage.

    python scripts/half_precision.py --results results

On questions of `minivqa` with the model `mini`, and on a LLaVA-shaped language model with random weights (Llama, 576
visual and 60 other tokens; embeddings of unit variance). Each model decides in float32, bfloat16 and float16; reported
is the share of the tokens that float32 keeps (as indices into the original visual tokens, recycled ones left out) which
half precision keeps, too: mean and smallest over prompts. Writes `<results>/runs/half_precision__<hash>/` and
`<results>/tables/half_precision.md` and `.csv`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

if not __package__:  # started as a file: this folder must go anyway, a `profile` in it hides Python's own
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import sparsevlm  # isort: skip  - before transformers: it makes torchvision importable beside a CPU-only torch

import pandas as pd
import torch
import yaml
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from eval import environment
from eval.errors import UserError, one_line
from eval.results import RunFolder
from eval.tasks.minivqa.dataset import rows as questions
from scripts.runs import HALF_PRECISION, SCHEMA
from sparsevlm.methods.base import Method

DTYPES = ("bfloat16", "float16")
SETTINGS = [("sparsevlm", 192), ("sparsevlm", 64), ("sparsevlm_plus", 192), ("sparsevlm_plus", 64)]
SHAPES = {  # hidden size, layers, heads
    "random LLaVA, hidden 512, 8 layers": (512, 8, 8),
}
Prefill = Callable[[torch.nn.Module, Method], list]


def main(argv: list[str] | None = None) -> None:
    """Measure and write; one line on stderr and exit status 2 for what cannot be."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder that holds runs/")
    parser.add_argument("--prompts", type=int, default=12, help="questions of minivqa; random prompts are a third")
    args = parser.parse_args(argv)
    config = {"settings": [list(s) for s in SETTINGS], "shapes": SHAPES, "prompts": args.prompts}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]
    try:
        folder = RunFolder(args.results, f"{HALF_PRECISION}__{digest}")
        if not folder.finished:
            folder.open()
            folder.publish(_files(config, measure(args.prompts), digest))
        print(write_table(folder.path, args.results / "tables"))
    except (UserError, ValueError, OSError) as error:
        print(f"half_precision: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def measure(prompts: int) -> list[dict]:
    """One row per model, method, budget, dtype and stage: layer, mean and smallest overlap over the prompts."""
    found = []
    for name, model, prefills in _models(prompts):
        for dtype in DTYPES:
            kept = {}
            for run_in in ("float32", dtype):
                model = model.to(getattr(torch, run_in))
                for setting in SETTINGS:
                    kept[run_in, setting] = [_kept(model, setting, prefill) for prefill in prefills]
            for setting in SETTINGS:
                pairs = list(zip(kept["float32", setting], kept[dtype, setting], strict=True))
                for i, layer in enumerate(layer for layer, _ in pairs[0][0]):
                    shares = [_overlap(a[i][1], b[i][1]) for a, b in pairs]
                    method, budget = setting
                    found.append(
                        {"model": name, "method": method, "budget": budget, "dtype": dtype, "layer": layer}
                        | {"prompts": len(shares), "mean": sum(shares) / len(shares), "smallest": min(shares)}
                    )
    return found


def _overlap(one: set[int], other: set[int]) -> float:
    """Share of the first's tokens that the other has; of none (a stage may keep pooled tokens only), all or none."""
    return len(one & other) / len(one) if one else float(not other)


def _kept(model: torch.nn.Module, setting: tuple[str, int], prefill: Callable) -> list[tuple[int, set[int]]]:
    """(layer, original tokens kept) of each stage."""
    method, budget = setting
    with torch.no_grad():
        record = prefill(model, sparsevlm.build(method, budget=budget))
    return [(s.layer, set(s.origin[0].tolist()) - {-1}) for s in record.stages]


def _models(prompts: int) -> Iterator[tuple[str, torch.nn.Module, list[Callable]]]:
    model, processor = sparsevlm.load("mini", dtype="float32")
    samples = questions(seed=0, n=prompts)
    inputs = [processor(text=s["question"], images=Image.open(io.BytesIO(s["image"]["bytes"]))) for s in samples]
    yield "mini", model, [_of_inputs(x) for x in inputs]
    for name, (hidden, layers, heads) in SHAPES.items():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=hidden, intermediate_size=hidden * 43 // 16, num_hidden_layers=layers,
            num_attention_heads=heads, vocab_size=128,
        )  # fmt: skip
        yield (
            name,
            LlamaForCausalLM(config).eval(),
            [_of_embeddings(seed, hidden) for seed in range(max(1, prompts // 3))],
        )


def _of_inputs(inputs) -> Callable:
    def prefill(model, method):
        with method(model) as trace:
            model(**inputs.to(model.dtype), use_cache=True, logits_to_keep=1)
        return trace.prefills[0]

    return prefill


def _of_embeddings(seed: int, hidden: int) -> Callable:
    embeddings = torch.randn(1, 636, hidden, generator=torch.Generator().manual_seed(seed))
    visual = torch.zeros(1, 636, dtype=torch.bool)
    visual[:, 35:611] = True

    def prefill(model, method):
        with method(model, visual_mask=visual) as trace:
            model(inputs_embeds=embeddings.to(model.dtype), use_cache=True, logits_to_keep=1)
        return trace.prefills[0]

    return prefill


def _files(config: dict, rows: list[dict], digest: str) -> dict[str, str]:
    about = {"versions": environment.versions(), "hardware": environment.hardware(), "git": environment.git()}
    about["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    metrics = {"schema": SCHEMA, "task": HALF_PRECISION, "model": "mini", "config_hash": digest, "n": len(rows)}
    metrics |= {"rows": rows, **about}
    return {
        "config.yaml": yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False),
        "samples.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "env.json": json.dumps({"command": "python scripts/half_precision.py", **about}, indent=2) + "\n",
        "metrics.json": json.dumps(metrics, indent=2) + "\n",
    }


def write_table(run: Path, tables: Path) -> str:
    """Write half_precision.md and .csv from a run folder; returns the Markdown."""
    frame = pd.DataFrame(json.loads((run / "metrics.json").read_text(encoding="utf-8"))["rows"])
    tables.mkdir(parents=True, exist_ok=True)
    frame.to_csv(tables / "half_precision.csv", index=False)
    pairs = zip(frame["mean"], frame["smallest"], strict=True)
    frame["shared %"] = [f"{100 * mean:.1f} ({100 * smallest:.1f})" for mean, smallest in pairs]
    wide = frame.pivot_table(
        index=["model", "method", "budget", "layer"], columns="dtype", values="shared %", aggfunc="first", sort=False
    ).reset_index()
    lines = ["| " + " | ".join(map(str, wide.columns)) + " |", "|" + " --- |" * len(wide.columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in wide.itertuples(index=False)]
    head = (
        "Share of the visual tokens kept in float32 that half precision keeps, too, in %: mean over prompts "
        f"(smallest). By `python scripts/half_precision.py`, from `{run.name}`.\n\n"
    )
    text = head + "\n".join(lines) + "\n"
    (tables / "half_precision.md").write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    main()
