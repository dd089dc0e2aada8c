"""Dynamic-LLaVA's two predictors (arXiv 2412.00876, section 3.2), with the weights' names of the authors' checkpoints.

Source: Osilly/dynamic_llava e1469bc, llava/model/language_model/dynamic_modeling_llama.py (`VisionPredictor`,
`TextPredictor`) and custom_transformer_layer.py. Class 0 is "keep" (the paper's equation 5 says the second).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """Sizes of the predictors.

    Attributes:
        hidden: width of the language model.
        width: of the image predictor.
        heads: of its attention.
        feed_forward: inner width of its blocks.
        blocks: how many it has.
        text_width: width of the output predictor; 0 = there is none.
    """

    hidden: int
    width: int = 512
    heads: int = 8
    feed_forward: int = 2048
    blocks: int = 2
    text_width: int = 512

    @classmethod
    def of(cls, hidden: int) -> Sizes:
        """Return the authors' sizes for language models of at least 1024, else a predictor of 49 k parameters."""
        return cls(hidden) if hidden >= 1024 else cls(hidden, 64, 4, 128, 1, 64)

    def __post_init__(self) -> None:
        if self.width % 4 or self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of 4 and of the number of heads ({self.heads})")


class Predictors(nn.Module):
    """The image predictor and, unless `sizes.text_width` is 0, the output predictor.

    Attributes:
        image_score_predictor: [B, N, hidden] states to [B, N, 2] logits, class 0 = keep.
        output_text_score_predictor: [B, T, hidden] states to [B, T, 2] logits, class 0 = write to the cache.
    """

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sizes = sizes
        self.image_score_predictor = ImagePredictor(sizes)
        self.output_text_score_predictor = OutputPredictor(sizes) if sizes.text_width else None

    @torch.no_grad()
    def start(self, seed: int, rate: float | None = None) -> Predictors:
        """Draw starting weights; equal seeds give equal weights.

        Linear layers are N(0, 1 / inputs), biases 0. (The authors' N(0, .02) suits their width of 4096.)

        Args:
            seed: of the draw.
            rate: share of the tokens that the image predictor shall keep in the beginning: its last weights are scaled
                by .3 and its last biases are log(rate / (1 - rate)) apart. None = neither.
        """
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
        if rate is not None:
            last = self.image_score_predictor.output_mlp[-1]
            last.weight *= 0.3
            last.bias[0] = torch.logit(torch.tensor(rate))
        return self


class ImagePredictor(nn.Module):
    """Scores visual tokens: projection down, pre-norm blocks among them, half of the channels replaced by their mean.

    It knows no positions.
    """

    def __init__(self, sizes: Sizes):
        super().__init__()
        width = sizes.width
        self.down_mlp = nn.Sequential(nn.LayerNorm(sizes.hidden), nn.Linear(sizes.hidden, width), nn.GELU())
        self.transformer = nn.ModuleList(_Block(width, sizes.heads, sizes.feed_forward) for _ in range(sizes.blocks))
        self.output_mlp = _head(width)

    def forward(self, states: Tensor, valid: Tensor | None = None) -> Tensor:
        """Compute logits [B, N, 2] of states [B, N, hidden].

        Args:
            states: the visual tokens that enter the pruning layer.
            valid: [B, N] bool, which are real; None = all. Others count neither in the attention nor in the mean.
        """
        x = self.down_mlp(states)
        for block in self.transformer:
            x = block(x, valid)
        half = x.shape[-1] // 2
        rest = x[..., half:]
        if valid is None:
            mean = rest.mean(1, keepdim=True)
        else:
            weights = valid.to(x.dtype)[..., None]
            mean = (rest * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1)
        return self.output_mlp(torch.cat([x[..., :half], mean.expand_as(rest)], -1))


class OutputPredictor(nn.Module):
    """Decides about generated tokens, each by itself."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        width = sizes.text_width
        first = (nn.LayerNorm(sizes.hidden), nn.Linear(sizes.hidden, width), nn.GELU())
        self.output_mlp = nn.Sequential(*first, *_head(width))

    def forward(self, states: Tensor) -> Tensor:
        """Compute logits [B, T, 2] of states [B, T, hidden]."""
        return self.output_mlp(states)


def _head(width: int) -> nn.Sequential:
    half, quarter = width // 2, width // 4
    return nn.Sequential(nn.Linear(width, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 2))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, feed_forward: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = _SelfAttention(width, heads)
        self.mlp = _FeedForward(width, feed_forward)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        x = x + self.attn(self.norm1(x), valid)
        return x + self.mlp(self.norm2(x))


class _SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        logits = query @ key.mT * query.shape[-1] ** -0.5
        if valid is not None:
            logits = logits.masked_fill(~valid[:, None, None], torch.finfo(logits.dtype).min)
        return self.proj((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))
