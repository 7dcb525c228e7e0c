"""Self-attention of linear cost that takes the place of timm's `Attention`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any, Self

import numpy as np
import torch
from timm.layers import Attention, register_notrace_function
from torch import Tensor, nn

from perf_vit.layers.key_mask import key_mask_of
from perf_vit.layers.local_enhancement import LocalEnhancement
from perf_vit.layers.token_grid import TokenGrid
from perf_vit.ops import draw_projection, favor_attention, fit_balancing
from perf_vit.ops.kernels import get_kernel
from perf_vit.ops.projection import ProjectionNorms

__all__ = [
    "PerformerAttention",
    "PerformerOptions",
    "RandomProjectionMixin",
    "check_option_names",
    "check_whole",
    "timm_favor_attention",
]


@dataclass(frozen=True, kw_only=True)
class PerformerOptions:
    """What a `PerformerAttention` has and timm's `Attention` has not.

    Attributes:
        kernel: name of the feature map, "softmax+", "softmax-hyp+", "softmax-trig", "relu", "oprf" or a registered one.
        num_features: number of random features, M.
        orthogonal: whether the projection's rows come in orthogonal blocks.
        norms: norms of its rows, "chi" or "sqrt" (see `draw_projection`).
        center: whether queries and keys are centred by the means of each call and head (see `fit_balancing`).
        balance: whether their channels are balanced likewise.
        local_enhancement: whether a depth-wise convolution of the values is added (see `LocalEnhancement`); it has
            parameters of its own.
        num_prefix_tokens: class and register tokens, which have no place in the grid of patches.
        seed: seed of the model's projections, 0 or more.
        layer_index: place of the layer in its model; layers of one seed draw different projections.

    Raises:
        ValueError: an unknown kernel, one that centring or balancing would change, or a number that is negative or
            not whole; `draw_projection` checks the rest.
    """

    kernel: str = "softmax+"
    num_features: int = 256
    orthogonal: bool = True
    norms: ProjectionNorms = "chi"
    center: bool = False
    balance: bool = False
    local_enhancement: bool = False
    num_prefix_tokens: int = 0
    seed: int = 0
    layer_index: int = 0

    def __post_init__(self) -> None:
        if (self.center or self.balance) and not get_kernel(self.kernel).estimates_softmax:
            raise ValueError(
                f"center and balance leave softmax attention as it is, but kernel {self.kernel!r} estimates another; "
                "use center=False, balance=False"
            )
        check_whole(num_features=self.num_features, seed=self.seed, layer_index=self.layer_index)
        if self.seed < 0 or self.layer_index < 0:
            raise ValueError(
                f"seed and layer_index must be 0 or more, got {self.seed} and {self.layer_index}; use seed=0"
            )
        if self.num_prefix_tokens < 0:
            raise ValueError(f"num_prefix_tokens must be 0 or more, got {self.num_prefix_tokens}")


def check_whole(**numbers: Any) -> None:
    """Refuse options that must be whole numbers and aren't.

    Raises:
        ValueError: names the first of them.
    """
    for name, number in numbers.items():
        if not isinstance(number, Integral):
            raise ValueError(f"{name} must be a whole number, got {number!r}; pass an int")


def check_option_names(options: Iterable[str], kind: type[PerformerOptions]) -> None:
    """Refuse options that `kind` doesn't have.

    Raises:
        ValueError: names the first of them and the nearest one that there is.
    """
    known = [field.name for field in fields(kind)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"attention options are {', '.join(known)}, got {name!r}{hint}")


class RandomProjectionMixin(nn.Module):
    """What every layer with a random projection shares: its options, its draws, where they live, what is added.

    The projection, [R, D], is drawn from (seed, layer_index, draw), so it is a non-persistent buffer that no
    checkpoint needs to carry. It stays float32 whatever dtype the module is moved to: a rounded draw would be
    another one, and the features are computed in float32 anyway. `num_heads` and `head_dim` must be set before
    `_start_drawing`.
    """

    projection: Tensor
    options: PerformerOptions
    draw: int
    num_heads: int
    head_dim: int
    grid: TokenGrid
    local_enhancement: LocalEnhancement | None

    def _start_drawing(self, options: PerformerOptions, grid: TokenGrid) -> None:
        self.options, self.draw, self.grid = options, 0, grid
        self.register_buffer("projection", self._draw_projection(options, 0), persistent=False)
        self.register_module("local_enhancement", None)
        self._enhance(options)

    def configure(self, **options: Any) -> Self:
        """Change options and draw the projection anew; those not named stay.

        Args:
            **options: fields of `PerformerOptions`.

        Raises:
            ValueError: an unknown option, or a value that it can't take.
        """
        check_option_names(options, type(self.options))
        changed = replace(self.options, **options)
        self.projection = self._draw_projection(changed, self.draw)
        self._enhance(changed)
        self.options = changed
        return self

    def on_grid(self, grid: TokenGrid) -> Self:
        """Take the rows and columns of the tokens from this grid from now on, as the other layers of a model do."""
        self.grid = grid
        if self.local_enhancement is not None:
            self.local_enhancement.grid = grid
        return self

    def redraw(self, draw: int) -> None:
        """Replace the projection, in place, by draw number `draw` of the same seed; 0 is the one it starts with.

        To be called between steps with the same number on every process, never within a forward pass: a checkpointed
        block would recompute with another projection than it used.
        """
        self.projection.copy_(self._draw_projection(self.options, draw))
        self.draw = draw

    def init_non_persistent_buffers(self) -> None:
        """Draw the projection on the module's device; timm calls it once a model leaves the meta device."""
        self.projection = self._draw_projection(self.options, self.draw)

    def extra_repr(self) -> str:
        """The options, for printing."""
        return ", ".join(f"{field.name}={getattr(self.options, field.name)!r}" for field in fields(self.options))

    def _enhance(self, options: PerformerOptions) -> None:
        if not options.local_enhancement:
            self.local_enhancement = None
        elif self.local_enhancement is None:
            like = next(self.parameters())
            self.local_enhancement = LocalEnhancement(
                self.num_heads * self.head_dim, self.grid, device=like.device, dtype=like.dtype
            )

    def _draw_projection(self, options: PerformerOptions, draw: int) -> Tensor:
        device = next(self.parameters()).device
        if device.type == "meta":
            num_rows = get_kernel(options.kernel).num_rows(options.num_features)
            return torch.empty(num_rows, self.head_dim, dtype=torch.float32, device=device)
        generator = _generator(options.seed, options.layer_index, draw)
        projection = draw_projection(
            options.num_features, self.head_dim, options.orthogonal, options.norms, generator, options.kernel
        )
        return projection.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.projection
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if before.is_meta and not self.projection.is_meta:
            self.init_non_persistent_buffers()
        elif self.projection.dtype != before.dtype:
            self.projection = before.to(self.projection.device)
        return self


class PerformerAttention(RandomProjectionMixin, Attention):
    """Multi-head self-attention through random features (FAVOR+, Choromanski et al. 2020), for timm's `attn_layer`.

    It is built with the arguments of `timm.layers.Attention` and has the same parameters under the same names, so
    checkpoints of either load into the other with `strict=True`. `configure` sets what is its own.

    Args:
        *args: of `timm.layers.Attention`.
        **kwargs: of `timm.layers.Attention`.

    Raises:
        ValueError: `attn_drop` above 0; there are no attention weights to drop.
    """

    # Untyped in timm.
    qkv: Any
    q_norm: Any
    k_norm: Any
    norm: Any
    proj: Any
    proj_drop: Any
    attn_drop: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.attn_drop.p > 0:
            raise ValueError(
                f"attn_drop must be 0, got {self.attn_drop.p}: linear attention never forms the weights that it "
                "drops; use proj_drop or drop_path instead"
            )
        self._start_drawing(PerformerOptions(), TokenGrid())

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend.

        Args:
            x: tokens, [B, N, C].
            attn_mask: which keys take part, bool, [B, N] or [B, 1, 1, N], or None for all of them.
            is_causal: token i sees tokens 0 .. i only.

        Returns:
            [B, N, dim_out].

        Raises:
            ValueError: any other mask, which has no form here; causal order with centring or balancing, whose
                statistics would tell of the future, or with local enhancement.
        """
        # A checkpoint may hold the attention alone.
        self.grid.follow(x)
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        options = self.options
        out = timm_favor_attention(
            q, k, v, self.projection, options.kernel, options.center, options.balance, attn_mask, is_causal
        )
        if self.local_enhancement is not None:
            out = out + self.local_enhancement(v, options.num_prefix_tokens, attn_mask, is_causal)
        out = self.norm(out.transpose(1, 2).flatten(2))
        # The oldest timm that we take has no gate.
        gate = getattr(self, "gate", None)
        if gate is not None:
            out = out * gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


# timm and torchvision trace models to extract features. What the function decides by shapes and by the absence of a
# mask can't be traced, so it stays one node of the graph.
@torch.fx.wrap
@register_notrace_function
def timm_favor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    kernel: str,
    center: bool = False,
    balance: bool = False,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """`favor_attention` with timm's masks: those that leave out keys; others are refused.

    Args:
        q: queries, [B, H, N, D].
        k: keys, [B, H, N, D].
        v: values, [B, H, N, D].
        projection: rows of the feature map, [M, D].
        kernel: name of the feature map.
        center: centre queries and keys by their means.
        balance: balance their channels.
        attn_mask: which keys take part, bool, [B, N] or [B, 1, 1, N], or None for all of them.
        is_causal: token i sees tokens 0 .. i only.

    Returns:
        [B, H, N, D].

    Raises:
        ValueError: any other mask, or causal order with centring or balancing.
    """
    key_mask = key_mask_of(attn_mask, k)
    balancing = None
    if center or balance:
        if is_causal:
            raise ValueError(
                "is_causal=True needs center=False and balance=False: the statistics of a call tell of the future"
            )
        balancing = fit_balancing(q, k, key_mask, center=center, balance=balance)
    return favor_attention(q, k, v, projection, kernel, key_mask, is_causal, balancing)


def _generator(*entropy: int) -> torch.Generator:
    # SeedSequence mixes its words, so neighbouring seeds, layers and draws are independent; a sum would repeat them.
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(seed)
