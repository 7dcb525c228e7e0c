"""What linear attention remembers of its keys and values: sums whose size does not depend on their number."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perf_vit.ops.kernels import Kernel, get_kernel

__all__ = ["KVState", "masked_features", "without_autocast"]

# Below any log-feature of a real key, and far enough above float32's lowest that sums with it stay finite.
_LOWEST_SCALE = -1e30


@dataclass(frozen=True, eq=False)
class KVState:
    """The keys and values of one attention, summed: S = sum_j phi(k_j) v_j^T and z = sum_j phi(k_j).

    States add: that of a sequence is the `merge` of its parts' states, whatever their order. So a sequence can come
    in chunks, from files or from other machines, and `attend` gives what it would give for the whole. The sums are
    float32, or float64 for float64 keys, under autocast too.

    A positive softmax feature of a long key leaves the range of any float, so log-domain kernels store
    exp(log phi(k_j) - c) with c = `log_scale`, the largest log phi(k_j) of each feature, and `attend` gives exp(c)
    back to the queries. c cancels in the quotient, hence no gradient flows through it and no epsilon is needed:
    the key that attains c contributes exactly 1. All of it happens per sample and head; samples never mix.

    Attributes:
        S: scaled sums of phi(k_j) v_j^T, [B, H, M, Dv].
        z: scaled sums of phi(k_j), [B, H, M].
        log_scale: c, [B, H, M]; zero for kernels that do not work in the log domain.
        projection: rows of the feature map, [M, D]; the same for keys, queries and states that merge.
        kernel: the feature map.
    """

    S: Tensor
    z: Tensor
    log_scale: Tensor
    projection: Tensor
    kernel: Kernel

    @classmethod
    def from_keys(
        cls, k: Tensor, v: Tensor, projection: Tensor, kernel: str = "softmax+", key_mask: Tensor | None = None
    ) -> KVState:
        """The state of some keys and their values.

        Args:
            k: keys, [B, H, N, D], at least one.
            v: values, [B, H, N, Dv].
            projection: rows of the feature map, [M, D], from `draw_projection`.
            kernel: name of the feature map.
            key_mask: [B, N] bool, False for keys that add nothing, exactly as if they weren't there.

        Raises:
            ValueError: an unknown kernel, no key, or shapes that don't fit together.
        """
        _check_keys(k, v, projection)
        _check_mask(k, key_mask)
        return cls._from_keys(k, v, projection, get_kernel(kernel), key_mask)

    @classmethod
    def _from_keys(cls, k: Tensor, v: Tensor, projection: Tensor, kernel: Kernel, key_mask: Tensor | None) -> KVState:
        with without_autocast(k):
            features = masked_features(k, projection, kernel, key_mask)
            log_scale = torch.zeros_like(features[..., 0, :])
            if kernel.log_domain:
                # Where every key is masked the maximum is -inf, from which nothing could be subtracted.
                log_scale = features.detach().amax(dim=-2).clamp(min=_LOWEST_SCALE)
                features = features.sub_(log_scale.unsqueeze(-2)).exp_()
            # A column of ones sums the features themselves in the same matrix product.
            v = v.to(features.dtype)
            sums = features.mT @ torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        return cls(sums[..., :-1], sums[..., -1], log_scale, projection, kernel)

    def update(self, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> KVState:
        """The state with more keys, [B, H, N, D], values, [B, H, N, Dv], and their mask; this one stays as it is.

        Raises:
            ValueError: shapes that don't fit together or don't fit the state.
        """
        _check_keys(k, v, self.projection)
        _check_mask(k, key_mask)
        return self.merge(self._from_keys(k, v, self.projection, self.kernel, key_mask))

    def merge(self, other: KVState) -> KVState:
        """The state of both states' keys, which must come from the same projection.

        Each side is rescaled by exp(c_old - c_new) <= 1 to the larger of the two scales.

        Raises:
            ValueError: states of different kernels or shapes.
        """
        if self.kernel != other.kernel or self.S.shape != other.S.shape:
            raise ValueError(
                "states merge only with the same kernel and shape, "
                f"got {self.kernel.name} {list(self.S.shape)} and {other.kernel.name} {list(other.S.shape)}; "
                "build both with one projection and kernel, for the same batch and heads"
            )
        log_scale = torch.maximum(self.log_scale, other.log_scale)
        mine, theirs = (self.log_scale - log_scale).exp(), (other.log_scale - log_scale).exp()
        return replace(
            self,
            S=self.S * mine.unsqueeze(-1) + other.S * theirs.unsqueeze(-1),
            z=self.z * mine + other.z * theirs,
            log_scale=log_scale,
        )

    def sums(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Numerator and denominator of the attention of queries, up to one positive factor per query.

        For a log-domain kernel the factor makes the largest term of each query's features 1; the denominator is then
        at least 1, or 0 where every key was masked.

        Args:
            q: queries, [B, H, N, D].

        Returns:
            sum_j phi(q_i).phi(k_j) v_j, [B, H, N, Dv], and sum_j phi(q_i).phi(k_j), [B, H, N, 1].

        Raises:
            ValueError: queries that don't fit the state.
        """
        self._check_queries(q)
        with without_autocast(q):
            features = self.query_features(masked_features(q, self.projection, self.kernel))
            sums = features @ torch.cat([self.S, self.z.unsqueeze(-1)], dim=-1).to(features.dtype)
        return sums[..., :-1], sums[..., -1:]

    def query_features(self, features: Tensor) -> Tensor:
        """Features of queries, [B, H, N, M] (overwritten), brought to the scale of the state's sums."""
        if not self.kernel.log_domain:
            return features
        features = features.add_(self.log_scale.unsqueeze(-2))
        return features.sub_(features.detach().amax(dim=-1, keepdim=True)).exp_()

    def key_features(self, features: Tensor) -> Tensor:
        """Features of the state's own keys, [B, H, N, M] (overwritten), brought to the scale of its sums."""
        return features.sub_(self.log_scale.unsqueeze(-2)).exp_() if self.kernel.log_domain else features

    def attend(self, q: Tensor) -> Tensor:
        """Attention of queries over all keys of the state (Choromanski et al. 2020, equation 4).

        Args:
            q: queries, [B, H, N, D].

        Returns:
            The weighted mean of the values, [B, H, N, Dv], in the dtype of `q`; 0 where every key was masked.

        Raises:
            ValueError: queries that don't fit the state.
        """
        numerator, denominator = self.sums(q)
        # Without a key both are 0, and so is the mean of nothing.
        return (numerator / denominator.masked_fill(denominator == 0, 1.0)).to(q.dtype)

    def _check_queries(self, q: Tensor) -> None:
        batch, heads = self.S.shape[:2]
        head_dim = self.projection.shape[1]
        if q.ndim != 4 or q.shape[:2] != self.S.shape[:2] or q.shape[3] != head_dim:
            raise ValueError(
                f"q must be [B, H, N, D] with the keys' B = {batch}, H = {heads} and D = {head_dim}, "
                f"got {list(q.shape)}"
            )


def masked_features(x: Tensor, projection: Tensor, kernel: Kernel, key_mask: Tensor | None = None) -> Tensor:
    """What `kernel.features` gives for queries or keys, [B, H, N, D], in at least float32; nothing for masked keys."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    features = kernel.features(x.to(dtype) * x.shape[-1] ** -0.25, projection.to(dtype))
    if key_mask is None:
        return features
    return features.masked_fill(~key_mask[:, None, :, None], -math.inf if kernel.log_domain else 0.0)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context without autocast, or an empty one where there is none."""
    # Entered only where there is something to switch off, so that an exported graph stays free of it.
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def _check_mask(k: Tensor, key_mask: Tensor | None) -> None:
    if key_mask is None:
        return
    expected = (k.shape[0], k.shape[2])
    if key_mask.dtype != torch.bool or tuple(key_mask.shape) != expected:
        raise ValueError(
            f"key_mask must be bool [B, N_k] = {list(expected)}, True for keys that count, got {key_mask.dtype} "
            f"{list(key_mask.shape)}"
        )


def _check_keys(k: Tensor, v: Tensor, projection: Tensor) -> None:
    if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3] or k.shape[2] == 0:
        raise ValueError(
            "k and v must be [B, H, N, D] and [B, H, N, Dv] with the same B, H and N >= 1, "
            f"got {list(k.shape)} and {list(v.shape)}"
        )
    if projection.ndim != 2 or projection.shape[1] != k.shape[3]:
        raise ValueError(
            f"projection must be [M, D] with the keys' D = {k.shape[3]}, got {list(projection.shape)}; "
            f"draw it with draw_projection(num_features, head_dim={k.shape[3]})"
        )
