"""Architecture and starting weights of the embedded model: LLaVA with a 4-layer CLIP tower and a 12-layer Llama.

The starting weights are structured (position table, attention that looks at itself) because that is what lets a model
this small learn look-up within minutes; see README.md.
"""

import math

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from sparsevlm.mini.clips import FRAME_TOKENS, FRAMES
from sparsevlm.mini.clips import GRID as CLIP_GRID
from sparsevlm.mini.scenes import GRID, PATCH
from sparsevlm.mini.vocabulary import BOS, EOS, IMAGE, PAD, VIDEO, VIDEO_VOCAB_SIZE, VOCAB_SIZE, WORD_ID, WORDS

LAYERS = 12
_PROJECTION = {
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "tie_word_embeddings": False,
}


def build_config(layers: int = LAYERS) -> LlavaConfig:
    """Configuration of the embedded model: 168 x 168 pixels, 24 x 24 visual tokens, 6.2 M parameters.

    Args:
        layers: of the language model; a guide has fewer.
    """
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=GRID * PATCH,
        patch_size=PATCH,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        # slow rotary dimensions: words look up content 600 positions away
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=WORD_ID[BOS],
        eos_token_id=WORD_ID[EOS],
        pad_token_id=WORD_ID[PAD],
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=WORD_ID[IMAGE],
        image_seq_length=GRID * GRID,
        **_PROJECTION,
    )


@torch.no_grad()
def build_model(seed: int, layers: int = LAYERS) -> LlavaForConditionalGeneration:
    """The embedded model with its starting weights, float32 on the CPU; equal seeds give equal weights."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(build_config(layers))
    _start_tower(model.model.vision_tower)
    projector = model.model.multi_modal_projector
    for layer in (projector.linear_1, projector.linear_2):
        _normal(layer.weight, 1 / math.sqrt(layer.in_features))
        layer.bias.zero_()
    _start_language_model(model.model.language_model)
    _normal(model.lm_head.weight, 0.02)
    return model


def embed_patches(model: LlavaForConditionalGeneration, pixels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Vision tower on a picture, or on a window of one.

    Args:
        model: the embedded model.
        pixels: ``[batch, 3, side, side]``, normalised.
        positions: int ``[batch, patches]``, where each patch lies on the 24 x 24 grid (row-major).

    Returns:
        ``[batch, patches, 128]``: the features that LLaVA hands to the projector (class token dropped).
    """
    tower = model.model.vision_tower
    table = tower.embeddings.position_embedding
    patches = tower.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2) + table(positions + 1)
    class_token = (tower.embeddings.class_embedding + table.weight[0]).expand(len(pixels), 1, -1)
    hidden = tower.pre_layrnorm(torch.cat([class_token.to(patches.dtype), patches], 1))
    return tower.encoder(inputs_embeds=hidden).last_hidden_state[:, 1:]


def build_video_config() -> VideoLlavaConfig:
    """Configuration of the embedded video model: 8 frames of 56 x 56 pixels, 8 x 65 visual tokens."""
    image = build_config()
    vision, text = image.vision_config, image.text_config
    vision.image_size = CLIP_GRID * PATCH
    text.vocab_size = VIDEO_VOCAB_SIZE
    return VideoLlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=WORD_ID[IMAGE],
        video_token_index=WORD_ID[VIDEO],
        image_seq_length=CLIP_GRID * CLIP_GRID,
        video_seq_length=FRAMES * FRAME_TOKENS,
        **_PROJECTION,
    )


@torch.no_grad()
def build_video_model(image_state: dict[str, torch.Tensor], seed: int) -> VideoLlavaForConditionalGeneration:
    """The embedded video model, begun with the weights of the trained embedded model; float32 on the CPU.

    Both towers start as the picture's, with the upper left corner of its position table. Words it does not know start
    at random.

    Args:
        image_state: state of the embedded model (:func:`sparsevlm.mini.training.hub.load_weights`).
        seed: of what is random.
    """
    torch.manual_seed(seed)
    model = VideoLlavaForConditionalGeneration(build_video_config())
    _normal(model.model.language_model.embed_tokens.weight, 1.0)
    _normal(model.lm_head.weight, 0.02)
    state = model.state_dict()
    known = len(WORDS)
    for name, value in image_state.items():
        if name.endswith("position_embedding.weight"):
            table = value[1:].unflatten(0, (GRID, GRID))[:CLIP_GRID, :CLIP_GRID]
            value = torch.cat([value[:1], table.flatten(0, 1)])
        for tower in ("image_tower.", "video_tower."):
            target = state[name.replace("vision_tower.", tower)]
            target[:known].copy_(value[:known]) if value.shape != target.shape else target.copy_(value)
    model.load_state_dict(state)
    return model


def embed_frames(model: VideoLlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """Video tower on clips.

    Args:
        model: the embedded video model.
        pixels: ``[batch, 8, 3, 56, 56]``, normalised.

    Returns:
        ``[batch, 8 * 65, 128]``: the features that Video-LLaVA hands to the projector.
    """
    tower = model.model.video_tower
    hidden = tower.pre_layrnorm(tower.embeddings(pixels.flatten(0, 1)))
    return tower.encoder(inputs_embeds=hidden).last_hidden_state.unflatten(0, pixels.shape[:2]).flatten(1, 2)


def _normal(weight: torch.Tensor, std: float) -> None:
    nn.init.normal_(weight, std=std)


def _start_tower(tower) -> None:
    width, heads = tower.config.hidden_size, tower.config.num_attention_heads
    embeddings = tower.embeddings
    embeddings.position_embedding.weight.zero_()
    embeddings.position_embedding.weight[1:] = 0.7 * _position_table(width, heads)
    _normal(embeddings.class_embedding, 0.02)
    _normal(embeddings.patch_embedding.weight, 1 / math.sqrt(3 * PATCH * PATCH))
    for layer in tower.encoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        # query = key = identity, nearly: every patch attends to its neighbourhood from the first step
        for projection in (attention.q_proj, attention.k_proj):
            _normal(projection.weight, 0.3 / math.sqrt(width))
            projection.weight += 1.3 * torch.eye(width)
        for projection in (attention.v_proj, attention.out_proj):
            nn.init.orthogonal_(projection.weight, gain=0.7)
        _normal(mlp.fc1.weight, 1 / math.sqrt(width))
        _normal(mlp.fc2.weight, 0.5 / math.sqrt(mlp.fc2.in_features))
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, mlp.fc1, mlp.fc2):
            linear.bias.zero_()


def _position_table(width: int, heads: int) -> torch.Tensor:
    """Sines and cosines of both coordinates, ``[grid * grid, width]``; each head gets the range of frequencies."""
    count = width // 4
    frequency = 1.6 * (0.06 / 1.6) ** (torch.arange(count) / (count - 1))
    y, x = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    x, y = (axis.reshape(-1, 1) * frequency for axis in (x, y))
    table = torch.stack([x.sin(), x.cos(), y.sin(), y.cos()], 1)  # [patches, 4, count]
    return torch.cat([table[..., head::heads].flatten(1) for head in range(heads)], 1)


def _start_language_model(language_model) -> None:
    width, layers = language_model.config.hidden_size, language_model.config.num_hidden_layers
    _normal(language_model.embed_tokens.weight, 1.0)
    for layer in language_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        # query and key share a rotation: equal content attends to equal content
        shared = nn.init.orthogonal_(torch.empty(width, width))
        for projection in (attention.q_proj, attention.k_proj):
            _normal(projection.weight, 0.02)
            projection.weight += shared
        _normal(attention.v_proj.weight, 1 / math.sqrt(width))
        _normal(attention.o_proj.weight, 1 / math.sqrt(width * layers))
        _normal(mlp.gate_proj.weight, 1 / math.sqrt(width))
        _normal(mlp.up_proj.weight, 1 / math.sqrt(width))
        _normal(mlp.down_proj.weight, 0.7 / math.sqrt(mlp.down_proj.in_features * layers))
