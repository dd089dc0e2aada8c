"""Other ways to give a prompt to a model: exact, or refused before a layer has computed anything."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

import sparsevlm
from tests.methods.test_matrix import METHODS
from tests.methods.test_state import build
from tests.tiny import GENERATE, IMAGE, inputs, llava, logits, pad, prompt, same, text_config, video_llava

NAMES = sorted(set(METHODS) - {"anchorprune", "cdpruner", "mmtok", "sgl, guide"})  # these read ids
TOWER = ["divprune", "fastervlm", "visionzip", "folder", "aim", "downsample"]


def no_layer(model):
    """Let every decoder layer fail: what is refused must be refused before."""

    def fail(*_) -> None:
        raise AssertionError("a layer was computed")

    return [layer.self_attn.register_forward_pre_hook(fail) for layer in model.model.language_model.layers]


def embedded(model, x: dict) -> dict:
    """The same prompt as embeddings, placeholders among them."""
    embeds = model.get_input_embeddings()(x["input_ids"]).detach()
    return {"inputs_embeds": embeds} | {k: v for k, v in x.items() if k != "input_ids"}


def merged(model, x: dict) -> tuple[dict, torch.Tensor]:
    """The same with features in the place of placeholders, and where they are."""
    visual = x["input_ids"] == IMAGE
    features = torch.cat(list(model.model.get_image_features(x["pixel_values"], return_dict=True).pooler_output))
    embeds = model.get_input_embeddings()(x["input_ids"]).masked_scatter(visual[..., None], features)
    return {"inputs_embeds": embeds.detach(), "attention_mask": x["attention_mask"]}, visual


# ---- embeddings ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_embeddings_with_pixels_equal_ids(name):
    model = llava()
    x, _ = inputs("ragged", model)
    short = GENERATE | {"max_new_tokens": 2}
    with build(name)(model) as trace:
        want = logits(model.generate(**x, **short))
        for cache in (True, False):
            same(want, logits(model.generate(**embedded(model, x), **short, use_cache=cache)))
        direct = [model(**given).logits[:, -1] for given in (x, embedded(model, x))]
    same(*direct)
    first, *others = [(p.n_visual, p.leaving) for p in trace.prefills]
    assert len(others) == 4 and all(other == first for other in others)  # transformers keeps the cache here


def test_embedded_video_beside_an_image():
    model = video_llava()
    torch.manual_seed(3)
    ids, mask = pad([prompt([4, "I", 8], n_image=16), prompt([6, "V", 11])])
    x = {
        "input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(1, 3, 28, 28, dtype=model.dtype),
        "pixel_values_videos": torch.randn(1, 8, 3, 28, 28, dtype=model.dtype),
    }  # fmt: skip
    with build("fastervlm")(model):
        same(*(logits(model.generate(**given, **GENERATE)) for given in (x, embedded(model, x))))


@pytest.mark.parametrize("name", ["fastervlm", "divprune", "vispruner"])
@torch.no_grad()
def test_an_image_and_a_video_in_one_prompt_are_traced(name):
    """In either order: what the trace says is kept is what the model itself makes of these tokens."""
    model = video_llava()
    torch.manual_seed(3)
    ids, mask = pad([prompt([4, "V", 2, "I", 8], n_image=16), prompt([2, "I", "V", 5], n_image=16)])
    x = {
        "input_ids": ids, "attention_mask": mask, "pixel_values_images": torch.randn(2, 3, 28, 28, dtype=model.dtype),
        "pixel_values_videos": torch.randn(2, 8, 3, 28, 28, dtype=model.dtype),
    }  # fmt: skip
    entered = []
    decoder = model.model.language_model
    handle = decoder.register_forward_pre_hook(lambda m, a, k: entered.append(k["inputs_embeds"]), with_kwargs=True)
    model(**x)
    with sparsevlm.build(name, budget=40)(model) as trace:
        model(**x)
    handle.remove()
    whole, pruned = entered
    stage = trace.prefills[0].stages[0]
    for b, row in enumerate(ids):
        visual = row >= IMAGE
        assert torch.equal(stage.kept[b], stage.origin[b]) and len(stage.kept[b]) == 40
        if stage.scores[b] is not None:
            assert len(stage.scores[b]) == 152
        same(whole[b, visual][stage.kept[b]], pruned[b, visual][(pruned[b, visual] != 0).any(-1)])


@pytest.mark.parametrize("name", ["anchorprune", "cdpruner", "mmtok"])
def test_embeddings_hide_the_question(name):
    model = llava()
    x, _ = inputs("one", model)
    with build(name)(model):
        for call in (model, model.generate):
            with pytest.raises(ValueError, match=f"'{name}' reads the (question|words) from input_ids"):
                call(**embedded(model, x))


@pytest.mark.parametrize("name", ["sparsevlm", "random", "fastervlm", "none"])
def test_embeddings_without_pixels_need_a_mask(name):
    model = llava()
    x, _ = inputs("one", model)
    holding_placeholders = embedded(model, {k: v for k, v in x.items() if k != "pixel_values"})
    cache = DynamicCache()
    model(input_ids=x["input_ids"][:, :3], past_key_values=cache)
    hooks = no_layer(model)
    for given in (merged(model, x)[0], holding_placeholders):
        with build(name)(model):
            for call in (model, model.generate, model.model):
                with pytest.raises(ValueError, match="do not show which tokens are visual. Enter the block with"):
                    call(**given)
            with pytest.raises(ValueError, match="do not show which tokens are visual"):  # nor in a later turn
                model(inputs_embeds=given["inputs_embeds"], past_key_values=cache)
    for hook in hooks:
        hook.remove()


def test_embeddings_of_text_alone_with_an_empty_mask():
    model = llava()
    embeds = model.get_input_embeddings()(torch.tensor([prompt([9])])).detach()
    want = logits(model.generate(inputs_embeds=embeds, **GENERATE))
    with build("sparsevlm")(model, visual_mask=torch.zeros(1, 9, dtype=torch.bool)) as trace:
        assert torch.equal(want, logits(model.generate(inputs_embeds=embeds, **GENERATE)))
    assert not trace.prefills


# ---- masks of the caller's own ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["one", "batch"])
@pytest.mark.parametrize("name", ["sparsevlm", "sparsevlm_plus", "random", "dart"])
def test_merged_embeddings_with_their_mask_equal_ids(name, kind):
    model = llava()
    x, _ = inputs(kind, model)
    given, visual = merged(model, x)
    with build(name)(model):
        want = model.generate(**x, **GENERATE)
        beams = model.generate(**x, num_beams=3, max_new_tokens=4, do_sample=False)
    with build(name)(model, visual_mask=visual) as trace:
        for cache in (True, False, True):  # the same prompt again
            same(logits(want), logits(model.generate(**given, **GENERATE, use_cache=cache)))
        assert torch.equal(beams[:, -4:], model.generate(**given, num_beams=3, max_new_tokens=4, do_sample=False))
        out = model(**given, past_key_values=DynamicCache())
        more = torch.nn.functional.pad(x["attention_mask"], (0, 3), value=1)
        words = torch.full((len(visual), 3), 5)
        turn = model(input_ids=words, attention_mask=more, past_key_values=out.past_key_values)  # goes on
    assert turn.logits.isfinite().all() and len(trace.prefills) == 5


def test_a_mask_is_for_its_own_prompt_only():
    model = llava()
    x, _ = inputs("one", model)
    given, visual = merged(model, x)
    embeds = given["inputs_embeds"]
    others = {
        "visual_mask is for 50 tokens, the input has 53; enter a new block": torch.cat([embeds, embeds[:, :3]], 1),
        "visual_mask is for 50 tokens, the input has 40; enter a new block": embeds[:, :40],
        "visual_mask has 1 rows, the input 2; enter a new block": embeds.repeat(2, 1, 1),
    }
    hooks = no_layer(model)
    with build("sparsevlm")(model, visual_mask=visual):
        for message, other in others.items():
            for call in (model, model.generate):
                with pytest.raises(ValueError, match=message):
                    call(inputs_embeds=other)
    for hook in hooks:
        hook.remove()


def test_a_mask_beside_pixels_marks_placeholders_only():
    model = llava()
    x, _ = inputs("one", model)
    visual = x["input_ids"] == IMAGE
    with build("sparsevlm")(model):
        want = model(**x).logits
    with build("sparsevlm")(model, visual_mask=visual):
        assert torch.equal(want, model(**x).logits)
    with build("sparsevlm")(model, visual_mask=visual.roll(1)):
        with pytest.raises(ValueError, match="marks tokens that are no placeholders of pictures; enter a new block"):
            model(**x)


def test_a_second_turn_of_embeddings_in_a_block_of_its_own():
    """The mask of the second block is that of the second turn; in the first block it would be text."""
    model = llava()
    x, _ = inputs("batch", model)
    torch.manual_seed(4)
    ids = torch.tensor([prompt([3, "I", 6]) for _ in range(3)])
    pixels = torch.randn(3, 3, 42, 42, dtype=model.dtype)
    mask = torch.cat([x["attention_mask"], torch.ones_like(ids)], 1)
    second = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    def turn(given: dict, cache) -> torch.Tensor:
        positions = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
        return model(**given | {"attention_mask": mask, "position_ids": positions}, past_key_values=cache).logits

    with build("sparsevlm")(model):
        first = model(**x, position_ids=(x["attention_mask"].cumsum(1) - 1).clamp(min=0))
        want = turn(second, first.past_key_values)
    (given, visual), (later, new) = merged(model, x), merged(model, second)
    with build("sparsevlm")(model, visual_mask=visual):
        first = model(**given, position_ids=(x["attention_mask"].cumsum(1) - 1).clamp(min=0))
    with build("sparsevlm")(model, visual_mask=new) as trace:
        same(want, turn(later, first.past_key_values))
    assert len(trace.prefills) == 1
    with build("sparsevlm")(model, visual_mask=new[:, 1:]):
        with pytest.raises(ValueError, match="visual_mask is for 44 tokens, the input has 45"):
            turn(later, first.past_key_values)


@pytest.mark.parametrize("name", TOWER)
def test_a_second_turn_with_pictures_by_direct_calls(name):
    """Vision methods are told the new tokens of a direct call, which are all of its ids."""
    model = llava()
    x, rows = inputs("batch", model)
    torch.manual_seed(4)
    ids = torch.tensor([prompt([3, "I", 6]) for _ in range(3)])
    pixels = torch.randn(3, 3, 42, 42, dtype=model.dtype)

    def chat(first: dict, ids, pixels):
        positions = (first["attention_mask"].cumsum(1) - 1).clamp(min=0)
        cache = model(**first, position_ids=positions).past_key_values
        mask = torch.cat([first["attention_mask"], torch.ones_like(ids)], 1)
        positions = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
        call = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        return model(input_ids=ids, pixel_values=pixels, **call).logits[:, -1]

    with build(name)(model):
        together = chat(x, ids, pixels)
        for b, row in enumerate(rows):
            one = {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
            alone = chat(one | {"pixel_values": x["pixel_values"][b : b + 1]}, ids[b : b + 1], pixels[b : b + 1])
            same(together[b], alone[0])


# ---- which features --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TOWER)
def test_other_features_than_those_of_the_config_are_refused(name):
    model = llava()
    x, _ = inputs("one", model)
    hooks = no_layer(model)
    with build(name)(model):
        for asked in ({"vision_feature_layer": -1}, {"vision_feature_layer": [-2, -1]}):
            for call in (model, model.generate):
                with pytest.raises(ValueError, match=r"installed for vision_feature_layer=-2, .* set these in model"):
                    call(**x, **asked)
            with pytest.raises(ValueError, match="installed for vision_feature_layer=-2"):
                model.get_image_features(x["pixel_values"], **asked)
        with pytest.raises(ValueError, match="the call asks for -2, 'full'"):
            model(**x, vision_feature_select_strategy="full")
        model.config.vision_feature_layer = -1
        with pytest.raises(ValueError, match="the call asks for -1"):
            model(**x)
        model.config.vision_feature_layer = -2
    for hook in hooks:
        hook.remove()
    with build(name)(model):
        same(*(model(**x, **asked).logits for asked in ({}, {"vision_feature_layer": -2})))


def test_methods_in_the_language_model_take_any_features():
    model = llava()
    x, _ = inputs("one", model)
    changed = llava()
    changed.config.vision_feature_layer = -1
    with build("sparsevlm")(changed):
        want = changed(**x).logits
    with build("sparsevlm")(model):
        same(want, model(**x, vision_feature_layer=-1).logits)
        same(logits(model.generate(**x, vision_feature_layer=-1, **GENERATE))[:, 0], want[:, -1].float())


# ---- attention masks and positions -----------------------------------------------------------------------------------
def causal(length: int, past: int = 0) -> torch.Tensor:
    return torch.arange(past + length) <= torch.arange(past, past + length)[:, None]


def prefix(length: int, first: int) -> torch.Tensor:
    mask = causal(length)
    mask[:first, :first] = True
    return mask


CUSTOM = {
    "prefix": prefix(50, 41),
    "blind": causal(50) & ~((torch.arange(50)[:, None] == 48) & (torch.arange(50) == 2)),
    "blocks": causal(50) & ((torch.arange(50) < 45) == (torch.arange(50)[:, None] < 45)),
}


def as_bias(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", CUSTOM)
@pytest.mark.parametrize("name", ["sparsevlm", "sparsevlm_plus", "random", "fastervlm", "sparsevlm_rank"])
def test_custom_masks_are_refused(name, mask, impl):
    model = llava(impl=impl)
    x, _ = inputs("one", model)
    own = CUSTOM[mask][None, None]
    hooks = no_layer(model)
    with build(name)(model):
        for given in (own, as_bias(own, model.dtype), own.expand(1, 4, -1, -1)):
            with pytest.raises(NotImplementedError, match="more than causal and padding cannot be followed"):
                model(**x | {"attention_mask": given})
        bias = as_bias(causal(50)[None, None], model.dtype)
        bias[..., 0] += -0.5  # as of ALiBi
        with pytest.raises(NotImplementedError, match="more than causal and padding"):
            model(**x | {"attention_mask": bias})
    for hook in hooks:
        hook.remove()
    with sparsevlm.build("none")(model):  # drops nothing
        model(**x | {"attention_mask": as_bias(own, model.dtype)})


@pytest.mark.parametrize("kind", ["one", "batch"])
@pytest.mark.parametrize("name", ["sparsevlm", "sparsevlm_plus", "random", "dart"])
def test_plain_masks_in_four_dimensions_equal_those_in_two(name, kind):
    """Also in a decode step, whose mask the caller makes for the first layer's cache."""
    model = llava()
    x, _ = inputs(kind, model)
    two = x["attention_mask"]
    length = two.shape[1]
    positions = (two.cumsum(1) - 1).clamp(min=0)
    full = torch.nn.functional.pad(two, (0, 1), value=1)
    step = {"input_ids": torch.full((len(two), 1), 7), "position_ids": full.sum(1, keepdim=True) - 1}

    def four(mask: torch.Tensor, n: int) -> torch.Tensor:
        return (causal(n, mask.shape[1] - n) & mask.bool()[:, None])[:, None]

    with build(name)(model):
        outs = []
        for first in (two, four(two, length)):
            out = model(**x | {"attention_mask": first, "position_ids": positions})
            held = out.past_key_values.layers[0].keys.shape[2]
            second = full if first is two or held < length else four(full, 1)
            outs += [
                out.logits[:, -1],
                model(**step, attention_mask=second, past_key_values=out.past_key_values).logits,
            ]
    same(outs[0], outs[2])
    same(outs[1], outs[3])


def test_custom_masks_of_a_decode_step_are_refused():
    model = llava()
    x, _ = inputs("one", model)
    with build("sparsevlm")(model):
        cache = model(**x).past_key_values
        mask = torch.ones(1, 1, 1, 51, dtype=torch.bool)
        mask[..., 4] = False
        with pytest.raises(NotImplementedError, match="more than causal and padding cannot be followed"):
            model(input_ids=torch.tensor([[7]]), attention_mask=mask, past_key_values=cache)


PACKED = torch.cat([torch.arange(45), torch.arange(5)])[None]


@pytest.mark.parametrize("name", ["sparsevlm", "sparsevlm_plus", "random", "fastervlm"])
def test_packed_sequences_are_refused(name):
    """Without a cache and a mask transformers takes a jump of position_ids for the beginning of another sequence."""
    model = llava()
    x, _ = inputs("one", model)
    del x["attention_mask"]
    packed, plain = (model(**x, position_ids=p, use_cache=False).logits for p in (PACKED, None))
    assert not torch.allclose(packed[:, -1], plain[:, -1])
    hooks = no_layer(model)
    with build(name)(model):
        with pytest.raises(NotImplementedError, match="several sequences packed into one row.*one sequence per row"):
            model(**x, position_ids=PACKED, use_cache=False)
    for hook in hooks:
        hook.remove()
    with build(name)(model):
        same(*(model(**x, position_ids=p, use_cache=False).logits for p in (torch.arange(50)[None], None)))


def test_positions_that_jump_stay_with_the_survivors_or_are_refused():
    """With a cache they are only positions: those of the survivors are kept, which equals hiding the others."""
    model = llava()
    x, _ = inputs("one", model)
    jump = torch.cat([torch.arange(45), torch.arange(100, 105)])[None]
    given, visual = merged(model, x)
    with sparsevlm.build("random", budget=12)(model) as trace:
        got = model(**x, position_ids=jump).logits
    (kept,) = trace.prefills[0].stages[0].kept
    stay = torch.cat([torch.arange(5), 5 + kept, torch.arange(41, 50)])
    want = model(inputs_embeds=given["inputs_embeds"][:, stay], position_ids=jump[:, stay]).logits
    same(got[:, stay], want)
    with build("sparsevlm")(model):
        with pytest.raises(NotImplementedError, match="cannot be renumbered.*or use positions='original'"):
            model(**x, position_ids=jump)


@pytest.mark.filterwarnings("ignore:_compile flag")
@pytest.mark.parametrize("name", ["sparsevlm", "random", "fastervlm"])
def test_flex_attention_is_refused(name):
    model, x = llava(dtype=torch.float32), inputs("one")[0]
    x["pixel_values"] = x["pixel_values"].float()
    model.set_attn_implementation({"text_config": "flex_attention"})
    hooks = no_layer(model)
    with build(name)(model):
        for given in (x, {k: v for k, v in x.items() if k != "attention_mask"}):
            for call in (model, model.generate):
                with pytest.raises(NotImplementedError, match="flex_attention.*set_attn_implementation..sdpa"):
                    call(**given)
    for hook in hooks:
        hook.remove()


# ---- wrapped models --------------------------------------------------------------------------------------------------
class Forwarding(torch.nn.Module):
    """Attributes that it lacks are those of the module inside."""

    inside: str

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__(self.inside), name)

    def forward(self, *args, **kwargs):
        return getattr(self, self.inside)(*args, **kwargs)


class Tuner(Forwarding):
    """As `peft.LoraModel`: its `model` is the whole model, not the one without a head."""

    inside = "model"

    def __init__(self, model):
        super().__init__()
        self.model = model


class Wrapper(Forwarding):
    """As `peft.PeftModel`."""

    inside = "base_model"

    def __init__(self, model, config=None):
        super().__init__()
        self.base_model, self.active_peft_config = Tuner(model), config

    def get_base_model(self):
        return self.base_model.model

    def generate(self, *args, **kwargs):
        return self.base_model.generate(*args, **kwargs)


@pytest.mark.parametrize("name", ["sparsevlm", "fastervlm"])
def test_peft_models_are_unwrapped(name):
    model = llava()
    x, _ = inputs("batch", model)
    with build(name)(model):
        want = model.generate(**x, **GENERATE), model(**x).logits
    wrapped = Wrapper(model)
    with build(name)(wrapped) as trace:
        same(logits(want[0]), logits(wrapped.generate(**x, **GENERATE)))
        same(want[1], wrapped(**x).logits)
    assert len(trace.prefills) == 2 and "generate" not in vars(model)


def test_peft_models_that_add_tokens_are_refused():
    class Config:
        is_prompt_learning, peft_type = True, "PROMPT_TUNING"

    with pytest.raises(ValueError, match=r"Wrapper adds virtual tokens to each prompt \(PROMPT_TUNING\).*LoRA"):
        with build("sparsevlm")(Wrapper(llava(), Config())):
            pass


def test_plain_text_models_are_unwrapped():
    model = LlamaForCausalLM(text_config(layers=4)).eval()
    embeds, visual = torch.randn(1, 20, 64), torch.arange(20)[None] < 10
    method = sparsevlm.build("random", budget=4)
    with method(model, visual_mask=visual):
        want = model(inputs_embeds=embeds).logits
    with method(Wrapper(model), visual_mask=visual):
        assert torch.equal(want, model(inputs_embeds=embeds).logits)
