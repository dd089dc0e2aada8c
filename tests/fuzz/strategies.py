"""Which cases there are: hypothesis strategies for models, methods with valid options, prompts and ways of running."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from sparsevlm.methods import names
from tests.fuzz.case import Case, Shape
from tests.fuzz.pictures import VISION

# what comes first is drawn more often
MODES = (
    "forward", "manual", "greedy", "manual", "greedy", "forward", "beams", "manual", "sample", "lookup", "assisted",
)  # fmt: skip
# most in float64, where hardly anything ties; eager attention softmaxes in float32
BACKENDS = [("sdpa", "float64")] * 3 + [("sdpa", "float32"), ("eager", "float32"), ("sdpa", "bfloat16")]
CHOICES = {
    "sparsevlm": {
        "recycle": [0.0, 0.3, 0.3, 1.0], "cluster": [0.1, 0.5], "merge": ["mean", "sum"],
        "positions": ["renumber", "original"], "recycled_at": ["end", "centre"], "early_drop": [True, False],
    },
    "sparsevlm_plus": {"heads": [14 / 32, 1.0], "kernel": [True, False], "kernel_floor": [None, 0.1]},
    "sparsevlm_rank": {
        "rule": ["paper", "v1.0", "video"], "lam": [0.3, 0.9, 1.0], "scale": [0.7, 2.0], "bias": [0, 1, 3],
    },
    "aim": {"start": ["all", "kept"]},
    "dart": {"match": ["leaving", "entering"], "visual_pivots": [1, 2, 4], "text_pivots": [0, 1, 4]},
    "downsample": {"of": ["picture", "features"]},
    "dynamic_llava": {
        "predictor": ["untrained"], "seed": [0, 1], "match": ["leaving", "entering"], "early_drop": [True, False],
    },
    "fastv": {"match": ["leaving", "entering"], "early_drop": [True, False]},
    "ficoco_l": {"epsilon": [0.998, 0.5, 0.0], "positions": ["renumber", "original"]},
    "ficoco_v": {"window": [1, 2], "merge": [True, False]},
    "pyramiddrop": {"match": ["leaving", "entering"], "positions": ["renumber", "original"]},
    "random": {"seed": [0, 1, 7]},
    "random_layer": {"match": ["leaving", "entering"], "early_drop": [True, False], "seed": [0, 1, 7]},
    "sgl": {
        "guide": ["self"], "layers": [None, 1, 2], "answer_tokens": [0, 1, 3], "match": ["leaving", "entering"],
        "early_drop": [True, False],
    },
    "signpost": {"weights": ["information", "equal", "none"], "first": [1, 1.5, 2], "early_drop": [True, False]},
    "tome": {"proportional": [True, False]},
    "vispruner": {"ratio": [0.0, 0.5, 1.0], "step": [1, 8]},
}  # fmt: skip
#: Need a second network, wrap others, remove what the masked model cannot leave out, or drop nothing in small models.
NOT_DRAWN = ("anchorprune", "atp_llava", "cdpruner", "restore", "yopo")
OWN = ("sparsevlm", "sparsevlm_rank", "sparsevlm_plus")


@st.composite
def shapes(draw, vision_method: bool) -> Shape:
    kinds = ["llava", "llava", "video_llava"] if vision_method else ["llava", "llava", "video_llava", "text"]
    kind = draw(st.sampled_from(kinds))
    heads = draw(st.sampled_from([1, 2, 4]))
    tower = draw(st.integers(1, 3))
    return Shape(
        kind=kind,
        family="llama" if kind == "video_llava" else draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3"])),
        layers=draw(st.sampled_from([2, 4, 3, 5, 6, 4, 5, 7])),
        heads=heads,
        kv_heads=draw(st.sampled_from([k for k in (1, 2, 4) if heads % k == 0])),
        head_dim=draw(st.sampled_from([8, 16])),
        theta=draw(st.sampled_from([1e4, 1e6, 300.0])),
        tied=draw(st.booleans()),
        grid=2 if kind == "video_llava" else draw(st.integers(1, 5)),
        tower=tower,
        feature_layer=draw(st.sampled_from([-1, -2, tower] if tower > 1 else [-1])),
        select=draw(st.sampled_from(["default", "default", "full"])) if kind == "llava" else "default",
        seed=draw(st.integers(0, 3)),
    )


@st.composite
def prompts(draw, shape: Shape, image_only_ends: bool) -> tuple:
    """Parts of one prompt: text, and up to two pictures (or one video), with text between them or none."""
    parts: list = []
    pictures = draw(st.sampled_from([1, 1, 2, 1, 0, 1, 2]))
    for _ in range(pictures):
        parts.append(draw(st.sampled_from([0, 1, 2, 4, 7])))
        video = shape.kind == "video_llava" and "V" not in parts and draw(st.booleans())
        parts.append("V" if video else "I")
    ends = [0, 0, 1, 2, 3, 5] if pictures and image_only_ends else [1, 2, 4, 8]
    parts.append(draw(st.sampled_from(ends)))
    return tuple(p for p in parts if p != 0)


@st.composite
def knobs(draw, name: str, shape: Shape, fewest: int) -> dict:
    """Options of a method for prompts of at least `fewest` visual tokens (0: there are none)."""
    o: dict = {}
    most = max(fewest, 1)
    how = draw(st.sampled_from(["budget", "budget", "budget", "own", "own", "full", "none", "too much"]))
    if how == "budget":
        o["budget"] = draw(st.integers(1, most))
    elif how == "full":
        o["budget"] = "full"
    elif how == "too much":
        o["budget"] = most + draw(st.integers(1, 3))
    if name == "sparsevlm_rank" and o.get("budget") != "full":
        o.pop("budget", None)
    if name in OWN:
        return o | draw(sparsevlm_knobs(name, shape, fewest, how == "own"))
    if how == "own":
        o |= draw(own_knobs(name, shape, most))
    for option, values in CHOICES.get(name, {}).items():
        o[option] = draw(st.sampled_from(values))
    if name == "mmtok":
        o["words"] = "all"  # a model without a folder has no tokenizer
    return o


@st.composite
def sparsevlm_knobs(draw, name: str, shape: Shape, fewest: int, own: bool) -> dict:
    o = {option: draw(st.sampled_from(values)) for option, values in CHOICES["sparsevlm"].items()}
    # two centred tokens are opposite: text tokens tie
    rules = ["paper", "paper", "all", "last", 1, 2] + (["centred"] if own and fewest > 2 else [])
    o["raters"] = draw(st.sampled_from(rules + (["tokens"] if name == "sparsevlm" else [])))
    if own:
        size = draw(st.integers(1, min(3, shape.layers)))
        o["layers"] = sorted(draw(st.sets(st.integers(-1, shape.layers - 2), min_size=size, max_size=size)))
    if name == "sparsevlm_rank":
        return o | {option: draw(st.sampled_from(values)) for option, values in CHOICES[name].items()}
    if own:
        o["keep"] = draw(st.lists(st.integers(1, max(fewest, 1) + 1), min_size=size, max_size=size))
        o["always_drop"] = draw(st.booleans())
    if name == "sparsevlm_plus":
        o |= {option: draw(st.sampled_from(values)) for option, values in CHOICES[name].items()}
    return o


@st.composite
def own_knobs(draw, name: str, shape: Shape, most: int) -> dict:
    """What a method takes instead of a budget."""
    layer, o = st.integers(0, shape.layers - 2), {}
    if name in ("fastv", "random_layer", "dart", "dynamic_llava", "sgl"):
        o = {"keep": draw(st.integers(1, most)), "k": draw(layer) + 1}
    elif name == "pyramiddrop":
        o["layers"] = sorted(draw(st.sets(st.integers(-1, shape.layers - 2), min_size=1, max_size=3)))
        count = len(o["layers"])
        ratios = st.lists(st.sampled_from([1.0, 0.7, 0.5, 0.25, 0.1]), min_size=count, max_size=count)
        o["ratios"] = sorted(draw(ratios), reverse=True)
    elif name == "ficoco_l":
        o = {"r": draw(st.sampled_from([0.5, 1.0, 3.0])), "start": draw(layer)}
    elif name == "aim":
        o = {"merge_to": draw(st.integers(1, shape.image_tokens)), "first": draw(layer)}
        o["last"] = draw(st.integers(o["first"], shape.layers - 2))
    elif name == "downsample":
        o["side"] = draw(st.integers(1, shape.grid))
    elif name == "visionzip" and shape.image_tokens > 1:
        o["dominant"] = draw(st.integers(1, shape.image_tokens - 1))
        o["contextual"] = draw(st.integers(0, shape.image_tokens - o["dominant"]))
    return o


@st.composite
def cases(draw, windows: bool = False) -> Case:
    """Any case.

    Args:
        windows: sliding windows, too, counted in positions.
    """
    name = draw(st.sampled_from([n for n in names() if n not in NOT_DRAWN] + list(OWN)))
    shape = draw(shapes(name in VISION))
    if windows and shape.family != "llama":
        shape = replace(shape, window=draw(st.integers(2, 12)))
    video = shape.kind == "video_llava"
    rows = tuple(draw(prompts(shape, True)) for _ in range(draw(st.sampled_from([1, 2, 2, 3]))))
    mode = draw(st.sampled_from(MODES))
    if mode in ("lookup", "assisted"):
        rows = rows[:1]
    cache = "dynamic"
    if mode in ("greedy", "sample", "beams"):
        cache = draw(st.sampled_from(["dynamic", "dynamic", "static", "none"]))
    elif mode == "manual":
        cache = draw(st.sampled_from(["dynamic", "dynamic", "static"]))
    elif mode == "forward":
        cache = draw(st.sampled_from(["dynamic", "none"]))
    entry = "ids"
    if shape.kind == "text":
        entry = "embeds"
    elif name not in VISION and not video and mode in ("forward", "greedy", "manual"):
        entry = draw(st.sampled_from(["ids", "ids", "ids", "embeds", "both"]))
    elif shape.kind == "llava" and mode in ("forward", "greedy", "manual", "beams"):
        entry = draw(st.sampled_from(["ids", "ids", "both"]))
    turn = None
    if mode == "manual" or (mode in ("greedy", "sample") and cache == "dynamic" and entry != "embeds"):
        turn = draw(st.sampled_from([None, "picture", "picture", "text", "picture", "picture"]))
        if turn == "text":
            turn = (draw(st.integers(1, 4)),)
        elif turn == "picture":
            turn = draw(prompts(shape, False)) if entry == "ids" else (draw(st.integers(1, 4)),)
    chunk = None
    if mode in ("greedy", "sample") and cache in ("dynamic", "static") and shape.window is None:
        chunk = draw(st.sampled_from([None, None, None, 1, 3, 16]))
    counts = [n for parts in [*rows, *([turn] if turn else [])] if (n := shape_visual(shape, parts))]
    attention, dtype = draw(st.sampled_from(BACKENDS))
    options = draw(knobs(name, shape, min(counts, default=0)))
    if shape.window is not None and "recycle" in options:
        options["recycle"] = 0.0  # a merged token stands for many places
    return Case(
        shape=shape,
        attention=attention,
        dtype=dtype,
        method=name,
        options=options,
        rows=rows,
        side=draw(st.sampled_from(["left", "right"])) if mode == "forward" else "left",
        entry=entry,
        mode=mode,
        cache=cache,
        turn=turn,
        steps=draw(st.integers(1, 4)),
        position_ids=draw(st.booleans()),
        attention_mask=draw(st.booleans()),
        square=mode == "forward" and shape.window is None and draw(st.integers(0, 3)) == 0,
        chunk=chunk,
        alone=len(rows) > 1 and mode != "sample" and draw(st.integers(0, 3)) == 0,
        seed=draw(st.integers(0, 9999)),
    )


def shape_visual(shape: Shape, parts: tuple) -> int:
    """Visual tokens of a prompt."""
    return sum(shape.tokens(p) for p in parts if isinstance(p, str))
