"""CDPruner, which needs a CLIP text tower beside the model."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

import sparsevlm
from sparsevlm.methods._question import Question
from tests.methods.test_before_model import deep, features, handed_on
from tests.tiny import GENERATE, IMAGE, PATCHES, inputs, logits, same

START, END = 48, 49


class Letters:
    """A tokenizer that makes a token of every letter."""

    bos_token_id, eos_token_id = START, END

    def __call__(self, text: str, add_special_tokens: bool) -> dict:
        assert not add_special_tokens
        return {"input_ids": [ord(c) % 47 for c in text]}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids)) + "\nASSISTANT:"


def clip(width: int = 32) -> CLIPModel:
    text = CLIPTextConfig(
        vocab_size=50, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=10, projection_dim=20, bos_token_id=START, eos_token_id=END,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=42, patch_size=7
    )
    torch.manual_seed(4)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=20))
    return model.eval().double().requires_grad_(False)


def build(question="where is the cat", model=None, **options):
    ask = question if callable(question) else lambda ids: question
    return sparsevlm.build(
        "cdpruner", clip=model or clip(), tokenizer=Letters(), question=ask, **{"budget": 9} | options
    )


def kept(model, method, x) -> list[torch.Tensor]:
    return handed_on(model, method, x)[1].prefills[0].stages[0].kept


def test_by_hand():
    model, tower, text = deep(), clip(), "where is the cat"
    x, _ = inputs("one", model)
    states = features(model, x["pixel_values"])[0, 1:]
    embeds = F.normalize(tower.visual_projection(tower.vision_model.post_layernorm(states)), dim=-1)
    letters = [START, *(ord(c) % 47 for c in text), END]  # cut every 10 tokens, as the authors do
    segments = [torch.tensor([letters[i : i + 10]]) for i in range(0, len(letters), 10)]
    assert len(segments) == 2 and segments[1].shape[1] == 8  # padding behind the end changes nothing before it
    texts = [F.normalize(tower.get_text_features(s).pooler_output, dim=-1)[0] for s in segments]
    relevance = -sum(embeds @ t for t in texts) / 2
    relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    projected = F.normalize(model.model.multi_modal_projector(states), dim=-1)
    kernel = relevance[:, None] * (projected @ projected.T) * relevance
    chosen: list[int] = []
    for _ in range(9):
        sets = {i: [*chosen, i] for i in range(PATCHES) if i not in chosen}
        chosen.append(max(sets, key=lambda i: float(torch.det(kernel[sets[i]][:, sets[i]]))))
    _, trace, _ = handed_on(model, build(text), x)
    stage = trace.prefills[0].stages[0]
    same(stage.scores[0].double(), relevance, 1e-5)
    assert stage.kept[0].tolist() == sorted(chosen)
    assert trace.prefills[0].leaving == [9]


def test_the_question_matters_and_each_prompt_has_its_own():
    model, tower = deep(), clip()
    x, rows = inputs("ragged", model)
    plain = kept(model, build("a", tower), x)
    assert any(not torch.equal(a, b) for a, b in zip(plain, kept(model, build("zzz", tower), x), strict=True))
    own = build(lambda ids: "zzz" if (ids == IMAGE).sum() > PATCHES else "a", tower)
    mixed = kept(model, own, x)
    assert torch.equal(mixed[0], plain[0]) and not torch.equal(mixed[1], plain[1])
    with own(model):
        together = logits(model.generate(**x, **GENERATE))
        one = dict(input_ids=torch.tensor([rows[1]]), pixel_values=x["pixel_values"][1:])
        same(logits(model.generate(**one, **GENERATE)), together[1:2])


def test_the_question_is_the_text_after_the_last_picture():
    ids = torch.tensor([7, IMAGE, IMAGE, 8, IMAGE, 9, 10])
    assert Question(Letters(), (IMAGE,))(ids) == "9 10"


def test_refusals():
    model = deep()
    for options, message in [
        (dict(clip=None), "text tower"),
        (dict(clip=clip(16)), "width 16, the vision tower has 32"),
        (dict(tokenizer=None), "tokenizer="),
        (dict(question=None), "question="),
    ]:
        given = dict(clip=clip(), tokenizer=Letters(), question=lambda ids: "a", budget=9) | options
        with pytest.raises(ValueError, match=message), sparsevlm.build("cdpruner", **given)(model):
            pass
    x, _ = inputs("one", model)
    with pytest.raises(ValueError, match="must know the question"), build()(model):
        model.model.get_image_features(x["pixel_values"])
