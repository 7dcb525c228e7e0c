"""What converted models issue to a device and to a compiler."""

import pytest
import timm
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import perf_vit

VIEWS = {"view", "expand", "transpose", "permute", "slice", "select", "unsqueeze", "squeeze", "t", "unbind", "split"}
VIEWS |= {"_unsafe_view", "split_with_sizes", "alias", "detach", "as_strided", "_reshape_alias", "empty", "new_empty"}


class CountOperations(TorchDispatchMode):
    """Number of operations that aren't views; fused attention counts as one."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func._schema.name.split("::")[1] not in VIEWS
        return func(*args, **(kwargs or {}))


def operations_of_a_layer(side: int, monkeypatch, **options) -> float:
    counted = CountOperations()

    def attend(q, k, v, **_):
        counted.number += 1
        return q.new_empty(*q.shape[:-1], v.shape[-1])

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224", img_size=side, num_classes=0, depth=4).eval()
        linear = perf_vit.linearize(model, **options)
        with torch.no_grad():
            # Constants are made once for a device.
            linear(torch.empty(1, 3, side, side))
        counted.number = 0
        with torch.no_grad(), counted:
            linear(torch.empty(1, 3, side, side))
    return counted.number / 4


@pytest.mark.parametrize(("options", "most"), [({}, 60), ({"mixer": "softmax"}, 13)], ids=["clusters", "softmax"])
def test_a_device_gets_as_many_operations_at_every_size(options: dict, most: int, monkeypatch) -> None:
    numbers = {operations_of_a_layer(side, monkeypatch, **options) for side in (1024, 2048, 4096)}
    assert len(numbers) == 1
    assert numbers.pop() <= most


def test_four_sizes_above_the_limit_of_exact_attention_are_one_graph() -> None:
    kwargs = {"dynamic_img_size": True, "dynamic_img_pad": True, "num_classes": 0, "depth": 2}
    model = perf_vit.linearize(timm.create_model("vit_tiny_patch16_224", **kwargs).eval(), max_exact_tokens=100)
    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for side in (304, 384, 400, 512):
            x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(side))
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
