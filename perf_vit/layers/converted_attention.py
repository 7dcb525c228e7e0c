"""Linear attention in the body of a pretrained one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Attention, apply_rot_embed_cat, register_notrace_module
from timm.layers.attention import AttentionRope
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn import functional as F

from perf_vit.layers.key_mask import key_mask_of
from perf_vit.layers.performer_attention import PerformerOptions, RandomProjectionMixin, check_whole
from perf_vit.layers.token_grid import TokenGrid
from perf_vit.ops import clustered_attention, favor_attention, fit_balancing, scatterbrain_attention
from perf_vit.ops.balancing import Balancing
from perf_vit.ops.kernels import get_kernel
from perf_vit.ops.sinks import sinks_for_size

__all__ = ["BALANCING_BUFFERS", "CONVERTIBLE", "ConvertedAttention", "ScatterbrainOptions"]

CONVERTIBLE = (Attention, AttentionRope, EvaAttention)

# Means and variances of at least so many tokens.
_STATISTICS_TOKENS = 2048

BALANCING_BUFFERS = ("balancing_query_center", "balancing_key_center", "balancing_scale")
"""Names of the constants that a calibration leaves in a layer, in the order of `Balancing`'s arguments."""


@dataclass(frozen=True, kw_only=True)
class ScatterbrainOptions(PerformerOptions):
    """Options of a converted attention; prefix tokens attend and are attended exactly but under plain FAVOR+.

    Attributes:
        window_size: rows and columns of a window in which attention is exact; 0 for none.
        num_sinks: keys of each head that every query sees exactly; 0 for none, None for 256 in small images down to 64
            in large ones.
        num_clusters: of each head, that stand for all other keys in place of random features; 0 for those.

    Raises:
        ValueError: as `PerformerOptions`; a number that is negative or not whole; windows or sinks with a kernel that
            has no positive features for softmax; clusters with centring or balancing, which is of features.
    """

    window_size: int = 0
    num_sinks: int | None = 0
    num_clusters: int = 0

    def __post_init__(self) -> None:
        numbers = {name: getattr(self, name) for name in ("window_size", "num_sinks", "num_clusters")}
        if self.num_sinks is None:
            del numbers["num_sinks"]
        check_whole(**numbers, num_prefix_tokens=self.num_prefix_tokens)
        for name, number in numbers.items():
            if number < 0:
                raise ValueError(f"{name} must be 0 or more, got {number}")
        kernel = get_kernel(self.kernel)
        if (self.window_size or self.num_sinks != 0) and not (kernel.estimates_softmax and kernel.log_domain):
            raise ValueError(
                "windows and sinks need a kernel of positive features that estimates softmax: expected softmax+, "
                f"softmax-hyp+ or oprf, got {kernel.name!r}; use attention='performer' for others"
            )
        if self.num_clusters and (self.center or self.balance):
            raise ValueError("center and balance are of random features: with num_clusters leave them False")
        super().__post_init__()

    @property
    def needs_grid(self) -> bool:
        """Whether a layer must know the rows and columns of its tokens."""
        return self.is_exact_nearby or self.local_enhancement

    @property
    def is_exact_nearby(self) -> bool:
        """Whether some keys are seen exactly, so that it isn't plain FAVOR+."""
        return self.num_sinks is None or max(self.window_size, self.num_sinks, self.num_clusters) > 0

    def sinks_of(self, grid: tuple[int, int]) -> int:
        """Sinks in an image of these rows and columns of tokens, padding included."""
        num_tokens = grid[0] * grid[1]
        return min(num_tokens, sinks_for_size(num_tokens) if self.num_sinks is None else self.num_sinks)


# Tracers take it as one node: the grid isn't a thing that a graph could carry.
@register_notrace_module
class ConvertedAttention(RandomProjectionMixin, nn.Module):
    """A timm attention whose weights stay and whose N x N matrix goes, for FAVOR+ or clusters, windows and sinks.

    It takes over the modules of an `Attention`, `AttentionRope` or `EvaAttention`, under the same names, so the state
    dict stays as it is. Rotary embeddings come before features and clusters, as before the products they replace.
    With `center` or `balance`, queries and keys of random features are centred and balanced by the statistics of each
    call, or by constants (`set_balancing`), which then are part of the state dict; loading one that has them sets them.

    Args:
        attention: the layer that it takes over; not changed, but its modules are shared.
        options: kernel, features, windows and sinks.
        grid: where the rows and columns of the tokens are told.

    Raises:
        ValueError: another type of layer, or attention dropout, which has nothing to drop.
    """

    # What it takes over is untyped in timm.
    qkv: Any
    q_proj: Any
    k_proj: Any
    v_proj: Any
    q_bias: Tensor
    k_bias: Tensor
    v_bias: Tensor
    q_norm: Any
    k_norm: Any
    norm: Any
    proj: Any
    proj_drop: Any
    num_prefix_tokens: int

    def __init__(self, attention: nn.Module, options: ScatterbrainOptions, grid: TokenGrid) -> None:
        super().__init__()
        if not isinstance(attention, CONVERTIBLE):
            raise ValueError(
                f"expected one of {', '.join(kind.__name__ for kind in CONVERTIBLE)}, got {type(attention).__name__}"
            )
        if attention.attn_drop.p > 0:
            raise ValueError(
                f"attn_drop must be 0, got {attention.attn_drop.p}: linear attention never forms the weights it drops; "
                "create the model with attn_drop_rate=0"
            )
        own = set(self.__dict__)
        for name, value in attention.__dict__.items():
            if name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
                getattr(self, name).update(value)
            elif name not in own:
                self.__dict__[name] = value
        self.training = attention.training
        self.head_dim = self._head_dim()
        for name in BALANCING_BUFFERS:
            self.register_buffer(name, None)
        self._start_drawing(options, grid)

    def init_non_persistent_buffers(self) -> None:
        """Draw the projection on the module's device, and zero the bias that EVA's keys don't have."""
        super().init_non_persistent_buffers()
        if getattr(self, "k_bias", None) is not None:
            self.k_bias.zero_()

    @property
    def balancing(self) -> Balancing | None:
        """The constants that queries and keys are centred and balanced with; None for each call's own statistics."""
        buffers = [getattr(self, name) for name in BALANCING_BUFFERS]
        return None if buffers[0] is None else Balancing(*(buffer.float() for buffer in buffers))

    def set_balancing(self, balancing: Balancing | None) -> None:
        """Take constants, [1, H, 1, D], in the place of each call's statistics; None gives those back.

        Raises:
            ValueError: constants for a layer that neither centres nor balances.
        """
        if balancing is not None and not (self.options.center or self.options.balance):
            raise ValueError("expected a layer with center=True or balance=True to take constants, got neither")
        tensors = (None,) * len(BALANCING_BUFFERS) if balancing is None else balancing.tensors()
        for name, tensor in zip(BALANCING_BUFFERS, tensors, strict=True):
            setattr(self, name, tensor)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.balancing is None and (self.options.center or self.options.balance):
            device = self.projection.device
            for name in BALANCING_BUFFERS:
                if prefix + name in state_dict:
                    setattr(self, name, torch.empty_like(state_dict[prefix + name], device=device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend.

        Args:
            x: tokens, [B, N, C].
            rope: rotary embedding of the grid's tokens, as timm's layers take it.
            attn_mask: which keys take part, bool, [B, N] or [B, 1, 1, N], or None for all of them.
            is_causal: token i sees tokens 0 .. i only; without windows and sinks.

        Returns:
            [B, N, C].

        Raises:
            ValueError: another mask, causal order with windows or local enhancement, or a grid that nobody told.
        """
        # A checkpoint may hold the attention alone.
        self.grid.follow(x)
        q, k, v = self.queries_keys_values(x, rope)
        out = self.attend(q, k, v, attn_mask, is_causal)
        gate = getattr(self, "gate", None)
        return self.finish(out, None if gate is None else gate(x).sigmoid())

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """The attention itself: [B, H, N, D] each to heads side by side, [B, N, H x D]; masks as for `forward`."""
        out = self._mix(q, k, v, attn_mask, is_causal)
        if self.local_enhancement is not None:
            out = out + self.local_enhancement(v, self.options.num_prefix_tokens, attn_mask, is_causal)
        return out.transpose(1, 2).flatten(2)

    def finish(self, out: Tensor, gate: Tensor | None = None) -> Tensor:
        """Norm, gate and projection of what was attended, [B, N, H x D] -> [B, N, C]."""
        out = self.norm(out)
        projected: Tensor = self.proj_drop(self.proj(out if gate is None else out * gate))
        return projected

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        options = self.options
        assert isinstance(options, ScatterbrainOptions)
        if is_causal and (options.is_exact_nearby or options.center or options.balance):
            raise ValueError(
                "is_causal=True needs window_size=0, num_sinks=0, num_clusters=0, center=False and balance=False: "
                "windows, sinks, clusters and the statistics of a call look into the future"
            )
        key_mask, balancing = key_mask_of(attn_mask, k), None
        if options.center or options.balance:
            balancing = self.balancing
            if balancing is None:
                balancing = _fit_sampled(q, k, key_mask, options)
        if not options.is_exact_nearby:
            return favor_attention(q, k, v, self.projection, options.kernel, key_mask, is_causal, balancing)
        grid = self.grid.of(q.shape[2] - options.num_prefix_tokens)
        num_sinks = options.sinks_of(grid)
        if options.num_clusters:
            return clustered_attention(
                q,
                k,
                v,
                grid,
                options.window_size,
                num_sinks,
                options.num_clusters,
                options.num_prefix_tokens,
                key_mask,
            )
        return scatterbrain_attention(
            q,
            k,
            v,
            self.projection,
            grid,
            options.window_size,
            num_sinks,
            options.num_prefix_tokens,
            options.kernel,
            key_mask,
            balancing,
        )

    def queries_keys_values(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as the attention sees them, [B, H, N, D]: normed, rotated, one of each a head.

        Args:
            x: tokens, [B, N, C].
            rope: rotary embedding of the grid's tokens.
        """
        if self.qkv is not None:
            return self.unpack(self.pack(x), rope)
        return self._normed_and_rotated(self.q_proj(x), self.k_proj(x), self.v_proj(x), rope)

    @property
    def is_packed(self) -> bool:
        """Whether each token's queries, keys and values come by `pack`, and nothing else of it is asked for."""
        return self.qkv is not None and getattr(self, "gate", None) is None

    def pack(self, x: Tensor) -> Tensor:
        """Queries, keys and values of all heads side by side, [B, N, C] -> [B, N, 3 x H x D]."""
        bias = self._eva_bias()
        packed: Tensor = self.qkv(x) if bias is None else F.linear(x, self.qkv.weight, bias)
        return packed

    def unpack(self, packed: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What `queries_keys_values` gives, from what `pack` gave."""
        q, k, v = packed.chunk(3, dim=-1)
        return self._normed_and_rotated(q, k, v, rope)

    def _normed_and_rotated(
        self, q: Tensor, k: Tensor, v: Tensor, rope: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Heads side by side, [B, N, H x D], of which keys and values may have fewer, to [B, H, N, D] each."""
        q, k, v = (self._heads(x) for x in (q, k, v))
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (self._rotate(y, rope).type_as(v) for y in (q, k))
        groups = self.num_heads // k.shape[1]
        if groups > 1:
            k, v = (y.repeat_interleave(groups, dim=1) for y in (k, v))
        return q, k, v

    def _eva_bias(self) -> Tensor | None:
        if getattr(self, "q_bias", None) is None:
            return None
        bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        # EVA's layers may have a bias in the projection too, to which this one is added.
        return bias if self.qkv.bias is None else bias + self.qkv.bias

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

    def _rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        prefix, half = self.num_prefix_tokens, getattr(self, "rotate_half", False)
        return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, half=half)], dim=2)

    def _head_dim(self) -> int:
        width = self.qkv.out_features // 3 if self.qkv is not None else self.q_proj.out_features
        return int(width // self.num_heads)


def _fit_sampled(q: Tensor, k: Tensor, key_mask: Tensor | None, options: ScatterbrainOptions) -> Balancing:
    """The balancing of evenly spaced tokens: means of all of a large image would take longer and serve no better."""
    every = max(1, q.shape[2] // _STATISTICS_TOKENS)
    key_mask = None if key_mask is None else key_mask[:, ::every]
    return fit_balancing(q[:, :, ::every], k[:, :, ::every], key_mask, center=options.center, balance=options.balance)
