import itertools
import pickle

import pytest
import torch
from attention_cases import KERNELS, kernel_id

from perf_vit.ops import KVState, draw_projection, fit_balancing, oprf_kernel

D = 16
each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=kernel_id)


def make(num_keys: int = 90, norm: float = 5.0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Queries, keys of one norm, values and a projection."""
    generator = torch.Generator().manual_seed(num_keys)
    q, k, v = torch.randn(3, 2, 3, num_keys, D, generator=generator, dtype=torch.float64).unbind(0)
    k = norm * k / k.norm(dim=-1, keepdim=True)
    return *(x.to(dtype) for x in (q, k, v)), draw_projection(40, D, generator=generator)


@each_kernel
def test_states_merge_in_any_order(kernel) -> None:
    q, k, v, projection = make(norm=1.0)
    q = q / 8
    whole = KVState.from_keys(k, v, projection, kernel)
    bounds = [slice(0, 1), slice(1, 40), slice(40, 90)]
    parts = [KVState.from_keys(k[:, :, b], v[:, :, b], projection, kernel) for b in bounds]
    for a, b, c in itertools.permutations(parts):
        for merged in (a.merge(b).merge(c), a.merge(b.merge(c))):
            torch.testing.assert_close(merged.log_scale, whole.log_scale, rtol=0, atol=0)
            torch.testing.assert_close(merged.S, whole.S, rtol=0, atol=1e-12)
            torch.testing.assert_close(merged.z, whole.z, rtol=1e-12, atol=0)
            torch.testing.assert_close(merged.attend(q), whole.attend(q), rtol=0, atol=1e-12)


@each_kernel
def test_update_equals_building_from_all_keys_and_leaves_the_old_state_alone(kernel) -> None:
    q, k, v, projection = make(norm=1.0)
    q = q / 8
    first = KVState.from_keys(k[:, :, :30], v[:, :, :30], projection, kernel)
    before = first.S.clone(), first.z.clone(), first.log_scale.clone()
    whole = KVState.from_keys(k, v, projection, kernel).attend(q)
    torch.testing.assert_close(first.update(k[:, :, 30:], v[:, :, 30:]).attend(q), whole, rtol=0, atol=1e-12)
    for old, now in zip(before, (first.S, first.z, first.log_scale), strict=True):
        assert torch.equal(old, now)


def test_merging_bridges_scales_that_no_float_holds_together() -> None:
    q, k, v, projection = make(dtype=torch.float32)
    near = KVState.from_keys(k, v, projection)
    # e^200 times the weight: beside it, nothing of the first state is left in float32.
    far = KVState(near.S * 2, near.z, near.log_scale + 200, near.feature_map)
    for merged in (near.merge(far), far.merge(near)):
        torch.testing.assert_close(merged.attend(q), far.attend(q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", [0.0, 1.0, 10.0, 30.0])
def test_long_keys_give_finite_sums_and_denominators_of_at_least_one(norm: float, dtype: torch.dtype) -> None:
    q, k, v, projection = make(norm=norm, dtype=dtype)
    state = KVState.from_keys(k[:, :, :50], v[:, :, :50], projection).update(k[:, :, 50:], v[:, :, 50:])
    for queries in (q, 30 * q / q.norm(dim=-1, keepdim=True)):
        numerator, denominator = state.sums(queries)
        assert denominator.min() >= 1
        assert numerator.isfinite().all()
        assert state.attend(queries).isfinite().all()
        assert state.attend(queries).dtype == dtype


@each_kernel
def test_samples_and_heads_do_not_couple(kernel) -> None:
    q, k, v, projection = make(dtype=torch.float32)
    alone = KVState.from_keys(k, v, projection, kernel).attend(q)
    k[1] *= 20
    k[0, 2] *= 20
    together = KVState.from_keys(k, v, projection, kernel).attend(q)
    assert torch.equal(alone[0, :2], together[0, :2])
    assert not torch.allclose(alone[1], together[1])


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_accumulators_are_at_least_float32(given: torch.dtype, kept: torch.dtype) -> None:
    _, k, v, projection = make(dtype=given)
    state = KVState.from_keys(k, v, projection)
    assert {state.S.dtype, state.z.dtype, state.log_scale.dtype} == {kept}
    assert state.S.shape == (2, 3, 40, D)
    assert state.z.shape == state.log_scale.shape == (2, 3, 40)


def test_relu_keeps_a_zero_scale() -> None:
    _, k, v, projection = make()
    state = KVState.from_keys(k, v, projection, "relu").update(2 * k, v)
    assert not state.log_scale.any()


def test_no_gradient_flows_through_the_scale() -> None:
    _, k, v, projection = make()
    state = KVState.from_keys(k.requires_grad_(), v, projection)
    assert state.S.requires_grad
    assert not state.log_scale.requires_grad


def test_states_of_float32_merge_to_within_its_rounding() -> None:
    q, k, v, projection = make(dtype=torch.float32)
    whole = KVState.from_keys(k, v, projection)
    a, b, c = (KVState.from_keys(x, y, projection) for x, y in zip(k.split(30, 2), v.split(30, 2), strict=True))
    for merged in (a.merge(b).merge(c), c.merge(a.merge(b)), b.merge(c).merge(a)):
        torch.testing.assert_close(merged.attend(q), whole.attend(q), rtol=1e-6, atol=1e-6)


@each_kernel
def test_gradients_flow_through_states(kernel) -> None:
    q, k, v, projection = make(num_keys=3, norm=1.0)
    leaves = [x[:1, :1, :, :4].clone().requires_grad_() for x in (q / 4, k, v)]

    def attend(q, k, v):
        first = KVState.from_keys(k[:, :, :1], v[:, :, :1], projection[:, :4].double(), kernel)
        return first.update(k[:, :, 1:], v[:, :, 1:]).attend(q)

    assert torch.autograd.gradcheck(attend, leaves)


def test_states_travel_between_processes() -> None:
    q, k, v, projection = make()
    state = KVState.from_keys(k, v, projection)
    assert torch.equal(pickle.loads(pickle.dumps(state)).attend(q), state.attend(q))


def test_states_of_other_kernels_or_shapes_do_not_merge() -> None:
    q, k, v, projection = make()
    state = KVState.from_keys(k, v, projection)
    oprf = KVState.from_keys(k, v, projection, oprf_kernel(-0.05))
    oprf.merge(KVState.from_keys(k, v, projection, oprf_kernel(-0.05)))
    balanced = KVState.from_keys(k, v, projection, balancing=fit_balancing(q, k))
    others = [
        (state, KVState.from_keys(k, v, projection, "relu")),
        (oprf, KVState.from_keys(k, v, projection, oprf_kernel(-0.06))),
        (state, balanced),
        (balanced, KVState.from_keys(k, v, projection, balancing=fit_balancing(q, k + 1))),
    ]
    for one, other in others:
        with pytest.raises(ValueError, match="same kernel, parameter, balancing and shape"):
            one.merge(other)
    with pytest.raises(ValueError, match=r"expected it fixed: kernel=oprf_kernel\(-0.05\)"):
        KVState.from_keys(k, v, projection, "oprf")
    with pytest.raises(ValueError, match=r"got softmax\+ \[2, 3, 40, 16\] and softmax\+ \[1, 3, 40, 16\]"):
        state.merge(KVState.from_keys(k[:1], v[:1], projection))


def test_misshapen_inputs_are_named() -> None:
    q, k, v, projection = make()
    with pytest.raises(ValueError, match="same B, H and N >= 1"):
        KVState.from_keys(k, v[:, :, 1:], projection)
    with pytest.raises(ValueError, match="N >= 1"):
        KVState.from_keys(k[:, :, :0], v[:, :, :0], projection)
    with pytest.raises(ValueError, match="D = 16, got \\[40, 8\\]"):
        KVState.from_keys(k, v, projection[:, :8])
    with pytest.raises(ValueError, match="D = 16, got \\[2, 3, 90, 8\\]"):
        KVState.from_keys(k, v, projection).attend(q[..., :8])
