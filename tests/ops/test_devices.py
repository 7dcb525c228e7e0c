"""What attention asks of a device: no answer to wait for, as many operations at any size, a fixed order of sums."""

from collections import Counter

import pytest
import timm
import torch
from attention_cases import value_and_gradients
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import perf_vit
from perf_vit.ops import clustered_attention, draw_projection, favor_attention, fit_balancing

# Operations whose result, or whose size, the processor must read from the device.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique2", "item"}
# Operations that have no fixed order of sums on GPUs, or a slow one in deterministic mode.
UNORDERED = {"index_add", "index_add_", "scatter_add", "scatter_add_", "index_put", "index_put_", "_index_put_impl_"}
UNORDERED |= {"cumsum", "histc", "bincount", "embedding_dense_backward", "scatter_reduce"}


class Operations(TorchDispatchMode):
    """Count of operations by name; refuses those that read from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        assert name not in WAITING, f"{name} waits for the device"
        if name == "index":
            indices = [x for x in args[1] if x is not None]
            assert all(x.dtype not in (torch.bool, torch.uint8) for x in indices), "a mask as index waits"
        if name in ("_to_copy", "copy_"):
            kinds = {x.device.type for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)}
            target = (kwargs or {}).get("device")
            kinds |= {torch.device(target).type} if target is not None else set()
            assert len(kinds) == 1, f"{name} moves values between {kinds}"
        self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def clustered(side: int, masked: bool = False, num_sinks: int = 0):
    def attend(q, k, v):
        mask = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device) if masked else None
        return clustered_attention(q, k, v, (side, side), 16, num_sinks, 160, 1, mask)

    return attend


def favor(kernel: str, masked: bool = False, balanced: bool = False):
    projection = draw_projection(128, 64, generator=torch.Generator().manual_seed(0), kernel=kernel)
    projections = {"cpu": projection, "meta": projection.to("meta")}

    def attend(q, k, v):
        mask = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool, device=q.device) if masked else None
        balancing = fit_balancing(q, k, mask) if balanced else None
        return favor_attention(q, k, v, projections[q.device.type], kernel, mask, balancing=balancing)

    return attend


def operations(attend, side: int, grad: bool) -> Counter[str]:
    q, k, v = (torch.empty(2, 6, 1 + side * side, 64, device="meta", requires_grad=grad) for _ in range(3))
    # Constants are made once for a device.
    attend(q, k, v)
    with Operations() as counted:
        out = attend(q, k, v)
        if grad:
            out.square().sum().backward()
    return counted.counts


ATTENTIONS = {
    "clusters": lambda side: clustered(side),
    "clusters, masked": lambda side: clustered(side, masked=True),
    "clusters, sinks": lambda side: clustered(side, num_sinks=256),
    "softmax+": lambda side: favor("softmax+"),
    "softmax-hyp+, masked": lambda side: favor("softmax-hyp+", masked=True, balanced=True),
    "oprf": lambda side: favor("oprf", balanced=True),
    "relu": lambda side: favor("relu"),
}


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_device_is_not_waited_for_and_gets_the_same_operations_at_any_size(name: str, grad: bool) -> None:
    small, large = (operations(ATTENTIONS[name](side), side, grad) for side in (64, 256))
    assert small == large
    assert small["scaled_dot_product_attention"] + small["bmm"] + small["baddbmm"] > 0


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", ["clusters", "softmax+", "softmax-hyp+, masked", "oprf", "relu"])
def test_sums_on_a_device_have_a_fixed_order_without_slow_operations(name: str, grad: bool) -> None:
    assert not UNORDERED & operations(ATTENTIONS[name](64), 64, grad).keys()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_sinks", [0, 20])
def test_deterministic_mode_repeats_values_and_gradients(num_sinks: int, masked: bool) -> None:
    q, k, v = torch.randn(3, 2, 2, 401, 64, generator=torch.Generator().manual_seed(0)).unbind(0)
    torch.use_deterministic_algorithms(True)
    try:
        for attend in (clustered(20, masked, num_sinks), favor("softmax+", masked)):
            first, second = (value_and_gradients(attend, q, k, v) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["clustered_vit_tiny_patch16_224", "clustered_vit_rope_small_patch16_224"])
def test_autocast_reaches_fused_attention(name: str, dtype: torch.dtype, grad: bool, monkeypatch) -> None:
    fused, dtypes = F.scaled_dot_product_attention, []

    def attend(q, k, v, **options):
        dtypes.extend(x.dtype for x in (q, k, v))
        return fused(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    options = {"max_exact_tokens": 0, "window_size": 4, "num_clusters": 8}
    model = timm.create_model(name, img_size=128, depth=2, num_classes=0, attn_kwargs=options).train(grad)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=dtype):
        out = model(torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0)))
    # Prefix tokens and windows of both layers.
    assert len(dtypes) >= 3 * 2 * 2
    assert set(dtypes) == {dtype}
    if grad:
        out.float().sum().backward()
        assert all(x.grad is None or x.grad.isfinite().all() for x in model.parameters())


def test_deterministic_training_of_a_model_repeats_its_gradients() -> None:
    softmax = timm.create_model("vit_tiny_patch16_224", img_size=128, depth=2, num_classes=3)
    x = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    torch.use_deterministic_algorithms(True)
    try:
        for mixer, options in (("clustered", {"max_exact_tokens": 0, "window_size": 4}), ("performer", {})):
            model = perf_vit.linearize(softmax, mixer, **options)
            pairs = [torch.autograd.grad(model(x).square().sum(), list(model.parameters())) for _ in range(2)]
            assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
