"""The option `chunk_size` of mixers: memory, and nothing else."""

import pytest
import timm
import torch
from attention_cases import assert_same, value_and_gradients
from torch.utils._python_dispatch import TorchDispatchMode

import perf_vit
from perf_vit.conversion import load_converted, save_converted
from perf_vit.layers import ClusteredOptions, PerformerOptions
from perf_vit.layers.mixer import make_mixer
from perf_vit.ops import clustered_attention

CLUSTERED = {"max_exact_tokens": 0, "window_size": 4, "num_sinks": 5, "num_clusters": 7}
OPTIONS = {
    "clustered": (ClusteredOptions, CLUSTERED),
    "no windows": (ClusteredOptions, {**CLUSTERED, "window_size": 0}),
    "performer": (PerformerOptions, {"num_features": 32, "center": True, "balance": True}),
    "oprf": (PerformerOptions, {"num_features": 32, "kernel": "oprf"}),
}
SIDE = 19


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that an operation writes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not function.is_view:
            self.elements = max(self.elements, out.numel())
        return out


def make_tokens(side: int = SIDE, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 2, 3, 1 + side * side, 16, generator=generator, dtype=dtype).unbind(0)


def attention(name: str, chunk_size: int | None):
    kind, options = OPTIONS[name]
    mixer = make_mixer(kind(**options, num_prefix_tokens=1, chunk_size=chunk_size), head_dim=16)
    return lambda q, k, v: mixer(q, k, v, (SIDE, SIDE))


@pytest.mark.parametrize("name", OPTIONS)
def test_chunks_change_neither_values_nor_gradients(name: str) -> None:
    q, k, v = make_tokens()
    whole = value_and_gradients(attention(name, 10**6), q, k, v)
    for chunk_size in (None, 1, 100, 197):
        assert_same(value_and_gradients(attention(name, chunk_size), q, k, v), whole, 1e-9)
        with torch.no_grad():
            torch.testing.assert_close(attention(name, chunk_size)(q, k, v), whole[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mixer", ["clustered", "performer"])
def test_small_chunks_need_less_memory(mixer: str, grad: bool) -> None:
    kind, options = OPTIONS[mixer]
    largest = []
    for chunk_size in (10**6, 256):
        options = {**options, "num_features": 128} if mixer == "performer" else options
        attend = make_mixer(kind(**options, num_prefix_tokens=1, chunk_size=chunk_size), head_dim=16)
        q, k, v = make_tokens(64, torch.float32)
        with LargestTensor() as measured:
            if grad:
                value_and_gradients(lambda *qkv, attend=attend: attend(*qkv, (64, 64)), q, k, v)
            else:
                attend(q, k, v, (64, 64))
        largest.append(measured.elements)
    assert largest[1] <= 0.6 * largest[0]


@pytest.mark.parametrize("mixer", ["clustered", "performer"])
def test_a_model_keeps_its_chunk_size(mixer: str, tmp_path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=2, num_classes=0).eval()
    options = {"chunk_size": 12, **({"max_exact_tokens": 0} if mixer == "clustered" else {})}
    loaded = load_converted(save_converted(perf_vit.linearize(model, mixer, **options), tmp_path / "saved"))
    assert [block.attn.options.chunk_size for block in loaded.blocks] == [12, 12]
    x = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    whole = perf_vit.linearize(model, mixer, **{**options, "chunk_size": None})
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), whole(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", ["clustered", "performer"])
@pytest.mark.parametrize(("value", "message"), [(0, "chunk_size must be at least 1, got 0"), (1.5, "an integer")])
def test_a_chunk_that_is_no_number_of_tokens_is_refused(mixer: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perf_vit.linearize(timm.create_model("vit_tiny_patch16_224", depth=1), mixer, chunk_size=value)


def test_the_operation_refuses_a_chunk_without_tokens() -> None:
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        clustered_attention(*make_tokens(), (SIDE, SIDE), chunk_size=0)
