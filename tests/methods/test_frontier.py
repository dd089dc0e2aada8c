"""SCOPE, HoloV, MMTok and AnchorPrune: identities, what defines each, and where they depart from their code."""

from __future__ import annotations

import pytest
import torch

import sparsevlm
from sparsevlm.core.coverage import facility_location, farthest_first
from sparsevlm.core.diversity import cosine_matrix
from sparsevlm.methods import holov, mmtok
from sparsevlm.runtime.vision import Pictures
from tests.goldens.frontier import Signals
from tests.methods.test_before_model import deep, handed_on
from tests.methods.test_cdpruner import Letters, clip
from tests.tiny import IMAGE, PAD, PATCHES, inputs

BUDGETS = (7, 32, 64, 192)


def kept(model, method, x) -> list[list[int]]:
    stages = handed_on(model, method, x)[1].prefills[0].stages
    return [row.tolist() for row in stages[0].kept]


def chosen(method, pictures: Pictures, count: int) -> list[int]:
    return method.reduce(pictures, count).origin[0].tolist()


def by_attention(signals: Signals) -> torch.Tensor:
    return signals.cls_attention().mean(1).argsort(1, descending=True)


# ---- SCOPE -----------------------------------------------------------------------------------------------------------
def test_scope_without_attention_is_coverage_and_without_differences_is_attention():
    signals, one = Signals(0), Signals(0)
    order = facility_location(cosine_matrix(signals.features), 64)[0]
    assert chosen(sparsevlm.build("scope", alpha=0.0), signals, 64) == sorted(order.tolist())
    one.features = torch.ones_like(one.features)  # one token covers all: the rest gains nothing
    assert chosen(sparsevlm.build("scope"), one, 1) == by_attention(one)[0, :1].tolist()
    alone = Signals(0)
    alone.features = torch.eye(576, dtype=torch.float64)[None]
    assert chosen(sparsevlm.build("scope"), alone, 64) == sorted(by_attention(alone)[0, :64].tolist())


def test_scope_multiplies_or_adds():
    signals = Signals(0)
    gain, attention = cosine_matrix(signals.features), signals.cls_attention().sum(1)
    added = facility_location(gain, 64, modular=attention)[0]
    assert chosen(sparsevlm.build("scope", combine="add"), signals, 64) == sorted(added.tolist())
    assert chosen(sparsevlm.build("scope"), signals, 64) != sorted(added.tolist())
    with pytest.raises(ValueError, match="combine 'max' is unknown"):
        sparsevlm.build("scope", combine="max")


@pytest.mark.parametrize("name", ["scope", "mmtok"])
def test_smaller_budgets_are_part_of_larger_ones(name):
    method = sparsevlm.build(name, **({"words": "all"} if name == "mmtok" else {}))
    signals = Signals(1, projected=name == "mmtok")
    signals.more["words"] = torch.zeros(1, 0, 576, dtype=torch.float64)
    sets = [{*chosen(method, signals, count)} for count in BUDGETS]
    assert all(a < b for a, b in zip(sets, sets[1:], strict=False))


# ---- HoloV -----------------------------------------------------------------------------------------------------------
def holov_by_hand(attention: list[float], count: int, crops: int) -> list[int]:
    """Quotas, cut and given away round by round, and the best of each crop."""
    size = len(attention) // crops
    parts = [attention[i * size : (i + 1) * size] for i in range(crops)]
    weight = [sum(p) / sum(map(sum, parts)) for p in parts]
    quota = [int(w * count) for w in weight]
    ranked = sorted(range(crops), key=lambda i: -weight[i])
    for i in ranked[: count - sum(quota)]:
        quota[i] += 1
    quota = [min(q, size) for q in quota]
    while (missing := count - sum(quota)) > 0:
        for i in [i for i in ranked if quota[i] < size][:missing]:
            quota[i] += 1
    order = []
    for i, part in enumerate(parts):
        best = sorted(range(size), key=lambda j: -part[j])[: quota[i]]
        order += [i * size + j for j in (sorted(best) if quota[i] == size else best)]
    return order


@pytest.mark.parametrize("count", [1, 40, 130, 144])
@pytest.mark.parametrize("sharp", [1, 8])
def test_holov_quotas_by_hand(count, sharp):
    attention = torch.rand(1, 144, generator=torch.Generator().manual_seed(count), dtype=torch.float64) ** sharp
    attention[:, :27] *= 50  # three crops that are asked for more than they have
    assert holov.choose(attention, count, 16)[0].tolist() == holov_by_hand(attention[0].tolist(), count, 16)


def test_holov_features_have_no_say_and_crops_do():
    signals, other = Signals(0, projected=True), Signals(0, projected=True)
    other.features = torch.randn_like(other.features)
    assert chosen(sparsevlm.build("holov"), signals, 64) == chosen(sparsevlm.build("holov"), other, 64)
    assert chosen(sparsevlm.build("holov", crops=1), signals, 64) == by_attention(signals)[0, :64].tolist()
    assert chosen(sparsevlm.build("holov", crops=9), signals, 64) != chosen(sparsevlm.build("holov"), signals, 64)


# ---- MMTok -----------------------------------------------------------------------------------------------------------
def test_mmtok_without_words_covers_the_picture_and_without_the_picture_every_word():
    signals = Signals(0, projected=True)
    words = signals.signals["words"][None]
    method = sparsevlm.build("mmtok", words="all")
    rows = method.text_rows(words, signals.features)
    signals.more["words"] = rows[:, :0]
    cover = (cosine_matrix(signals.states[:, 1:]) / 0.2).softmax(-1)
    assert chosen(method, signals, 64) == sorted(facility_location(cover, 64)[0].tolist())
    signals.more["words"] = rows
    best = rows[0].argmax(1).unique().tolist()
    assert chosen(sparsevlm.build("mmtok", words="all", alpha=0.0), signals, len(best)) == best
    assert chosen(method, signals, 64) == chosen(sparsevlm.build("mmtok", words="all"), signals, 64)


def test_mmtok_words_are_those_after_the_picture_and_each_prompt_has_its_own():
    model, flat = deep(), {"words": "all", "text_temperature": 0.2, "alpha": 0.1}
    x, rows = inputs("ragged", model)
    every = kept(model, sparsevlm.build("mmtok", budget=9, **flat), x)

    def own(ids: torch.Tensor) -> list[int]:
        row = ids.tolist()
        last = max((i for i, t in enumerate(row) if t == IMAGE), default=-1)
        return [t for t in row[last + 1 :] if t != PAD]

    assert every == kept(model, sparsevlm.build("mmtok", budget=9, **flat | {"words": own}), x)
    other = kept(model, sparsevlm.build("mmtok", budget=9, **flat | {"words": lambda ids: [3, 4]}), x)
    assert other != every
    mixed = sparsevlm.build(
        "mmtok", budget=9, **flat | {"words": lambda ids: [3, 4] if (ids == IMAGE).sum() > PATCHES else own(ids)}
    )
    assert kept(model, mixed, x)[:2] == [every[0], other[1]]


def test_mmtok_does_not_choose_padding_where_sizes_are_known():
    model = deep()
    x, _ = inputs("one", model)
    method = sparsevlm.build("mmtok", words="all", budget=12, sizes=lambda: [(600, 300)])
    assert kept(model, method, x)[0] == sorted({*range(6, 30)} & {*kept(model, method, x)[0]})
    assert min(kept(model, sparsevlm.build("mmtok", words="all", budget=12), x)[0]) < 6
    wrong = sparsevlm.build("mmtok", words="all", budget=12, sizes=lambda: [])
    with pytest.raises(ValueError, match="returned 0 sizes for 1 pictures"):
        kept(model, wrong, x)


def test_mmtok_refusals():
    model = deep()
    for options, message in [({"words": "nouns"}, "words 'nouns' is unknown"), ({"text_temperature": 0.0}, "positive")]:
        with pytest.raises(ValueError, match=message):
            sparsevlm.build("mmtok", **options)
    with pytest.raises(ValueError, match="this model has none. Use words='all'"):
        sparsevlm.build("mmtok", budget=9)(model).__enter__()
    x, _ = inputs("one", model)
    with (
        pytest.raises(ValueError, match="must know the question"),
        sparsevlm.build("mmtok", budget=9, words="all")(model),
    ):
        model.model.get_image_features(x["pixel_values"])


def test_mmtok_keywords_of_the_embedded_model():
    model, processor = sparsevlm.load("mini")
    method, seen = sparsevlm.build("mmtok", budget=64), []
    from PIL import Image

    x = processor(text="what digit is green ?", images=Image.new("RGB", (168, 168)))
    with method(model):
        embed = model.get_input_embeddings()
        hook = embed.register_forward_hook(lambda m, args, out: seen.append(args[0].flatten().tolist()))
        model(**x)
        hook.remove()
    assert processor.tokenizer.convert_tokens_to_ids(["digit", "green"]) in seen
    assert mmtok.keywords("What is it?") == ["What", "is", "it?"]


# ---- AnchorPrune -----------------------------------------------------------------------------------------------------
def relevant(seed: int = 0) -> Signals:
    signals = Signals(seed)
    patch, text = signals.signals["clip_patch"], signals.signals["clip_text"]
    signals.relevance, signals.more["embeds"] = -(patch @ text.T).mean(1)[None], patch[None]
    return signals


def test_anchorprune_special_cases():
    signals = relevant()
    ranked = signals.relevance[0].argsort(descending=True)
    assert chosen(sparsevlm.build("anchorprune", k_min=64), signals, 64) == sorted(ranked[:64].tolist())
    held = torch.zeros(1, 576, dtype=torch.bool)
    held[0, 0] = True
    far = farthest_first(cosine_matrix(signals.features), 63, signals.cls_attention().mean(1), start=held)
    signals.relevance = torch.ones_like(signals.relevance)
    same_everywhere = sparsevlm.build("anchorprune", k_min=1, k_max=0.0)
    assert chosen(same_everywhere, signals, 64) == sorted([0, *far[0].tolist()])


@pytest.mark.parametrize("count", BUDGETS)
def test_anchorprune_keeps_its_anchor(count):
    signals = relevant(1)
    ranked = signals.relevance[0].argsort(descending=True)
    least = max(1, round(5 * count / 32))
    for tau, patience in ((0.2, 3), (0.0, 1), (2.0, 1), (0.8, 2)):
        method = sparsevlm.build("anchorprune", tau=tau, patience=patience)
        size = int(method.anchor_size(signals.more["embeds"][:, ranked[: max(least, count // 2)]], least))
        assert least <= size <= max(least, count // 2)
        picked = chosen(method, signals, count)
        assert {*ranked[:size].tolist()} <= {*picked} and len({*picked}) == count
    assert size != least or tau != 0.0


def test_anchorprune_in_a_model_gives_every_prompt_its_anchor():
    model, tower = deep(), clip()
    x, _ = inputs("ragged", model)
    method = sparsevlm.build("anchorprune", clip=tower, tokenizer=Letters(), question=lambda ids: "cat", budget=10)
    together = kept(model, method, x)
    assert [len(row) for row in together] == [10, 10, 0]
    other = sparsevlm.build("anchorprune", clip=tower, tokenizer=Letters(), question=lambda ids: "dogs", budget=10)
    assert kept(model, other, x) != together
    with pytest.raises(ValueError, match="'anchorprune' needs the text tower"):
        sparsevlm.build("anchorprune", budget=10)(model).__enter__()
    with pytest.raises(ValueError, match="k_min 0 must be at least 1"):
        sparsevlm.build("anchorprune", k_min=0)
