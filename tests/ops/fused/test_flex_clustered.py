"""Clustered attention by FlexAttention: the layout against the N x N reference, and what a layer issues."""

import dataclasses
import math

import pytest
import torch
from attention_cases import assert_same, value_and_gradients
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from perf_vit.ops import attention_backend, clustered_attention
from perf_vit.ops.fused import dispatch, flex_layout
from perf_vit.ops.fused import flex_clustered as flex_module
from perf_vit.ops.fused.flex_clustered import flex_clustered
from perf_vit.ops.fused.flex_layout import FlexLayout, FlexSizes
from perf_vit.ops.naive import naive_clustered_attention
from perf_vit.ops.sinks import choose_sinks
from perf_vit.ops.windows import WindowGrid

VIEWS = {"_unsafe_view", "detach", "empty", "new_empty", "alias"}
# Operations that have no fixed order of sums on GPUs.
UNORDERED = {"index_add", "index_add_", "scatter_add", "scatter_add_", "index_put", "index_put_", "scatter_reduce"}
CPU = torch.device("cpu")


def make(grid, num_prefix, batch=2, head_dim=16, value_dim=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(grid[0] * 100 + grid[1])
    size = (batch, 2, num_prefix + grid[0] * grid[1])
    widths = (head_dim, head_dim, value_dim or head_dim)
    return [torch.randn(*size, width, generator=generator, dtype=dtype) for width in widths]


def make_mask(q, kept):
    return torch.rand(q.shape[0], q.shape[2], generator=torch.Generator().manual_seed(0)) < kept


def pairs_of(number, indices, blocks, num_columns):
    """Matrix of visible pairs, from the lists of blocks of one row each."""
    pairs = torch.zeros(len(number[0, 0]), num_columns, dtype=torch.bool)
    for row, count, columns in zip(pairs, number[0, 0].tolist(), indices[0, 0], strict=True):
        row[columns[:count].long()] = True
    return pairs.repeat_interleave(blocks[0], 0).repeat_interleave(blocks[1], 1)


def densely(q, k, v, terms, block_mask, scale):
    """Softmax over the pairs in the lists of blocks."""
    blocks = block_mask.BLOCK_SIZE
    lists = (block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    pairs = pairs_of(*lists, blocks, k.shape[2] // blocks[1])
    logits = (q @ k.mT * scale + terms.unsqueeze(2)).masked_fill(~pairs, -torch.inf)
    return logits.softmax(-1).to(v.dtype) @ v


def reference(q, k, v, grid, window_size, num_sinks, num_clusters, num_prefix, mask):
    keys = k if mask is None else k.masked_fill(~mask[:, None, :, None], 0.0)
    sinks = choose_sinks(q, keys, num_sinks, num_prefix, mask)
    options = (grid, window_size, sinks, num_clusters, num_prefix, mask)
    return value_and_gradients(naive_clustered_attention, q, keys, v, *options)


CASES = {
    "even windows": ((8, 12), 4, 0, 7, 1, False),
    "uneven windows, sinks": ((9, 13), 5, 6, 7, 5, False),
    "masked": ((9, 13), 4, 6, 7, 5, True),
    "no prefix, masked": ((7, 11), 8, 0, 3, 0, True),
    "no windows": ((6, 7), 0, 5, 9, 1, True),
    "no windows, no sinks": ((6, 7), 0, 0, 9, 0, False),
    "one window": ((5, 6), 8, 3, 40, 1, False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch", [1, 3])
def test_value_and_gradient_of_the_layout_match_the_dense_definition(case, batch):
    grid, *options, masked = CASES[case]
    q, k, v = make(grid, options[-1], batch, value_dim=24)
    mask = make_mask(q, 0.7) if masked else None
    actual = value_and_gradients(flex_clustered, q, k, v, grid, *options, mask, densely)
    assert_same(actual, reference(q, k, v, grid, *options, mask), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 128])
def test_gradients_of_low_precision_are_near_the_dense_definition(head_dim, dtype):
    grid, options = (9, 13), (5, 6, 7, 1)
    q, k, v = (x.to(dtype) for x in make(grid, 1, 1, head_dim, dtype=torch.float32))
    actual = value_and_gradients(flex_clustered, q, k, v, grid, *options, None, densely)
    expected = reference(*(x.double() for x in (q, k, v)), grid, *options, None)
    for found, wanted in zip(actual, expected, strict=True):
        assert found.dtype == dtype
        assert (found.double() - wanted).norm() < 4 * torch.finfo(dtype).eps * wanted.norm() + 1e-6


@pytest.fixture
def eager_flex(monkeypatch):
    """FlexAttention without a graph of each call; it has no gradient on a CPU."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_flex_attention_equals_the_dense_definition(head_dim, dtype, eager_flex):
    grid, num_prefix, batch = (9, 13), 5, 3 if head_dim == 16 else 1
    q, k, v = (x.to(dtype) for x in make(grid, num_prefix, batch, head_dim, dtype=torch.float32))
    mask = make_mask(q, 0.8)
    out = flex_clustered(q, k, v, grid, 5, 6, 7, num_prefix, mask)
    q, k, v = (x.double() for x in (q, k, v))
    keys = k.masked_fill(~mask[:, None, :, None], 0.0)
    sinks = choose_sinks(q, keys, 6, num_prefix, mask)
    expected = naive_clustered_attention(q, keys, v, grid, 5, sinks, 7, num_prefix, mask)
    assert out.dtype == dtype
    assert (out.double() - expected).norm() < 2 * torch.finfo(dtype).eps * expected.norm() + 1e-6


@pytest.mark.parametrize("window_size", [0, 4])
def test_a_sample_without_keys_gets_zeros_and_masked_keys_may_hold_anything(window_size):
    q, k, v = make((9, 11), 1)
    mask = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool)
    mask[0] = False
    mask[1, 40:60] = False
    options = ((9, 11), window_size, 6, 7, 1, mask, densely)
    clean = value_and_gradients(flex_clustered, q, k, v, *options)
    assert not clean[0][0].any()
    assert not any(gradient[0].any() for gradient in clean[1:])
    k[:, :, 40:60], v[:, :, 40:60] = torch.nan, torch.nan
    poisoned = value_and_gradients(flex_clustered, q, k, v, *options)
    assert all(torch.equal(found, expected) for found, expected in zip(poisoned, clean, strict=True))


def num_bytes(*values):
    """Bytes of the distinct elements of tensors, also in lists."""
    total = 0
    for x in values:
        if isinstance(x, list | tuple):
            total += num_bytes(*x)
        elif isinstance(x, torch.Tensor):
            sizes = [size for size, stride in zip(x.shape, x.stride(), strict=True) if stride]
            total += math.prod(sizes) * x.itemsize
    return total


class Operations(TorchDispatchMode):
    """Names of operations that aren't views, and the bytes that they read and write."""

    def __init__(self):
        super().__init__()
        self.names, self.bytes = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, out = function._schema.name.split("::")[1], function(*args, **(kwargs or {}))
        if not function.is_view and name not in VIEWS:
            self.names.append(name)
            # Operations that write a part of a tensor don't read it.
            reads = args[3:] if name == "index_copy_" else args[1:] if name == "copy_" else args
            writes = args[3] if name == "index_copy_" else out
            self.bytes += num_bytes(reads, writes)
        return out


class Attend(torch.autograd.Function):
    """Stands for FlexAttention, which refuses the meta device: one operation forward, two backward."""

    read = 0

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        Attend.read += num_bytes(q, k, v)
        return q.new_ones(*q.shape[:-1], v.shape[-1])

    @staticmethod
    def backward(ctx, gradient):
        gradient.mul(2)
        return tuple(
            torch.empty_like(x).fill_(0) if x.shape[-1] == 64 else x.new_empty(x.shape) for x in ctx.saved_tensors
        )


@pytest.fixture
def operations(monkeypatch):
    """Function that returns the operations of a layer's attention, forward and backward."""

    def fused(q, k, v, **_):
        return Attend.apply(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)

    def count(grid, dtype, masked=False, num_sinks=0):
        shape = (2, 6, 1 + grid[0] * grid[1], 64)
        q, k, v = (torch.empty(shape, device="meta", dtype=dtype, requires_grad=True) for _ in range(3))
        mask = torch.ones(2, shape[2], dtype=torch.bool, device="meta") if masked else None
        options = (grid, 16, num_sinks, 160, 1, mask, lambda q, k, v, *_: Attend.apply(q, k, v))
        # Tables are made once for a grid.
        flex_clustered(q, k, v, *options)
        with Operations() as forward:
            out = flex_clustered(q, k, v, *options)
        with Operations() as backward:
            out.float().square().sum().backward()
        return forward, backward

    return count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [64, 70], ids=["even", "uneven"])
def test_a_layer_issues_at_most_60_operations_at_any_size(dtype, columns, operations):
    counts = {len(operations((rows, columns), dtype)[0].names) for rows in (64, 256, 1024)}
    assert len(counts) == 1
    assert counts.pop() <= 60


@pytest.mark.parametrize(("masked", "num_sinks"), [(False, 0), (True, 256)], ids=["plain", "masked, sinks"])
def test_no_operation_depends_on_the_size(masked, num_sinks, operations):
    small, large = (operations((side, side), torch.bfloat16, masked, num_sinks) for side in (64, 256))
    assert [each.names for each in small] == [each.names for each in large]


def test_sums_have_a_fixed_order(operations):
    forward, backward = operations((64, 64), torch.bfloat16)
    assert not UNORDERED & {*forward.names, *backward.names}


def test_bytes_of_a_layer_against_those_of_queries_keys_values_and_result(operations):
    num_tokens = 2 * 6 * 256 * 256
    before = Attend.read
    forward = operations((256, 256), torch.bfloat16)[0]
    # Counted twice: tables are made in a call of its own.
    per_token = (forward.bytes + (Attend.read - before) / 2) / num_tokens
    assert 22 < per_token / (4 * 64 * 2) < 23


@pytest.mark.parametrize("case", CASES)
def test_both_lists_of_blocks_hold_the_pairs_of_the_windows(case):
    grid, window_size, num_sinks, num_clusters, num_prefix, _ = CASES[case]
    windows = WindowGrid.of(grid, window_size) if window_size else WindowGrid(grid[1], *grid)
    num_near = windows.height * windows.width if window_size else 0
    sizes = FlexSizes(grid, windows, num_near, num_sinks + num_prefix, num_clusters)
    mask = FlexLayout.of(sizes, CPU).block_mask
    num_queries, num_keys = mask.shape[-2:]
    blocks = mask.BLOCK_SIZE
    by_query = pairs_of(mask.full_kv_num_blocks, mask.full_kv_indices, blocks, num_keys // blocks[1])
    by_key = pairs_of(mask.full_q_num_blocks, mask.full_q_indices, blocks[::-1], num_queries // blocks[0])
    assert torch.equal(by_query, by_key.T)
    query, key = torch.arange(num_queries)[:, None], torch.arange(num_keys)
    assert torch.equal(by_query, mask.mask_mod(None, None, query, key))
    assert not mask.kv_num_blocks.any()
    assert not mask.q_num_blocks.any()


def test_tables_are_linear_in_the_number_of_tokens_and_made_once_for_a_grid():
    def layout(side):
        return FlexLayout.of(FlexSizes((side, side), WindowGrid.of((side, side), 16), 256, 1, 160), CPU)

    def num_entries(side):
        mask = layout(side).block_mask
        return mask.full_kv_indices.numel() + mask.full_q_indices.numel()

    assert num_entries(256) == 16 * num_entries(64)
    assert layout(64) is layout(64)
    assert flex_layout._kept.cache_info().maxsize == 16


class Attention(torch.nn.Module):
    """Clustered attention over a grid of 9 x 12."""

    def forward(self, q, k, v):
        return clustered_attention(q, k, v, (9, 12), 4, 6, 7)


@pytest.fixture
def on_cpu(monkeypatch):
    """The backend runs on processors, as FlexAttention does without a gradient."""
    limits = dataclasses.replace(dispatch.LIMITS["flex"], devices=("cpu",))
    monkeypatch.setitem(dispatch.LIMITS, "flex", limits)
    with attention_backend("flex"):
        yield


@torch.no_grad()
def test_the_backend_reaches_flex_attention_and_the_default_does_not(monkeypatch, eager_flex, on_cpu):
    inputs, called = make((9, 12), 1, dtype=torch.float32), []
    fused = flex_module._flex
    monkeypatch.setattr(flex_module, "_flex", lambda *arguments: called.append(1) or fused(*arguments))
    found = Attention()(*inputs)
    assert called == [1]
    with attention_backend("torch"):
        expected = Attention()(*inputs)
    assert called == [1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_head_of_8_channels_is_computed_by_pytorch_operations_and_said(on_cpu, monkeypatch):
    monkeypatch.setattr("perf_vit.errors._warned", set())
    inputs = make((9, 12), 1, head_dim=8, dtype=torch.float32)
    with pytest.warns(RuntimeWarning, match="needs heads of at least 16 channels, got 8"):
        Attention()(*inputs)


@pytest.mark.slow
@torch.no_grad()
def test_an_exported_graph_holds_one_call_of_flex_attention(on_cpu):
    inputs = tuple(make((9, 12), 1, dtype=torch.float32))
    program = torch.export.export(Attention(), inputs)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("flex_attention") == 1
    torch.testing.assert_close(program.module()(*inputs), Attention()(*inputs), rtol=1e-5, atol=1e-6)
