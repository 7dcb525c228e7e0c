"""Which code computes a call of attention, and what is said where the chosen backend can't."""

import dataclasses
import os
import subprocess
import sys
import types
import warnings

import pytest
import torch

from perf_vit.ops import attention_backend, clustered_attention, draw_projection, favor_attention, set_attention_backend
from perf_vit.ops.fused.dispatch import LIMITS, fused_attention

FAVOR = "FAVOR+ (softmax+)"


def tokens(device: str = "cpu", head_dim: int = 16, dtype: torch.dtype = torch.float32, grad: bool = False):
    shape = (1, 2, 1 + 6 * 7, head_dim)
    return [torch.ones(shape, device=device, dtype=dtype, requires_grad=grad) for _ in range(3)]


def clustered(q, k, v):
    return clustered_attention(q, k, v, (6, 7), 4, 2, 3)


def favor(q, k, v):
    return favor_attention(q, k, v, draw_projection(8, q.shape[-1]).to(q.device))


@pytest.fixture
def calls(monkeypatch):
    """Stand-ins of both backends that run on any device: names of those that were called."""
    made: list[str] = []

    def stand_in(name: str):
        def attend(q, k, v, *options):
            made.append(name)
            return v * 7

        return attend

    for name, limits in LIMITS.items():
        module = f"stand_in_for_{name}"
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(attend=stand_in(name)))
        functions = {"clustered": (module, "attend")} | ({FAVOR: (module, "attend")} if name == "triton" else {})
        other = dataclasses.replace(limits, functions=functions, package="torch", devices=("cuda", "cpu", "meta"))
        monkeypatch.setitem(LIMITS, name, other)
    return made


def limit(monkeypatch, name: str, **changes: object) -> None:
    monkeypatch.setitem(LIMITS, name, dataclasses.replace(LIMITS[name], **changes))


def test_pytorch_operations_are_the_default(calls) -> None:
    assert set_attention_backend("torch") == "torch"
    clustered(*tokens()), favor(*tokens())
    assert calls == []


@pytest.mark.parametrize(
    ("backend", "attend", "grad", "expected"),
    [
        ("triton", clustered, False, ["triton"]),
        ("triton", favor, False, ["triton"]),
        ("triton", clustered, True, []),
        ("flex", clustered, False, ["flex"]),
        ("flex", clustered, True, ["flex"]),
        ("flex", favor, True, []),
        ("torch", clustered, False, []),
        ("auto", clustered, False, []),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_backend_computes_what_it_can(calls, backend: str, attend, grad: bool, expected: list[str]) -> None:
    with attention_backend(backend):
        out = attend(*tokens(grad=grad))
    assert calls == expected
    assert (out == 7).all() == bool(expected)
    attend(*tokens())
    assert calls == expected


@pytest.mark.parametrize(
    ("changes", "options", "backend", "reason"),
    [
        ({"devices": ("cuda",)}, {}, "triton", "needs a device of type cuda, got cpu"),
        ({"package": "no_such_package"}, {}, "triton", "needs the package no_such_package, which isn't installed"),
        ({}, {"dtype": torch.float64}, "triton", "needs bfloat16, float16, float32, got float64"),
        ({}, {"head_dim": 136}, "triton", "needs heads of at most 128 channels, got 136"),
        ({"most_heads": 1}, {}, "triton", "needs at most 1 samples x heads, got 2"),
        ({}, {"grad": True}, "triton", "has no gradient; use torch.no_grad() or torch.inference_mode()"),
        ({"functions": {}}, {}, "flex", "doesn't compute clustered attention"),
    ],
)
def test_a_call_outside_the_limits_is_computed_by_pytorch_and_said_once(
    calls, monkeypatch, changes: dict, options: dict, backend: str, reason: str
) -> None:
    limit(monkeypatch, backend, **changes)
    expected = clustered(*tokens(**options))
    with attention_backend(backend), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [clustered(*tokens(**options)) for _ in range(3)]
    assert calls == []
    assert all(torch.equal(each, expected) for each in found)
    said = f"the attention backend {backend!r} {reason}; PyTorch operations compute it instead"
    assert [str(each.message) for each in caught] == [said]


def test_auto_trains_by_flex_and_predicts_by_triton_on_gpus_alone(calls, monkeypatch, recwarn) -> None:
    class OnGpu(torch.Tensor):
        """Stands for a tensor on a GPU."""

        device = torch.device("cuda")

    def on_gpu(**options):
        return [x.as_subclass(OnGpu) for x in tokens(**options)]

    with attention_backend("auto"):
        for operation, grad in (("clustered", False), ("clustered", True), (FAVOR, False), (FAVOR, True)):
            fused_attention(operation, *on_gpu(grad=grad))
        fused_attention("clustered", *tokens(grad=True))
    assert calls == ["triton", "flex", "triton"]
    assert not recwarn.list


def test_a_gpu_that_is_too_old_is_said(calls, monkeypatch) -> None:
    class OnOldGpu(torch.Tensor):
        """Stands for a tensor on a GPU of 2018."""

        is_cuda = True

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with attention_backend("triton"), pytest.warns(RuntimeWarning, match=r"capability 8\.0, got 7\.5; PyTorch"):
        assert fused_attention("clustered", *(x.as_subclass(OnOldGpu) for x in tokens())) is None
    assert calls == []


@pytest.mark.slow
def test_an_exported_graph_holds_no_kernel_that_cannot_be_captured(calls) -> None:
    class Attend(torch.nn.Module):
        def forward(self, q, k, v):
            return clustered(q, k, v)

    with attention_backend("triton"), torch.no_grad():
        torch.export.export(Attend(), tuple(tokens()))
    assert calls == []


def test_the_backend_before_returns_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="inside"), attention_backend("auto"):
        raise RuntimeError("inside")
    assert set_attention_backend("torch") == "torch"


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="must be one of torch, triton, flex, auto, got 'cudnn'"):
        set_attention_backend("cudnn")
    with pytest.raises(ValueError, match="got 'cudnn'"), attention_backend("cudnn"):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(("value", "said"), [("auto", "auto"), ("cudnn", "PERF_VIT_ATTENTION_BACKEND")])
def test_the_environment_chooses_at_the_start_of_a_process(value: str, said: str) -> None:
    code = "from perf_vit.ops import set_attention_backend as chosen; print(chosen('torch'))"
    environment = {**os.environ, "PERF_VIT_ATTENTION_BACKEND": value}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert said in (found.stdout + found.stderr)
