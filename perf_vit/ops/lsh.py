"""Attention within buckets of locality-sensitive hashing (Reformer)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from perf_vit.ops.windows import split_dim

__all__ = ["draw_rotations", "hash_buckets", "lsh_attention", "num_buckets_of"]

# Logit of a token with itself: it attends to itself only where it sees no other token (Kitaev et al. 2020, section 2).
_SELF = -1e5


def draw_rotations(num_rounds: int, num_buckets: int, head_dim: int, generator: torch.Generator) -> Tensor:
    """Draw the random matrices R of all hash rounds, [rounds, D, num_buckets / 2], standard normal."""
    return torch.randn(num_rounds, head_dim, max(1, num_buckets // 2), generator=generator)


def hash_buckets(q: Tensor, rotations: Tensor, num_buckets: int, key_mask: Tensor | None = None) -> Tensor:
    """Return the bucket of each token and round, argmax [xR, -xR] (Andoni et al. 2015), [B, H, rounds, N].

    Args:
        q: Shared queries and keys, [B, H, N, D].
        rotations: Random matrices from `draw_rotations`; the first num_buckets / 2 columns are used.
        num_buckets: Number of buckets, 1 or even.
        key_mask: [B, N] bool; tokens to ignore get the bucket num_buckets.
    """
    if num_buckets == 1:
        buckets = torch.zeros(*q.shape[:2], len(rotations), q.shape[2], dtype=torch.long, device=q.device)
    else:
        half = rotations[:, :, : num_buckets // 2].to(q.dtype)
        rotated = torch.einsum("bhnd,rdc->bhrnc", q, half)
        # The larger of the best of xR and the best of -xR, without both beside each other in memory.
        best, low = rotated.max(dim=-1), rotated.min(dim=-1)
        buckets = torch.where(best.values >= -low.values, best.indices, low.indices + num_buckets // 2)
    return buckets if key_mask is None else buckets.masked_fill(~key_mask[:, None, None], num_buckets)


def lsh_attention(
    q: Tensor,
    v: Tensor,
    rotations: Tensor,
    chunk_size: int,
    key_mask: Tensor | None = None,
    max_buckets: int = 1024,
    is_causal: bool = False,
) -> Tensor:
    """Attention of each token to the tokens of its bucket, with queries as keys (Kitaev et al. 2020, section 2).

    In each round, tokens are sorted by bucket and place and cut into chunks; a token attends to those of its bucket in
    its own chunk and in the one before and after. Keys are queries of unit length. A pair that several rounds have in
    common counts once (equations 5 and 6), so the result is softmax attention over the union of all rounds. The cost is
    O(N log N). The hash has no gradient.

    In causal order a token attends to the last `chunk_size` tokens of its bucket before it. Where chunks begin would
    depend on later tokens.

    Args:
        q: Queries, [B, H, N, D].
        v: Values, [B, H, N, Dv].
        rotations: Random matrices, [rounds, D, at least half of the buckets].
        chunk_size: Tokens of a chunk; buckets hold half as many on average.
        key_mask: [B, N] bool, False for tokens to ignore.
        max_buckets: Largest number of buckets.
        is_causal: Whether token i attends to tokens 0 .. i only. Later ones change nothing but rounding, except by
            their number, on which that of the buckets depends.

    Returns:
        Attended values, [B, H, N, Dv]; 0 for samples without a visible token.
    """
    N = q.shape[2]
    if key_mask is not None:
        hidden = ~key_mask[:, None, :, None]
        q, v = q.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
    num_buckets = num_buckets_of(N, chunk_size, min(max_buckets, 2 * rotations.shape[-1]))
    buckets = hash_buckets(q.detach(), rotations, num_buckets, key_mask)
    order = torch.sort(buckets, dim=-1, stable=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(N, device=q.device).expand_as(order))
    # Chunk (in causal order: place) and bucket of each token in all rounds, [B, H, N, rounds].
    places = torch.stack([rank if is_causal else rank // chunk_size, buckets]).permute(0, 1, 2, 4, 3)
    reach = (0, chunk_size) if is_causal else (-1, 1)
    k = F.normalize(q, dim=-1)
    outs, sums = zip(
        *(
            _attend_round(q, k, v, order[:, :, index], places, index, chunk_size, reach)
            for index in range(len(rotations))
        ),
        strict=True,
    )
    weights = torch.softmax(torch.stack(sums), dim=0)
    out = (torch.stack(outs) * weights[..., None].to(v.dtype)).sum(dim=0)
    return out if key_mask is None else out * key_mask.any(dim=1)[:, None, None, None]


def num_buckets_of(num_tokens: int, chunk_size: int, max_buckets: int) -> int:
    """Return the number of buckets for a number of tokens: 1, or an even number that is at most `max_buckets`."""
    wanted = 2 * round(num_tokens / chunk_size)
    return 1 if wanted < 2 else min(wanted, max_buckets)


def _attend_round(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    places: Tensor,
    index: int,
    chunk_size: int,
    reach: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Attend within the buckets of one round; return values [B, H, N, Dv] and log-sums of exponentials [B, H, N].

    `reach` has the smallest and the largest difference between the places of a query and of a key.
    """
    chunks = -(-order.shape[-1] // chunk_size)
    missing = chunks * chunk_size - order.shape[-1]
    # Places behind the last token repeat the first one and are masked.
    padded = F.pad(order, (0, missing))
    is_token = torch.arange(padded.shape[-1], device=q.device) < order.shape[-1]

    def sorted_rows(x: Tensor) -> Tensor:
        rows = x.gather(2, padded[..., None].expand(*padded.shape, x.shape[-1]))
        return split_dim(rows, 2, chunks, chunk_size)

    place, bucket = places
    queries, *own = (sorted_rows(x) for x in (q, k, v, _ids(order), place, bucket))
    own_ids, own_place, own_bucket = own[2:]
    keys, values, ids, in_place, in_bucket = map(_with_neighbours, own)
    seen = _with_neighbours(is_token.view(1, 1, chunks, chunk_size, 1), False)[..., 0]
    logits = queries @ keys.mT * q.shape[-1] ** -0.5
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Whether a pair is visible in each round, [..., chunk_size, 3 chunk_size, rounds].
    ahead = own_place.unsqueeze(-2) - in_place.unsqueeze(-3)
    visible = (ahead >= reach[0]) & (ahead <= reach[1]) & (own_bucket.unsqueeze(-2) == in_bucket.unsqueeze(-3))
    is_own = own_ids == ids.mT
    logits = logits.masked_fill(is_own, _SELF) - visible.sum(-1).clamp(min=1).to(logits.dtype).log()
    logits = logits.masked_fill(~(visible[..., index] & seen.unsqueeze(-2)), -torch.inf)
    total = logits.logsumexp(dim=-1)
    # Only padding sees nothing.
    mixed = (logits - total.masked_fill(total == -torch.inf, 0.0)[..., None]).exp().to(v.dtype) @ values
    back = order.argsort(dim=-1)
    out = mixed.flatten(2, 3).gather(2, back[..., None].expand(*back.shape, v.shape[-1]))
    return out, total.flatten(2).gather(2, back)


def _ids(order: Tensor) -> Tensor:
    """Return the index of each token, [B, H, N, 1]."""
    return torch.arange(order.shape[-1], device=order.device).expand(order.shape)[..., None]


def _with_neighbours(x: Tensor, fill: float | bool = 0) -> Tensor:
    """Concatenate each chunk with the one before and after, [B, H, chunks, n, C] -> [B, H, chunks, 3 n, C]."""
    padded = F.pad(x, (0, 0, 0, 0, 1, 1), value=fill)
    return torch.cat([padded[:, :, :-2], padded[:, :, 1:-1], padded[:, :, 2:]], dim=3)
