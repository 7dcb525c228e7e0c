import pickle

import pytest
import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import nn

from perf_vit.layers.chunked_mlp import chunk_mlps

MLPS = {"mlp": Mlp(8, 24), "glu": GluMlp(8, 24), "swiglu": SwiGLU(8, 24)}


@pytest.mark.parametrize("name", MLPS)
@pytest.mark.parametrize("length", [1, 2048, 2049, 5001])
def test_chunks_change_nothing_but_the_size_of_the_hidden_layer(name: str, length: int) -> None:
    whole, chunked = MLPS[name].eval(), pickle.loads(pickle.dumps(MLPS[name])).eval()
    chunk_mlps(chunked)
    x = torch.randn(2, length, 8, generator=torch.Generator().manual_seed(length))
    sizes = []
    chunked.act.register_forward_hook(lambda module, arguments, output: sizes.append(output.shape[1]))
    with torch.no_grad():
        torch.testing.assert_close(chunked(x), whole(x))
    assert sum(sizes) == length
    assert max(sizes) <= 2048


def test_it_is_still_the_same_kind_of_module_with_the_same_names() -> None:
    model = nn.Sequential(Mlp(8), nn.Linear(8, 8))
    names = list(model.state_dict())
    chunk_mlps(model)
    assert isinstance(model[0], Mlp)
    assert list(model.state_dict()) == names
    assert type(model[1]) is nn.Linear


def test_gradients_take_the_whole_layer_at_once() -> None:
    mlp = Mlp(8)
    expected = torch.autograd.grad(mlp(torch.ones(1, 3000, 8)).sum(), mlp.fc1.weight)[0]
    chunk_mlps(mlp)
    actual = torch.autograd.grad(mlp(torch.ones(1, 3000, 8)).sum(), mlp.fc1.weight)[0]
    assert torch.equal(actual, expected)
