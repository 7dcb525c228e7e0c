"""Count the bytes that a layer of attention moves, and what it launches, without a GPU.

    python tools/benchmarks/attention_bytes.py

prints a table as Markdown. Every launch is counted as reading its arguments and writing its results once, as if all of
them came from memory and none from a cache; views cost nothing. The minimum reads queries, keys and values and writes
the result. Tensors are on the "meta" device, so nothing is computed, and triton must be installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perf_vit.ops import clustered_attention, draw_projection, favor_attention
from perf_vit.ops.fused import clustered_kernels, triton_favor
from perf_vit.ops.fused.triton_clustered import triton_clustered_attention
from perf_vit.ops.state import make_feature_map

HEADS = {"ViT-S": 6, "ViT-L": 16}
SIDES = (64, 128, 256)
HEAD_DIM, WINDOW, FEATURES = 64, 16, 256
# They make or name memory and start nothing.
_NO_LAUNCH = {"aten::_unsafe_view", "aten::empty", "aten::empty_strided", "aten::new_empty"}
_KERNELS = [(clustered_kernels, name) for name in ("assign", "sum_clusters", "attend")]
_KERNELS += [(triton_favor, name) for name in ("sum_features", "attend_features")]


class Traffic(TorchDispatchMode):
    """Names of launches, and the bytes that all of them move."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []
        self.num_bytes = 0

    def add(self, name: str, *moved: object) -> None:
        """Count a launch that moves each of some tensors once."""
        tensors = {id(x): x for x in tree_leaves(moved) if isinstance(x, Tensor)}
        self.launches.append(name)
        self.num_bytes += sum(_size(x) for x in tensors.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Count an operation."""
        found, name = function(*args, **(kwargs or {})), function._schema.name
        if not function.is_view and name not in _NO_LAUNCH:
            self.add(name, args, kwargs, found)
        return found

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count also Triton kernels, and exact attention as the one kernel that it is on GPUs; neither is run."""
        exact = mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", self._exact)
        kernels = [mock.patch.object(module, name, _Kernel(self, name)) for module, name in _KERNELS]
        for patch in (exact, *kernels):
            patch.start()
        try:
            with self:
                yield
        finally:
            for patch in (exact, *kernels):
                patch.stop()

    def _exact(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
        self.add("scaled_dot_product_attention", q, k, v, attn_mask, out)
        return out


class _Kernel:
    def __init__(self, traffic: Traffic, name: str) -> None:
        self._traffic, self._name = traffic, name

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """Return a launch that is only counted."""

        def launch(*arguments: object, **constants: object) -> None:
            self._traffic.add(self._name, arguments)

        return launch


def _size(x: Tensor) -> int:
    """Return the bytes of a tensor; what is expanded counts once."""
    number = 1
    for length, stride in zip(x.shape, x.stride(), strict=True):
        number *= length if stride else 1
    return number * x.element_size()


def traffic(attend: Callable[[Tensor, Tensor, Tensor], Tensor], heads: int, num_tokens: int) -> Traffic:
    """Return what attention to queries, keys and values in bfloat16 launches and moves."""
    q, k, v = (torch.empty(1, heads, num_tokens, HEAD_DIM, device="meta", dtype=torch.bfloat16) for _ in range(3))
    # The first call makes constants.
    for _ in range(2):
        found = Traffic()
        with torch.no_grad(), found.counted():
            attend(q, k, v)
    return found


def attentions(side: int) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Return the attentions of a square image with a class token, by name."""
    grid, clusters = (side, side), 128 if side * side <= 2**15 else 160
    projection = draw_projection(FEATURES, HEAD_DIM, generator=torch.Generator().manual_seed(0)).to("meta")
    feature_map = make_feature_map("softmax+", projection, None)
    return {
        "clusters, PyTorch": lambda q, k, v: clustered_attention(q, k, v, grid, WINDOW, 0, clusters),
        "clusters, Triton": lambda q, k, v: triton_clustered_attention(q, k, v, grid, WINDOW, 0, clusters, 1, None),
        "FAVOR+, PyTorch": lambda q, k, v: favor_attention(q, k, v, projection),
        "FAVOR+, Triton": lambda q, k, v: triton_favor.triton_favor_attention(q, k, v, feature_map, None),
    }


def table() -> str:
    """Return the table as Markdown."""
    lines = ["| model | patches | attention | launches | MiB moved | of the minimum |", "|---|---|---|---|---|---|"]
    for model, heads in HEADS.items():
        for side in SIDES:
            num_tokens = 1 + side * side
            least = 4 * heads * num_tokens * HEAD_DIM * 2
            for name, attend in attentions(side).items():
                found = traffic(attend, heads, num_tokens)
                cells = (model, f"{side * side:,}", name, len(found.launches), f"{found.num_bytes / 2**20:,.0f}")
                lines.append(f"| {' | '.join(map(str, cells))} | {found.num_bytes / least:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
