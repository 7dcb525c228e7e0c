"""Autoregressive transformer over the bytes of an image: trained in parallel, sampled with states of constant size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from perf_vit.layers import MIXERS, LinearizedAttention
from perf_vit.layers.chunked import finish_block
from perf_vit.layers.token_grid import TokenGrid
from perf_vit.ops import KVState

__all__ = ["Generator", "ModelOptions", "PixelTransformer", "bits_per_dim"]

NUM_VALUES, NUM_BANDS = 256, 3


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Sizes of a model.

    Attributes:
        mixer: Name of a mixer with causal order, or "none" for blocks without attention.
        kernel: Kernel of "performer".
        depth: Number of blocks.
        dim: Channels.
        num_heads: Heads.
        num_features: Random features of "performer".
        side: Rows and columns of an image.
        neighbours: Whether a token also gets the value left of it and the one above, of its own band.
    """

    mixer: str = "performer"
    kernel: str = "softmax+"
    depth: int = 6
    dim: int = 64
    num_heads: int = 2
    num_features: int = 64
    side: int = 32
    neighbours: bool = True

    @property
    def length(self) -> int:
        """Number of tokens, L: one for each band of each pixel."""
        return self.side**2 * NUM_BANDS

    @property
    def lags(self) -> tuple[int, ...]:
        """How many tokens back the values lie that a token gets."""
        return (1, NUM_BANDS, NUM_BANDS * self.side) if self.neighbours else (1,)


class PixelTransformer(nn.Module):
    """Predicts each value of an image, in raster order and R, G, B within a pixel, from all before it.

    A token stands for the value to predict. It is the sum of embeddings of its row, column and band and of the values
    before it at `lags`. Without attention a token sees these alone.
    """

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.options = options
        # The last value stands for a place outside the image.
        self.values = nn.ModuleList(nn.Embedding(NUM_VALUES + 1, options.dim) for _ in options.lags)
        self.rows, self.columns = (nn.Embedding(options.side, options.dim) for _ in range(2))
        self.bands = nn.Embedding(NUM_BANDS, options.dim)
        self.blocks = nn.ModuleList(_block(options, index) for index in range(options.depth))
        self.norm = nn.LayerNorm(options.dim)
        self.head = nn.Linear(options.dim, NUM_VALUES)
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        """Initialise, so that near values and places are near, and blocks pass their tokens on unchanged.

        Attention begins as the mean of all tokens before, nearly the same for each. If embeddings are small against it,
        those of 0.02 for example, blocks see little but this common vector.
        """
        dim = self.options.dim
        for embedding in [*self.values, self.rows, self.columns]:
            embedding.weight.copy_(0.6 * _waves(embedding.num_embeddings, dim))
        nn.init.normal_(self.bands.weight, std=0.4)
        self.head.weight.copy_(0.02 * _waves(NUM_VALUES, dim))
        nn.init.zeros_(self.head.bias)
        for block in self.blocks:
            layers = [block.mlp.fc2, *([] if self.options.mixer == "none" else [block.attn.proj])]
            for parameter in (each for layer in layers for each in layer.parameters()):
                nn.init.zeros_(parameter)

    def forward(self, values: Tensor) -> Tensor:
        """Return logits of all values, [B, L, 256], given values, [B, L]."""
        seen = [F.pad(values, (lag, 0), value=NUM_VALUES)[:, : values.shape[1]] for lag in self.options.lags]
        x = self.embed(seen, torch.arange(values.shape[1], device=values.device))
        for block in self.blocks:
            x = block(x, is_causal=True)
        return self.head(self.norm(x))

    def embed(self, seen: list[Tensor], places: Tensor) -> Tensor:
        """Return tokens, [B, n, C], given the values at each lag, [B, n], and their places, [n]."""
        pixels, bands = places // NUM_BANDS, places % NUM_BANDS
        place = self.rows(pixels // self.options.side) + self.columns(pixels % self.options.side) + self.bands(bands)
        return place + sum(embedding(value) for embedding, value in zip(self.values, seen, strict=True))


class Generator:
    """Draws images value by value. Each layer keeps a `KVState`, so a step costs the same at any place.

    Args:
        model: Model of Performer layers.
        number: Images drawn at once, B.
    """

    def __init__(self, model: PixelTransformer, number: int) -> None:
        self._model = model
        self._states: list[KVState | None] = [None] * len(model.blocks)
        # No more than the values at the longest lag would be needed; the image is kept to return it.
        self.values = torch.full((number, model.options.length), NUM_VALUES)
        self._place = 0

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Take the token of the next place into the states; return the logits of its value, [B, 256]."""
        model, place = self._model, self._place
        outside = torch.full_like(self.values[:, :1], NUM_VALUES)
        seen = [self.values[:, place - lag, None] if place >= lag else outside for lag in model.options.lags]
        x = model.embed(seen, torch.tensor([place]))
        for index, block in enumerate(model.blocks):
            attention = block.attn
            q, k, v = attention.queries_keys_values(block.norm1(x))
            before, mixer = self._states[index], attention.mixer
            state = KVState.from_keys(k, v, mixer.projection, mixer.options.kernel)
            self._states[index] = state = state if before is None else before.merge(state)
            x = finish_block(block, x, attention.finish(state.attend(q).transpose(1, 2).flatten(2)))
        return model.head(model.norm(x))[:, 0]

    def append(self, values: Tensor) -> None:
        """Set the value of the next place, [B]."""
        self.values[:, self._place] = values
        self._place += 1

    def state_bytes(self) -> int:
        """Return the size of the states of all layers."""
        parts = [(state.S, state.z, state.log_scale) for state in self._states if state is not None]
        return sum(part.numel() * part.element_size() for three in parts for part in three)


def bits_per_dim(logits: Tensor, values: Tensor) -> Tensor:
    """Return the mean cross-entropy in bits, given logits, [B, L, 256], and values, [B, L]."""
    return F.cross_entropy(logits.flatten(0, 1), values.flatten()) / math.log(2)


class _NoAttention(nn.Module):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return torch.zeros_like(x)


def _waves(number: int, dim: int) -> Tensor:
    """Return cosines and sines of 0 .. number - 1, [number, dim], with random rotations of the channels."""
    periods = 2 * number / torch.logspace(0, math.log2(number / 4), dim // 2, base=2)
    angles = 2 * math.pi * torch.arange(number).unsqueeze(1) / periods
    return torch.cat([angles.cos(), angles.sin()], dim=1) @ nn.init.orthogonal_(torch.empty(dim, dim))


def _block(options: ModelOptions, index: int) -> Block:
    block = Block(options.dim, options.num_heads, qkv_bias=True)
    if options.mixer == "none":
        block.attn = _NoAttention()
        return block
    own = {"kernel": options.kernel, "num_features": options.num_features} if options.mixer == "performer" else {}
    mixer = MIXERS[options.mixer].options_type(layer_index=index, **own)
    block.attn = LinearizedAttention(block.attn, mixer, TokenGrid())
    return block
