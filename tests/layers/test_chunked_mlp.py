import pickle

import pytest
import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from torch import nn
from torch.nn.modules import module as everywhere
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from perf_vit.layers.chunked_mlp import chunk_mlps

MLPS = {"mlp": Mlp(8, 24), "glu": GluMlp(8, 24), "swiglu": SwiGLU(8, 24)}


class Sizes(nn.Module):
    """An activation that writes down how many tokens it saw."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.act, self.seen = act, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.shape[1])
        return self.act(x)


@pytest.mark.parametrize("name", MLPS)
@pytest.mark.parametrize("length", [1, 2048, 2049, 5001])
def test_chunks_change_nothing_but_the_size_of_the_hidden_layer(name: str, length: int) -> None:
    whole, chunked = MLPS[name].eval(), pickle.loads(pickle.dumps(MLPS[name])).eval()
    chunk_mlps(chunked)
    x = torch.randn(2, length, 8, generator=torch.Generator().manual_seed(length))
    chunked.act = Sizes(chunked.act)
    with torch.no_grad():
        torch.testing.assert_close(chunked(x), whole(x))
    assert sum(chunked.act.seen) == length
    assert max(chunked.act.seen) <= 2048


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


class Same(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def wrap_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *arguments: forward(*arguments)


# Whatever looks at the calls of a module, or at its weights at each of them.
WATCHERS = {
    "forward hook": lambda mlp: mlp.register_forward_hook(lambda *_: None),
    "forward pre-hook of a layer": lambda mlp: mlp.fc1.register_forward_pre_hook(lambda *_: None),
    "forward hook of a layer": lambda mlp: mlp.act.register_forward_hook(lambda *_: None),
    "forward hook with options": lambda mlp: mlp.fc2.register_forward_hook(lambda *_: None, with_kwargs=True),
    "backward hook of a layer": lambda mlp: mlp.fc2.register_full_backward_hook(lambda *_: None),
    "backward pre-hook of a layer": lambda mlp: mlp.fc1.register_full_backward_pre_hook(lambda *_: None),
    "parametrization": lambda mlp: parametrize.register_parametrization(mlp.fc1, "weight", Same()),
    "spectral norm": lambda mlp: parametrizations.spectral_norm(mlp.fc2),
    "another forward": lambda mlp: wrap_forward(mlp.fc1),
    "global forward hook": lambda _: everywhere.register_module_forward_hook(lambda *_: None),
    "global forward pre-hook": lambda _: everywhere.register_module_forward_pre_hook(lambda *_: None),
    "global backward hook": lambda _: everywhere.register_module_full_backward_hook(lambda *_: None),
    "global backward pre-hook": lambda _: everywhere.register_module_full_backward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("name", MLPS)
@pytest.mark.parametrize("watcher", WATCHERS)
def test_whoever_watches_a_part_sees_all_tokens_at_once(watcher: str, name: str) -> None:
    mlp = pickle.loads(pickle.dumps(MLPS[name])).eval()
    if name == "swiglu":
        # The name of the first layer in the others; the module is one of its own anyway.
        mlp.fc1 = mlp.fc1_g
    chunk_mlps(mlp)
    mlp.act = Sizes(mlp.act)
    handle = WATCHERS[watcher](mlp)
    try:
        with torch.no_grad():
            mlp(torch.ones(1, 3000, 8))
    finally:
        if hasattr(handle, "remove"):
            handle.remove()
    assert mlp.act.seen == [3000]


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_of_a_checkpoint_is_that_of_its_second_pass(reentrant: bool) -> None:
    torch.manual_seed(0)
    whole = Mlp(8, 24, drop=0.5).train()
    chunked = pickle.loads(pickle.dumps(whole))
    chunk_mlps(chunked)
    outputs = []
    for mlp in (whole, chunked):
        torch.manual_seed(0)
        x = torch.ones(1, 3000, 8, requires_grad=True)
        out = checkpoint(mlp, x, use_reentrant=reentrant)
        out.sum().backward()
        outputs.append((out.detach(), x.grad))
    assert all(torch.equal(expected, got) for expected, got in zip(*outputs, strict=True))
