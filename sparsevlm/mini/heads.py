"""Which heads visual tokens may lose: calibration on generated pictures and questions, for `yopo`'s option `heads`.

    python -m sparsevlm.mini.heads --share 0.5 --out heads.npy                  # of mini: a mask [layers, heads]
    python -m sparsevlm.mini.heads --model FOLDER --threshold 0.1 --out heads.npy
    python -m sparsevlm.mini.heads --limits sparsevlm/mini/weights/modules/head_ratios.npz     # what comes with mini

100 prompts, the attention of the last row of each (see `methods/_heads.py`). Pictures and questions are those of the
embedded model, which any LLaVA can read; for another model they are far from its training, so prefer data of its own
with `sparsevlm.methods._heads.head_ratios`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

import sparsevlm
from sparsevlm.methods._heads import exceeded, fingerprint, head_ratios, keep_share, votes
from sparsevlm.mini import questions
from sparsevlm.mini.scenes import SceneGenerator
from sparsevlm.runtime.families import locate

_STREAM = 0x4EAD  # keeps these random streams apart from the training's and the task's


def prompts(processor, samples: int, seed: int, split: str = "test") -> Iterator[dict]:
    """Draw prompts of one picture and one question, the types of question in turn; yields arguments of a forward."""
    generator = SceneGenerator(split)
    for i in range(samples):
        random = np.random.RandomState([_STREAM, seed, i])
        found: list[questions.Question] = []
        while not found:
            scene = generator.draw(random)
            found = questions.candidates(scene.objects, random)[questions.TYPES[i % len(questions.TYPES)]]
        text = found[random.randint(len(found))].text
        yield processor(text=text, images=Image.fromarray(scene.image))


def main(argv: list[str] | None = None) -> None:
    """Write the file; what cannot be calibrated is one line on stderr and exit status 2."""
    parser = argparse.ArgumentParser(prog="python -m sparsevlm.mini.heads", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="mini", help="mini, a hub id, or a folder")
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--share", type=float, help="of all heads that stay; the threshold follows")
    wanted.add_argument("--threshold", type=float, help="of the ratio of visual to other attention")
    wanted.add_argument("--limits", type=Path, help="write the thresholds of all shares to this .npz file")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="the mask, a .npy file")
    args = parser.parse_args(argv)
    if (args.limits is None) == (args.out is None) or args.samples < 1:
        parser.error("give --out with --share or --threshold, and at least one sample")
    try:
        model, processor = sparsevlm.load(args.model)
        ratios = head_ratios(model, prompts(processor, args.samples, args.seed))
        limits = exceeded(ratios)
        if args.limits is not None:
            np.savez(args.limits, limits=limits, fingerprint=fingerprint(locate(model)))
            print(args.limits)
            return
        mask = keep_share(limits, args.share) if args.threshold is None else votes(ratios, args.threshold)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.save(args.out, mask)
    gone = limits[~mask]
    threshold = args.threshold if args.threshold is not None else float(gone.max()) if gone.size else 0.0
    print(f"{args.out}: {mask.sum()} of {mask.size} heads stay, threshold {threshold:.4g}; kept per layer:")
    print(" ".join(map(str, mask.sum(1))))


if __name__ == "__main__":
    main()
