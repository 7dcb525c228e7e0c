"""State of linear attention: sums over keys and values, of a size independent of their number."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perf_vit.ops.balancing import Balancing
from perf_vit.ops.features import FeatureMap, KeyFeatures, exp_, invert_key_mask, without_autocast
from perf_vit.ops.kernels import Kernel, get_kernel
from perf_vit.ops.stripes import Reduce, sum_together

__all__ = ["KVState", "check_attention_keys", "check_keys", "make_feature_map", "masked_values", "sum_keys"]


@dataclass(frozen=True, eq=False)
class KVState:
    """Sums over the keys and values of one attention: S = sum_j phi(k_j) v_j^T and z = sum_j phi(k_j).

    States are additive: the state of a sequence is the `merge` of the states of its parts, in any order. A sequence can
    therefore be processed in chunks, from files or on several machines, and `attend` gives the result of the whole. The
    sums are float32, or float64 for float64 keys, also under autocast.

    A positive softmax feature of a long key exceeds the range of floats, so log-domain kernels store exp(log phi(k_j) -
    c) with c = `log_scale`, the largest log phi(k_j) of each feature, and `attend` multiplies the queries by exp(c). c
    cancels in the quotient, so it needs no gradient, and the key that attains c contributes exactly 1, so no epsilon is
    needed. Scales are separate for each sample and head.

    Attributes:
        S: Scaled sums of phi(k_j) v_j^T, [B, H, M, Dv].
        z: Scaled sums of phi(k_j), [B, H, M].
        log_scale: c, [B, H, M]; 0 for kernels without an amplitude, equal for all features of "softmax-trig".
        feature_map: Kernel, projection and balancing, which keys, queries and merged states must share.
    """

    S: Tensor
    z: Tensor
    log_scale: Tensor
    feature_map: FeatureMap

    @classmethod
    def from_keys(
        cls,
        k: Tensor,
        v: Tensor,
        projection: Tensor,
        kernel: str | Kernel = "softmax+",
        key_mask: Tensor | None = None,
        balancing: Balancing | None = None,
    ) -> KVState:
        """Compute the state of keys and values.

        Args:
            k: Keys, [B, H, N, D], N >= 1.
            v: Values, [B, H, N, Dv].
            projection: Rows of the feature map, [R, D], from `draw_projection`.
            kernel: Feature map or its name; "oprf" needs a fixed parameter, `oprf_kernel(A)`, so that parts agree.
            key_mask: [B, N] bool, False for keys to ignore, as if they were absent.
            balancing: Constants from `fit_balancing` that centre and balance queries and keys.

        Raises:
            ValueError: The kernel is unknown or lacks its parameter, there are no keys, or the shapes are
                inconsistent.
        """
        feature_map = make_feature_map(kernel, projection, balancing)
        check_keys(k, v, projection, key_mask)
        if feature_map.kernel.needs_parameter:
            raise ValueError(
                f"kernel {feature_map.kernel.name!r} fits its parameter to all queries and keys, which a state "
                "doesn't have; expected it fixed: kernel=oprf_kernel(-0.05)"
            )
        return cls._from_keys(k, v, feature_map, key_mask)

    @classmethod
    def _from_keys(cls, k: Tensor, v: Tensor, feature_map: FeatureMap, key_mask: Tensor | None) -> KVState:
        with without_autocast(k):
            return sum_keys(feature_map.keys(feature_map.key_inputs(k), invert_key_mask(key_mask)), v, feature_map)

    def update(self, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> KVState:
        """Return the state with more keys, [B, H, N, D], values, [B, H, N, Dv], and their mask; `self` is unchanged.

        Raises:
            ValueError: The shapes are inconsistent or don't match the state.
        """
        check_keys(k, v, self.feature_map.projection, key_mask)
        return self.merge(self._from_keys(k, v, self.feature_map, key_mask))

    def merge(self, other: KVState) -> KVState:
        """Return the state of the keys of both states, which must use the same projection.

        Both are rescaled by exp(c_old - c_new) <= 1 to the larger of the two scales.

        Raises:
            ValueError: The kernels, balancings or shapes differ.
        """
        if self.S.shape != other.S.shape or not self.feature_map.is_compatible(other.feature_map):
            mine, theirs = self.feature_map, other.feature_map
            raise ValueError(
                "states merge only with the same kernel, parameter, balancing and shape, "
                f"got {mine.kernel.name} {list(self.S.shape)} and {theirs.kernel.name} {list(other.S.shape)}; "
                "build both with one projection, kernel and balancing, for the same batch and heads"
            )
        log_scale = torch.maximum(self.log_scale, other.log_scale)
        mine_by, theirs_by = exp_(self.log_scale - log_scale), exp_(other.log_scale - log_scale)
        return replace(
            self,
            S=self.S * mine_by.unsqueeze(-1) + other.S * theirs_by.unsqueeze(-1),
            z=self.z * mine_by + other.z * theirs_by,
            log_scale=log_scale,
        )

    def reduced(self, reduce: Reduce) -> KVState:
        """Return the merged states of all processes, which all must call this.

        Args:
            reduce: Element-wise sum or maximum over processes.
        """
        log_scale = reduce(self.log_scale, "max")
        by = exp_(self.log_scale - log_scale)
        sums, weights = sum_together(reduce, self.S * by.unsqueeze(-1), self.z * by)
        return replace(self, S=sums, z=weights, log_scale=log_scale)

    def normalized(self) -> KVState:
        """Rescale a log-domain state to z = 1, so that S holds the mean value of each feature.

        Attention is then a softmax over features, whose denominator needs no product with z.
        """
        if not self.feature_map.kernel.log_domain:
            return self
        # If all keys are masked, z and S are 0. The divisor is detached so that both keep their gradients.
        by = self.z.detach().clamp(min=torch.finfo(self.z.dtype).tiny)
        return replace(self, S=self.S / by.unsqueeze(-1), z=self.z / by, log_scale=self.log_scale + by.log())

    def sums(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Return numerator and denominator of the attention of queries, up to one positive factor per query.

        For a log-domain kernel the factor makes the largest term of each query's denominator 1, so that it is at
        least 1. Where every key was masked, the numerator is 0.

        Args:
            q: Queries, [B, H, N, D].

        Returns:
            sum_j phi(q_i).phi(k_j) v_j, [B, H, N, Dv], and sum_j phi(q_i).phi(k_j), [B, H, N, 1].

        Raises:
            ValueError: The queries don't match the state.
        """
        self._check_queries(q)
        state = self.normalized()
        with without_autocast(q):
            values = self.feature_map.queries(self.feature_map.query_inputs(q))
            features, _ = self.feature_map.scaled_queries(values, state.log_scale)
            return features @ state.S, state.denominators(features)

    def denominators(self, features: Tensor) -> Tensor:
        """Multiply scaled features of queries, [B, H, N, M], by z, [B, H, N, 1]; the state must be normalised."""
        if self.feature_map.kernel.log_domain and not self.z.requires_grad:
            return features.sum(dim=-1, keepdim=True)
        return features @ self.z.unsqueeze(-1)

    def attend(self, q: Tensor) -> Tensor:
        """Attend to all keys of the state (Choromanski et al. 2020, equation 4).

        Args:
            q: Queries, [B, H, N, D].

        Returns:
            Attended values, [B, H, N, Dv], in the dtype of `q`; 0 if all keys are masked.

        Raises:
            ValueError: The queries don't match the state.
        """
        numerator, denominator = self.sums(q)
        # Outside the log domain both are 0 if all keys are masked.
        return (numerator / denominator.masked_fill(denominator == 0, 1.0)).to(q.dtype)

    def _check_queries(self, q: Tensor) -> None:
        batch, heads = self.S.shape[:2]
        head_dim = self.feature_map.projection.shape[1]
        if q.ndim != 4 or q.shape[:2] != self.S.shape[:2] or q.shape[3] != head_dim:
            raise ValueError(
                f"q must be [B, H, N, D] with the keys' B = {batch}, H = {heads} and D = {head_dim}, "
                f"got {list(q.shape)}"
            )


def sum_keys(keys: KeyFeatures, v: Tensor, feature_map: FeatureMap) -> KVState:
    """Compute the state of keys, given their features (overwritten), and of their values, [B, H, N, Dv]."""
    log_scale = keys.scale()
    features = keys.scaled(log_scale)
    return KVState(features.mT @ masked_values(v, keys), features.sum(dim=-2), log_scale, feature_map)


def masked_values(v: Tensor, keys: KeyFeatures) -> Tensor:
    """Cast values to the dtype of the features and set those of masked keys to 0, whatever they hold."""
    v = v.to(keys.values.dtype)
    return v if keys.mask is None else v.masked_fill(keys.mask, 0.0)


def make_feature_map(kernel: str | Kernel, projection: Tensor, balancing: Balancing | None) -> FeatureMap:
    """Validate kernel, projection and balancing and combine them.

    Raises:
        ValueError: The kernel is unknown, the projection isn't [R, D], or balancing is given for a kernel that
            doesn't estimate softmax.
    """
    chosen = get_kernel(kernel)
    if projection.ndim != 2 or 0 in projection.shape:
        raise ValueError(
            f"projection must be [R, D] with R, D >= 1, got {list(projection.shape)}; "
            "draw it with draw_projection(num_features, head_dim)"
        )
    if balancing is not None and not chosen.estimates_softmax:
        raise ValueError(f"balancing needs a kernel that estimates softmax, got {chosen.name!r}; use balancing=None")
    return FeatureMap(chosen, projection, balancing)


def check_keys(k: Tensor, v: Tensor, projection: Tensor, key_mask: Tensor | None) -> None:
    """Check that keys, values, projection and mask are consistent.

    Raises:
        ValueError: The tensors are inconsistent.
    """
    check_attention_keys(k, v, key_mask)
    if projection.shape[1] != k.shape[3]:
        raise ValueError(
            f"projection must be [R, D] with the keys' D = {k.shape[3]}, got {list(projection.shape)}; "
            f"draw it with draw_projection(num_features, head_dim={k.shape[3]})"
        )


def check_attention_keys(k: Tensor, v: Tensor, key_mask: Tensor | None) -> None:
    """Check that keys, values and mask are consistent.

    Raises:
        ValueError: The tensors are inconsistent.
    """
    if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3] or k.shape[2] == 0:
        raise ValueError(
            "k and v must be [B, H, N, D] and [B, H, N, Dv] with the same B, H and N >= 1, "
            f"got {list(k.shape)} and {list(v.shape)}"
        )
    if key_mask is None:
        return
    expected = (k.shape[0], k.shape[2])
    if key_mask.dtype != torch.bool or tuple(key_mask.shape) != expected:
        raise ValueError(
            f"key_mask must be bool [B, N_k] = {list(expected)}, True for keys that count, got {key_mask.dtype} "
            f"{list(key_mask.shape)}"
        )
