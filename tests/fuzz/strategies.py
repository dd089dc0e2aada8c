"""Which cases there are: hypothesis strategies for models, methods with valid options, prompts and ways of running."""

from __future__ import annotations

from hypothesis import strategies as st

from sparsevlm.methods import names
from tests.fuzz.case import Case, Shape
from tests.fuzz.pictures import VISION

MODES = ("forward", "greedy", "greedy", "sample", "beams", "lookup", "assisted", "manual", "manual")
# most in float64, where hardly anything ties; eager attention softmaxes in float32
BACKENDS = [("sdpa", "float64")] * 3 + [("sdpa", "float32"), ("eager", "float32"), ("sdpa", "bfloat16")]
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
        layers=draw(st.integers(2, 7)),
        heads=heads,
        kv_heads=draw(st.sampled_from([k for k in (1, 2, 4) if heads % k == 0])),
        head_dim=draw(st.sampled_from([8, 16])),
        theta=draw(st.sampled_from([1e4, 1e6, 300.0])),
        tied=draw(st.booleans()),
        grid=draw(st.integers(1, 2) if kind == "video_llava" else st.integers(1, 5)),
        tower=tower,
        feature_layer=draw(st.sampled_from([-1, -2, tower] if tower > 1 else [-1])),
        select=draw(st.sampled_from(["default", "default", "full"])) if kind == "llava" else "default",
        seed=draw(st.integers(0, 3)),
    )


@st.composite
def prompts(draw, shape: Shape, image_only_ends: bool) -> tuple:
    """Parts of one prompt: text, and up to two pictures (or one video), with text between them or none."""
    parts: list = []
    words = st.integers(0, 4)
    pictures = draw(st.sampled_from([0, 1, 1, 1, 2]))
    for _ in range(pictures):
        parts.append(draw(words))
        video = shape.kind == "video_llava" and "V" not in parts and draw(st.booleans())
        parts.append("V" if video else "I")
    parts.append(draw(words if pictures and image_only_ends else st.integers(1, 5)))
    return tuple(p for p in parts if p != 0)


@st.composite
def knobs(draw, name: str, shape: Shape, fewest: int) -> dict:
    """Options of a method for prompts of at least `fewest` visual tokens (0: there are none)."""
    o: dict = {}
    most = max(fewest, 1)
    layer = st.integers(0, shape.layers - 2)
    how = draw(st.sampled_from(["budget", "budget", "budget", "own", "full", "none", "too much"]))
    if how == "budget":
        o["budget"] = draw(st.integers(1, most))
    elif how == "full":
        o["budget"] = "full"
    elif how == "too much":
        o["budget"] = most + draw(st.integers(1, 3))
    own = how == "own"
    if name in OWN:
        if name == "sparsevlm_rank":
            o.pop("budget", None) if o.get("budget") != "full" else None
            o["rule"] = draw(st.sampled_from(["paper", "v1.0", "video"]))
            o |= {"lam": draw(st.sampled_from([0.3, 0.9, 1.0])), "scale": draw(st.sampled_from([0.7, 2.0]))}
            o["bias"] = draw(st.integers(0, 3))
        elif own:
            o["keep"] = draw(st.lists(st.integers(1, most + 1), min_size=1, max_size=min(3, shape.layers)))
            o["always_drop"] = draw(st.booleans())
        if own:
            size = len(o["keep"]) if "keep" in o else draw(st.integers(1, min(3, shape.layers)))
            o["layers"] = sorted(draw(st.sets(st.integers(-1, shape.layers - 2), min_size=size, max_size=size)))
        o["raters"] = draw(st.sampled_from(["paper", "paper", "all", "last", 1, 2, "tokens", "centred"]))
        if name == "sparsevlm_plus" or (name == "sparsevlm_rank" and o["raters"] == "tokens"):
            o["raters"] = "paper"
        if o["raters"] == "centred" and fewest < 3:
            o["raters"] = "paper"  # two centred tokens are opposite: text tokens tie
        if o["raters"] == "centred" and not own and "budget" not in o:
            o["raters"] = "paper"
        o["recycle"] = draw(st.sampled_from([0.0, 0.3, 0.3, 1.0]))
        o["cluster"] = draw(st.sampled_from([0.1, 0.5]))
        o["merge"] = draw(st.sampled_from(["mean", "sum"]))
        o["positions"] = draw(st.sampled_from(["renumber", "original"]))
        o["recycled_at"] = draw(st.sampled_from(["end", "centre"]))
        o["early_drop"] = draw(st.booleans())
        if name == "sparsevlm_plus":
            o["heads"] = draw(st.sampled_from([14 / 32, 1.0]))
            o["kernel"] = draw(st.booleans())
            o["kernel_floor"] = draw(st.sampled_from([None, 0.1]))
    elif name in ("fastv", "random_layer", "dart"):
        if own:
            o["keep"] = draw(st.integers(1, most))
            o["k"] = draw(layer) + 1
        o["match"] = draw(st.sampled_from(["leaving", "entering"]))
        if name != "dart":
            o["early_drop"] = draw(st.booleans())
        else:
            o |= {"visual_pivots": draw(st.integers(1, 4)), "text_pivots": draw(st.integers(0, 4))}
    elif name == "pyramiddrop":
        if own:
            o["layers"] = sorted(draw(st.sets(st.integers(-1, shape.layers - 2), min_size=1, max_size=3)))
            ratio = st.sampled_from([1.0, 0.7, 0.5, 0.25, 0.1])
            count = len(o["layers"])
            o["ratios"] = sorted(draw(st.lists(ratio, min_size=count, max_size=count)), reverse=True)
        o["positions"] = draw(st.sampled_from(["renumber", "original"]))
        o["match"] = draw(st.sampled_from(["leaving", "entering"]))
    elif name == "ficoco_l":
        if own:
            o |= {"r": draw(st.sampled_from([0.5, 1.0, 3.0])), "start": draw(layer)}
        o["epsilon"] = draw(st.sampled_from([0.998, 0.5, 0.0]))
        o["positions"] = draw(st.sampled_from(["renumber", "original"]))
    elif name == "aim" and own:
        o["merge_to"] = draw(st.integers(1, shape.image_tokens))
        o["first"] = draw(layer)
        o["last"] = draw(st.integers(o["first"], shape.layers - 2))
    elif name == "downsample":
        if own:
            o["side"] = draw(st.integers(1, shape.grid))
        o["of"] = draw(st.sampled_from(["picture", "features"]))
    elif name == "visionzip" and own and shape.image_tokens > 1:
        o["dominant"] = draw(st.integers(1, shape.image_tokens - 1))
        o["contextual"] = draw(st.integers(0, shape.image_tokens - o["dominant"]))
    elif name == "vispruner":
        o |= {"ratio": draw(st.sampled_from([0.0, 0.5, 1.0])), "step": draw(st.sampled_from([1, 8]))}
    elif name == "tome":
        o["proportional"] = draw(st.booleans())
    elif name == "ficoco_v":
        o |= {"window": draw(st.sampled_from([1, 2])), "merge": draw(st.booleans())}
    if name in ("random", "random_layer"):
        o["seed"] = draw(st.integers(0, 99))
    return o


@st.composite
def cases(draw) -> Case:
    name = draw(st.sampled_from([n for n in names() if n != "cdpruner"] + list(OWN)))
    shape = draw(shapes(name in VISION))
    video = shape.kind == "video_llava"
    rows = tuple(draw(st.lists(prompts(shape, True), min_size=1, max_size=3)))
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
        entry = draw(st.sampled_from(["ids", "ids", "ids", "embeds"]))
    turn = None
    if mode == "manual" or (mode in ("greedy", "sample") and cache == "dynamic" and entry == "ids"):
        turn = draw(st.sampled_from([None, "text", "picture"]))
        if turn == "text":
            turn = (draw(st.integers(1, 4)),)
        elif turn == "picture":
            turn = draw(prompts(shape, False)) if entry == "ids" else (draw(st.integers(1, 4)),)
    counts = [n for parts in [*rows, *([turn] if turn else [])] if (n := shape_visual(shape, parts))]
    attention, dtype = draw(st.sampled_from(BACKENDS))
    return Case(
        shape=shape,
        attention=attention,
        dtype=dtype,
        method=name,
        options=draw(knobs(name, shape, min(counts, default=0))),
        rows=rows,
        side=draw(st.sampled_from(["left", "right"])) if mode == "forward" else "left",
        entry=entry,
        mode=mode,
        cache=cache,
        turn=turn,
        steps=draw(st.integers(1, 4)),
        position_ids=draw(st.booleans()),
        attention_mask=draw(st.booleans()),
        alone=len(rows) > 1 and draw(st.integers(0, 3)) == 0,
        seed=draw(st.integers(0, 9999)),
    )


def shape_visual(shape: Shape, parts: tuple) -> int:
    """Visual tokens of a prompt."""
    return sum(shape.tokens(p) for p in parts if isinstance(p, str))
