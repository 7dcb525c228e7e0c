"""Triton kernels of clustered attention against the N x N reference: on a GPU, or in Triton's interpreter."""

import os
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from perf_vit.ops import attention_backend, clustered_attention
from perf_vit.ops.naive import naive_clustered_attention
from perf_vit.ops.sinks import choose_sinks

pytest.importorskip("triton", reason="triton comes with torch for GPUs")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="neither a GPU nor Triton's interpreter"
)
SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
# In units of rounding to a dtype; the interpreter truncates to bfloat16, which is twice as far off as rounding.
ERRORS = {SINGLE: 1e-5, HALF: torch.finfo(HALF).eps / 2 + 1e-5, BRAIN: torch.finfo(BRAIN).eps + 1e-5}


def make(batch: int, num_tokens: int, head_dim: int, dtype: torch.dtype, heads: int = 1):
    """q, k and v as a layer has them: views of the result of one product."""
    generator = torch.Generator().manual_seed(num_tokens * head_dim)
    qkv = torch.randn(batch, num_tokens, 3, heads, head_dim, generator=generator).to(DEVICE, dtype)
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def triton(q, k, v, *options):
    with attention_backend("triton"), torch.no_grad():
        return clustered_attention(q, k, v, *options)


def check(batch, heads, head_dim, dtype, grid, window_size, num_sinks, num_clusters, num_prefix, masked) -> None:
    q, k, v = make(batch, num_prefix + grid[0] * grid[1], head_dim, dtype, heads)
    mask, keys, values = None, k, v
    if masked:
        mask = (torch.rand(batch, q.shape[2], generator=torch.Generator().manual_seed(grid[0])) > 0.3).to(DEVICE)
        keys, values = (x.masked_fill(~mask[:, None, :, None], 0.0) for x in (k, v))
        # Masked keys may hold anything.
        k, v = (x.masked_fill(~mask[:, None, :, None], torch.nan) for x in (k, v))
    out = triton(q, k, v, grid, window_size, num_sinks, num_clusters, num_prefix, mask)
    sinks = choose_sinks(q, keys, num_sinks, num_prefix, mask)
    expected = naive_clustered_attention(
        q.double(), keys.double(), values.double(), grid, window_size, sinks, num_clusters, num_prefix, mask
    )
    assert (out.dtype, out.shape) == (dtype, q.shape)
    assert (out.double() - expected).norm() / expected.norm() < ERRORS[dtype]


def test_key_masks_of_any_strides() -> None:
    q, k, v = make(2, 1 + 5 * 7, 16, SINGLE)
    mask = (torch.rand(36, 2, generator=torch.Generator().manual_seed(1)).to(DEVICE) > 0.4).T
    options = (5, 7), 3, 2, 5, 1
    assert torch.equal(triton(q, k, v, *options, mask), triton(q, k, v, *options, mask.contiguous()))


@pytest.mark.parametrize(
    ("batch", "head_dim", "dtype", "grid", "window_size", "num_sinks", "num_clusters", "num_prefix", "masked"),
    [
        (1, 16, SINGLE, (5, 7), 3, 0, 5, 0, False),
        (3, 32, BRAIN, (4, 5), 4, 3, 6, 1, True),
        (1, 64, HALF, (6, 5), 4, 2, 5, 5, False),
        # More clusters than a tile has.
        (1, 80, SINGLE, (6, 8), 4, 2, 40, 1, True),
        (3, 80, HALF, (1, 7), 5, 3, 4, 0, True),
        (1, 128, BRAIN, (4, 5), 3, 0, 7, 5, False),
        # A window with more queries and keys than a tile has.
        (1, 128, SINGLE, (9, 8), 9, 0, 6, 1, False),
        # No windows, and sinks that are masked, as there are too few others.
        (1, 64, SINGLE, (7, 5), 0, 40, 9, 5, True),
    ],
)
def test_values_match_the_dense_definition(
    batch, head_dim, dtype, grid, window_size, num_sinks, num_clusters, num_prefix, masked
) -> None:
    check(batch, 1, head_dim, dtype, grid, window_size, num_sinks, num_clusters, num_prefix, masked)


@pytest.mark.slow
@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    batch=st.sampled_from([1, 3]),
    heads=st.sampled_from([1, 2]),
    head_dim=st.sampled_from([16, 32, 64, 80, 128]),
    dtype=st.sampled_from([SINGLE, HALF, BRAIN]),
    grid=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    window_size=st.sampled_from([0, 1, 3, 4, 8, 20]),
    num_sinks=st.sampled_from([0, 1, 6, 500]),
    num_clusters=st.sampled_from([1, 2, 7, 500]),
    num_prefix=st.sampled_from([0, 1, 5]),
    masked=st.booleans(),
)
def test_values_match_the_dense_definition_everywhere(
    batch, heads, head_dim, dtype, grid, window_size, num_sinks, num_clusters, num_prefix, masked
) -> None:
    check(batch, heads, head_dim, dtype, grid, window_size, num_sinks, num_clusters, num_prefix, masked)


def test_values_may_have_another_size_and_keys_an_offset() -> None:
    q, k, v = make(1, 1 + 30, 16, SINGLE)
    v = torch.cat([v, v[..., :8]], dim=-1)
    options = ((6, 5), 4, 3, 5, 1)
    expected = clustered_attention(q.double(), k.double(), v.double(), *options)
    for offset in (0.0, 300.0):
        out = triton(q, k + offset, v, *options)
        # Keys that are rounded at 300 are off by 2e-5.
        torch.testing.assert_close(out.double(), expected, rtol=1e-3 if offset else 1e-5, atol=1e-4 if offset else 1e-6)


def test_a_sample_without_keys_gets_zeros() -> None:
    q, k, v = make(2, 1 + 20, 16, HALF)
    mask = torch.ones(2, 21, dtype=torch.bool, device=DEVICE)
    mask[0] = False
    out = triton(q, k, v, (4, 5), 3, 2, 4, 1, mask)
    assert not out[0].any()
    assert out[1].any(dim=-1).all()


# Neither starts anything on a device.
NO_LAUNCH = {"aten::_unsafe_view", "aten::empty", "aten::empty_strided", "aten::new_empty"}


class Launches(TorchDispatchMode):
    """Names of operations that start something on a device, and of Triton kernels, which aren't run."""

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.names: list[str] = []
        self.arguments: list[torch.Tensor] = []
        for name in ("assign", "sum_clusters", "attend"):
            monkeypatch.setattr(f"perf_vit.ops.fused.clustered_kernels.{name}", _Kernel(partial(self._launch, name)))
        # On GPUs exact attention is one kernel.
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", self._exact)

    def _launch(self, name: str, *arguments, **options) -> None:
        self.names.append(name)
        self.arguments += [x for x in arguments if isinstance(x, torch.Tensor)]

    def _exact(self, q, k, v, attn_mask=None):
        self._launch("exact", q, k, v)
        return torch.empty_strided(q.shape, q.stride(), dtype=q.dtype, device=q.device)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if not function.is_view and name not in NO_LAUNCH:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


class _Kernel:
    def __init__(self, launch) -> None:
        self.launch = launch

    def __getitem__(self, grid):
        return self.launch


def launches(monkeypatch, side: int, num_sinks: int = 0, masked: bool = False) -> Launches:
    from perf_vit.ops.fused.triton_clustered import triton_clustered_attention

    q, k, v = (torch.empty(2, 6, 1 + side * side, 64, device="meta", dtype=BRAIN) for _ in range(3))
    mask = torch.ones(2, 1 + side * side, dtype=torch.bool, device="meta") if masked else None
    # The first call makes constants.
    with Launches(monkeypatch):
        triton_clustered_attention(q, k, v, (side, side), 16, num_sinks, 160, 1, mask)
    with Launches(monkeypatch) as found:
        triton_clustered_attention(q, k, v, (side, side), 16, num_sinks, 160, 1, mask)
    return found


@pytest.mark.parametrize(
    ("num_sinks", "masked", "most"),
    [(0, False, 60), (256, False, 60), (0, True, 120)],
    ids=["plain", "sinks", "masked"],
)
def test_a_layer_takes_few_launches_at_any_size(monkeypatch, num_sinks: int, masked: bool, most: int) -> None:
    small, large = (launches(monkeypatch, side, num_sinks, masked).names for side in (64, 256))
    assert small == large
    assert small.count("attend") == 1
    assert len(small) <= most, len(small)


def test_queries_keys_and_values_are_read_in_place(monkeypatch) -> None:
    q, k, v = make(1, 1 + 30, 16, HALF)
    with Launches(monkeypatch) as found:
        triton(q, k, v, (6, 5), 4, 2, 5)
    places = {x.data_ptr() for x in found.arguments}
    assert {q.data_ptr(), k.data_ptr(), v.data_ptr()} <= places
