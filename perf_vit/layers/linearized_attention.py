"""timm attention layers with a mixer in place of softmax attention, and local enhancement."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention, apply_rot_embed_cat, register_notrace_module
from timm.layers.attention import AttentionRope
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn import functional as F

from perf_vit.layers.mixer import DerivedBuffers, MixerOptions, make_mixer
from perf_vit.layers.token_grid import TokenGrid, to_key_mask

__all__ = ["CONVERTIBLE", "LinearizedAttention", "LocalEnhancement"]


# A leaf for tracers: a graph can't hold the grid.
@register_notrace_module
class LocalEnhancement(nn.Conv2d):
    """Depth-wise 3 x 3 convolution of the values on the grid, added to the attention's output.

    This is the locally-enhanced positional encoding (LePE) of Dong et al. 2022, "CSWin Transformer", eq. 7. The matrix
    of linear attention has rank M at most, that of the convolution has full rank (Han et al. 2023, "FLatten
    Transformer"). All parameters are initialised to 0, so adding it doesn't change a model's output. The cost is
    linear.

    Args:
        dim: Number of channels of all heads together.
        grid: Rows and columns of the tokens.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        grid: TokenGrid,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)
        self.grid = grid

    def reset_parameters(self) -> None:
        """Set all parameters to 0."""
        nn.init.zeros_(self.weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(
        self,
        v: Tensor,
        num_prefix_tokens: int = 0,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Convolve.

        Args:
            v: Values, [B, H, N, D]: prefix tokens first, then the grid in row-major order.
            num_prefix_tokens: Number of class and register tokens, which lie outside the grid; their output is 0.
            attn_mask: Keys to use, bool, [B, N] or [B, 1, 1, N]; the other values are set to 0.
            is_causal: Must be False, because neighbours include future tokens.

        Returns:
            Convolved values, [B, H, N, D].

        Raises:
            ValueError: The mask has another form, `is_causal` is set, or the grid is unknown.
        """
        if is_causal:
            raise ValueError("is_causal=True needs local_enhancement=False: the convolution includes future tokens")
        key_mask = to_key_mask(attn_mask, v)
        if key_mask is not None:
            v = v.masked_fill(~key_mask[:, None, :, None], 0.0)
        B, H, N, D = v.shape
        rows, columns = self.grid.size_for(N - num_prefix_tokens)
        on_grid = v[:, :, num_prefix_tokens:].mT.reshape(B, H * D, rows, columns)
        convolved = super().forward(on_grid).reshape(B, H, D, -1).mT
        return F.pad(convolved, (0, 0, num_prefix_tokens, 0))


CONVERTIBLE = (Attention, AttentionRope, EvaAttention)


# A leaf for tracers: a graph can't hold the grid.
@register_notrace_module
class LinearizedAttention(DerivedBuffers):
    """timm attention layer whose N x N attention is replaced by a mixer of linear cost.

    It takes over the modules of an `Attention`, `AttentionRope` or `EvaAttention` under the same names, so the state
    dict is unchanged. Rotary embeddings are applied before the mixer.

    Args:
        attention: Layer to convert; it is not changed, but its modules are shared.
        options: Options of the mixer; their type selects the mixer.
        grid: Rows and columns of the tokens.

    Attributes:
        mixer: Mixer of queries, keys and values.
        local_enhancement: Convolution of the values that is added to the result, or None.

    Raises:
        ValueError: The layer has another type, or attention dropout, which linear attention doesn't support.
    """

    # Taken over from timm, where they are untyped.
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
    num_heads: int
    num_prefix_tokens: int
    local_enhancement: LocalEnhancement | None

    def __init__(self, attention: nn.Module, options: MixerOptions, grid: TokenGrid) -> None:
        super().__init__()
        _check_attention(attention)
        own = set(self.__dict__)
        for name, value in attention.__dict__.items():
            if name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
                getattr(self, name).update(value)
            elif name not in own:
                self.__dict__[name] = value
        self.training = attention.training
        self.head_dim = self._head_dim()
        self.grid = grid
        self.mixer = make_mixer(options, self.head_dim, next(self.parameters()).device, self.num_heads)
        self.local_enhancement = _enhancement(self) if options.local_enhancement else None

    @property
    def options(self) -> MixerOptions:
        """Options of the mixer."""
        return self.mixer.options

    @property
    def needs_grid(self) -> bool:
        """Whether the layer needs the rows and columns of its tokens."""
        return self.mixer.needs_grid or self.local_enhancement is not None

    def init_non_persistent_buffers(self) -> None:
        """Set the bias of EVA's keys to 0."""
        if getattr(self, "k_bias", None) is not None:
            self.k_bias.zero_()

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend.

        Args:
            x: Tokens, [B, N, C].
            rope: Rotary embedding of the tokens of the grid, as for timm's layers.
            attn_mask: Keys to use, bool, [B, N] or [B, 1, 1, N]; None for all.
            is_causal: Whether token i attends to tokens 0 .. i only; not supported by all mixers.

        Returns:
            Tokens, [B, N, C].

        Raises:
            ValueError: The mask has another form, causal order isn't supported by the mixer or local enhancement, or
                the grid is unknown.
        """
        # Gradient checkpointing may wrap the attention alone.
        self.grid.follow(x)
        q, k, v = self.queries_keys_values(x, rope)
        out = self.attend(q, k, v, attn_mask, is_causal)
        gate = getattr(self, "gate", None)
        return self.finish(out, None if gate is None else gate(x).sigmoid())

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Mix tokens, [B, H, N, D] each, and concatenate the heads, [B, N, H x D]; masks as in `forward`."""
        num_prefix_tokens, key_mask = self.options.num_prefix_tokens, to_key_mask(attn_mask, k)
        grid = self.grid.size_for(q.shape[2] - num_prefix_tokens) if self.mixer.needs_grid and not is_causal else None
        out = self.mixer(q, k, v, grid, key_mask, is_causal)
        if self.local_enhancement is not None:
            out = out + self.local_enhancement(v, num_prefix_tokens, key_mask, is_causal)
        return out.transpose(1, 2).flatten(2)

    def finish(self, out: Tensor, gate: Tensor | None = None) -> Tensor:
        """Apply norm, gate and projection to attended values, [B, N, H x D] -> [B, N, C]."""
        out = self.norm(out)
        projected: Tensor = self.proj_drop(self.proj(out if gate is None else out * gate))
        return projected

    def queries_keys_values(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the mixer's inputs, [B, H, N, D] each: normalised, rotated, repeated for grouped heads.

        Args:
            x: Tokens, [B, N, C].
            rope: Rotary embedding of the tokens of the grid.
        """
        if self.qkv is not None:
            return self.unpack(self.pack(x), rope)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (self._heads(projection(x)) for projection in projections)
        return self._normed_and_rotated(q, k, v, rope)

    @property
    def is_packed(self) -> bool:
        """Whether `pack` computes queries, keys and values of each token independently, without a gate."""
        return self.qkv is not None and getattr(self, "gate", None) is None

    def pack(self, x: Tensor) -> Tensor:
        """Compute queries, keys and values of all heads, concatenated, [B, N, C] -> [B, N, 3 x H x D]."""
        bias = self._eva_bias()
        packed: Tensor = self.qkv(x) if bias is None else F.linear(x, self.qkv.weight, bias)
        return packed

    def unpack(self, packed: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Split the result of `pack` into that of `queries_keys_values`."""
        batch, length = packed.shape[:2]
        heads = packed.shape[2] // (3 * self.head_dim)
        q, k, v = packed.reshape(batch, length, 3, heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self._normed_and_rotated(q, k, v, rope)

    def _normed_and_rotated(
        self, q: Tensor, k: Tensor, v: Tensor, rope: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise and rotate, [B, H, N, D] each; keys and values with fewer heads are repeated."""
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (self._rotate(y, rope).type_as(v) for y in (q, k))
        groups = 1 if self.qkv is not None else self.num_heads * self.head_dim // self.k_proj.out_features
        if groups > 1:
            k, v = (y.repeat_interleave(groups, dim=1) for y in (k, v))
        return q, k, v

    def _eva_bias(self) -> Tensor | None:
        if getattr(self, "q_bias", None) is None:
            return None
        bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        # EVA's layers may also have a bias in the projection.
        return bias if self.qkv.bias is None else bias + self.qkv.bias

    def _heads(self, x: Tensor) -> Tensor:
        """Split heads, [B, N, H x D] -> [B, H, N, D]."""
        batch, length = x.shape[:2]
        return x.reshape(batch, length, -1, self.head_dim).transpose(1, 2)

    def _rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        prefix, half = self.num_prefix_tokens, getattr(self, "rotate_half", False)
        return torch.cat([x[:, :, :prefix], apply_rot_embed_cat(x[:, :, prefix:], rope, half=half)], dim=2)

    def _head_dim(self) -> int:
        width = self.qkv.out_features // 3 if self.qkv is not None else self.q_proj.out_features
        return int(width // self.num_heads)


def _enhancement(layer: LinearizedAttention) -> LocalEnhancement:
    like = next(layer.parameters())
    return LocalEnhancement(layer.num_heads * layer.head_dim, layer.grid, device=like.device, dtype=like.dtype)


def _check_attention(attention: nn.Module) -> None:
    if not isinstance(attention, CONVERTIBLE):
        raise ValueError(
            f"attention must be one of {', '.join(kind.__name__ for kind in CONVERTIBLE)}, got "
            f"{type(attention).__name__}; convert only such layers"
        )
    # Untyped in timm.
    dropout: Any = attention.attn_drop
    if dropout.p > 0:
        raise ValueError(
            f"attn_drop must be 0, got {dropout.p}: linear attention has no attention weights to drop; "
            "create the model with attn_drop_rate=0"
        )
