"""lmms-eval requests over a few questions of minivqa, without lmms-eval's evaluator."""

import io

from lmms_eval.api.instance import Instance
from PIL import Image

from eval.tasks.minivqa.dataset import rows

GREEDY = {"max_new_tokens": 4, "do_sample": False, "until": ["\n\n"], "image_aspect_ratio": "original"}


def make_documents(n: int, seed: int = 5) -> list[dict]:
    return [row | {"image": Image.open(io.BytesIO(row["image"]["bytes"]))} for row in rows(seed, n)]


def make_requests(documents: list[dict], gen_kwargs=None, task: str = "minivqa") -> list[Instance]:
    """One request per document; `gen_kwargs`: one dict for all, or one per document."""
    each = gen_kwargs if isinstance(gen_kwargs, list) else [gen_kwargs or GREEDY] * len(documents)
    return [
        Instance(
            "generate_until",
            (doc["question"], each[i], lambda doc: [doc["image"]], i, task, "test"),
            idx=0,
            metadata={"task": task, "doc_id": i, "repeats": 1},
        )
        for i, doc in enumerate(documents)
    ]
