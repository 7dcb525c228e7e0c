"""Linformer, Reformer, S4, H3 and windows against their N x N references."""

import pytest
import timm
import torch
from torch.nn import functional as F

from perf_vit.layers import MIXERS
from perf_vit.layers.mixer import make_mixer
from perf_vit.ops.lsh import draw_rotations, hash_buckets, lsh_attention, num_buckets_of
from perf_vit.ops.naive_mixers import (
    naive_convolve_grid,
    naive_linformer,
    naive_lsh_attention,
    naive_window_attention,
)
from perf_vit.ops.state_space import DiagonalStates, convolve_grid

GRIDS = [(1, 1), (5, 7), (8, 8), (13, 3)]
OPTIONS = {
    "linformer": {"num_projected": 6, "native_side": 4},
    "reformer": {"chunk_size": 8, "num_rounds": 3},
    "s4": {"num_states": 3},
    "h3": {"num_states": 3},
    "windowed": {"window_size": 3},
    "registers": {"window_size": 3},
}


def tensors(grid, prefix: int, batch: int = 2, heads: int = 2, head_dim: int = 4, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shape = batch, heads, prefix + grid[0] * grid[1], head_dim
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3))
    mask = torch.rand(batch, shape[2], generator=generator) > 0.3
    mask[:, -1] = True
    return q, k, v, mask


def mixer_of(name: str, prefix: int, **changes):
    torch.manual_seed(0)
    options = MIXERS[name].options_type(**{**OPTIONS[name], **changes}, num_prefix_tokens=prefix, layer_index=1)
    return make_mixer(options, head_dim=4, num_heads=2).double()


def check(out, expected, *inputs) -> None:
    """Compare values and gradients of a weighted sum."""
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
    ours, theirs = (torch.autograd.grad((y * weight).sum(), inputs, retain_graph=True) for y in (out, expected))
    for ours_one, theirs_one in zip(ours, theirs, strict=True):
        torch.testing.assert_close(ours_one, theirs_one, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("grid", [*GRIDS, (4, 4)])
def test_linformer_is_attention_to_projected_keys(grid, prefix, masked) -> None:
    q, k, v, mask = tensors(grid, prefix)
    mixer = mixer_of("linformer", prefix)
    keys, values = (mixer.projection(weight, grid) for weight in (mixer.keys, mixer.values))
    if grid == (4, 4):
        assert keys is mixer.keys
    hidden = ~mask[:, None, :, None] & masked
    expected = naive_linformer(q, k.masked_fill(hidden, 0), v.masked_fill(hidden, 0), keys, values)
    check(mixer(q, k, v, grid, mask if masked else None), expected, q, k, v, mixer.keys, mixer.values)


def test_linformer_sums_a_uniform_image_alike_at_every_size() -> None:
    mixer = mixer_of("linformer", 1)
    sums = [mixer.projection(mixer.keys, grid)[:, 1:].sum(dim=1) for grid in ((4, 4), (8, 8), (16, 12))]
    for each in sums[1:]:
        torch.testing.assert_close(each, sums[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize(("grid", "chunk_size"), [((1, 1), 8), ((5, 7), 8), ((9, 9), 4), ((13, 3), 64)])
def test_reformer_is_attention_over_the_union_of_its_rounds(grid, chunk_size, rounds, masked, is_causal) -> None:
    q, _, v, mask = tensors(grid, 1)
    rotations = draw_rotations(rounds, 64, 4, torch.Generator().manual_seed(3)).double()
    num_buckets = num_buckets_of(q.shape[2], chunk_size, 64)
    seen = mask if masked else None
    expected = naive_lsh_attention(q, v, rotations, chunk_size, num_buckets, seen, is_causal)
    out = lsh_attention(q, v, rotations, chunk_size, seen, 64, is_causal)
    if masked:
        # What ignored tokens get doesn't matter.
        out, expected = (y * mask[:, None, :, None] for y in (out, expected))
    check(out, expected, q, v)


def test_tokens_of_one_direction_share_a_bucket_and_opposite_ones_do_not() -> None:
    q = torch.randn(1, 1, 6, 4, generator=torch.Generator().manual_seed(0))
    rotations = draw_rotations(4, 8, 4, torch.Generator().manual_seed(1))
    buckets = hash_buckets(torch.cat([q, 3 * q, -q], dim=2), rotations, 8)[0, 0]
    assert torch.equal(buckets[:, :6], buckets[:, 6:12])
    assert ((buckets[:, :6] - buckets[:, 12:]).abs() == 4).all()
    assert len(buckets.unique()) > 4


@pytest.mark.parametrize("grid", [(1, 1), (1, 6), (5, 7), (6, 2)])
def test_convolutions_over_a_grid_are_sums_over_all_pairs(grid) -> None:
    torch.manual_seed(0)
    rows, columns = DiagonalStates(3, 4).double(), DiagonalStates(3, 4).double()
    u = torch.randn(2, 3, *grid, dtype=torch.float64, requires_grad=True)
    kernels = rows.kernel(grid[1]), columns.kernel(grid[0])
    parameters = [*rows.parameters(), *columns.parameters()]
    check(convolve_grid(u, *kernels), naive_convolve_grid(u, *kernels), u, *parameters)


def test_a_kernel_is_the_response_of_the_recurrence() -> None:
    torch.manual_seed(1)
    states = DiagonalStates(2, 3).double()
    rate = torch.complex(-states.log_decay.exp(), states.frequency)
    step = states.log_step.exp()[..., None]
    decay = (rate * step).exp()
    # A constant input over one step, then none.
    x, out = (decay - 1) / rate, []
    for _ in range(9):
        out.append(2 * (torch.view_as_complex(states.weight) * x).sum(-1).real)
        x = decay * x
    torch.testing.assert_close(states.kernel(9), torch.stack(out, dim=-1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("name", ["s4", "h3"])
def test_state_spaces_mix_values_over_the_whole_grid(name, prefix, masked) -> None:
    grid = (5, 4)
    q, k, v, mask = tensors(grid, prefix)
    mixer = mixer_of(name, prefix)
    kernels = mixer.rows.kernel(grid[1]), mixer.columns.kernel(grid[0])
    seen = mask[:, prefix:] if masked else torch.ones(2, 20, dtype=torch.bool)
    maps = [(x[:, :, prefix:] * seen[:, None, :, None]).mT.reshape(2, 8, *grid) for x in (k, v)]
    u = maps[1]
    if name == "h3":
        u = F.conv2d(maps[0], mixer.shift.weight, padding=1, groups=8) * maps[1]
    y = naive_convolve_grid(u, *kernels) + mixer.skip[:, None, None] * u
    y = (F.gelu(y) if name == "s4" else y).reshape(2, 2, 4, 20).mT
    weight = seen[:, None, :, None].double()
    mean = (y * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True)
    expected = torch.cat([mean.expand(-1, -1, prefix, -1), y], dim=2)
    inputs = [v] if name == "s4" else [q, k, v]
    check(mixer(q, k, v, grid, mask if masked else None), expected if name == "s4" else q * expected, *inputs)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", ["windowed", "registers"])
def test_windows_are_softmax_attention_with_their_mask(name, grid, prefix, masked) -> None:
    q, k, v, mask = tensors(grid, prefix)
    mixer = mixer_of(name, prefix)
    seen = mask if masked else None
    expected = naive_window_attention(q, k, v, grid, 3, prefix, to_prefix=name == "registers", key_mask=seen)
    check(mixer(q, k, v, grid, seen), expected, q, k, v)


@pytest.mark.parametrize("name", OPTIONS)
def test_tokens_to_ignore_may_hold_anything(name) -> None:
    grid = (5, 7)
    q, k, v, mask = (x.detach() for x in tensors(grid, 1))
    mixer, kept = mixer_of(name, 1), mask[:, None, :, None]
    expected = mixer(q, k, v, grid, mask)
    other = [torch.where(kept, x, torch.nan) for x in (q, k, v)]
    out = mixer(*other, grid, mask)
    torch.testing.assert_close(out.where(kept, 0.0), expected.where(kept, 0.0), rtol=1e-9, atol=1e-9)


def test_later_tokens_change_causal_reformer_by_rounding_only() -> None:
    q, k, v, _ = (x.detach() for x in tensors((9, 9), 0))
    mixer = mixer_of("reformer", 0)
    before = mixer(q, k, v, is_causal=True)
    for first in (1, 8, 40, 80):
        changed = [torch.cat([x[:, :, :first], x[:, :, first:].flip(2) - 1], dim=2) for x in (q, k, v)]
        # Sorted tokens lie at other places, so sums have another order.
        after = mixer(*changed, is_causal=True)
        torch.testing.assert_close(after[:, :, :first], before[:, :, :first], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted({*OPTIONS} - {"reformer"}))
def test_causal_order_is_refused(name) -> None:
    q, k, v, _ = tensors((2, 2), 0)
    with pytest.raises(ValueError, match=f"is_causal=True isn't possible with mixer='{name}'"):
        mixer_of(name, 0)(q, k, v, (2, 2), None, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIONS)
def test_half_precision_is_near_full_precision(name, dtype) -> None:
    grid = (6, 6)
    q, k, v, _ = (x.detach() for x in tensors(grid, 1))
    mixer = mixer_of(name, 1)
    expected = mixer(q, k, v, grid)
    halves = [x.to(dtype) for x in (q, k, v)]
    out = mixer.to(dtype)(*halves, grid)
    assert out.dtype == dtype
    # Hashes of rounded queries may differ.
    assert (out.double() - expected).norm() <= (0.5 if name == "reformer" else 0.05) * expected.norm()


@pytest.mark.parametrize("name", OPTIONS)
def test_an_unknown_option_or_size_is_refused(name) -> None:
    with pytest.raises(ValueError, match="num_feature"):
        timm.create_model("performer_vit_tiny_patch16_224", mixer=name, attn_kwargs={"num_feature": 3}, depth=1)
    option = next(iter(OPTIONS[name]))
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        MIXERS[name].options_type(**{option: 0})


@pytest.mark.parametrize("name", OPTIONS)
def test_mixers_work_in_models_in_channels_last(name: str) -> None:
    """Detectors are in this layout."""
    mixer, (q, k, v, mask) = mixer_of(name, 1), tensors((4, 4), 1)
    expected = mixer(q, k, v, (4, 4), mask)
    check(mixer.to(memory_format=torch.channels_last)(q, k, v, (4, 4), mask), expected, v)
