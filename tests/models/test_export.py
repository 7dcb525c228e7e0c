"""Backbones outside Python: exported programs and ONNX files give what the model gives."""

from pathlib import Path

import pytest
import timm
import torch

import perf_vit  # noqa: F401  (registers the backbones)

KERNELS = ["softmax+", "softmax-hyp+", "relu", "oprf"]


def backbone(kernel: str, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    attn_kwargs = {"kernel": kernel, **kwargs}
    model = timm.create_model(
        "performer_vit_tiny_patch16_224", img_size=112, num_classes=5, depth=3, attn_kwargs=attn_kwargs
    )
    return model.eval()


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 112, 112, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "kernel", [pytest.param(kernel, marks=() if kernel == "softmax+" else pytest.mark.slow) for kernel in KERNELS]
)
@torch.no_grad()
def test_an_exported_backbone_equals_the_model_at_any_batch_size(kernel: str) -> None:
    model = backbone(kernel)
    batch = torch.export.Dim("batch", min=2, max=8)
    exported = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(images(5)), model(images(5)), rtol=1e-4, atol=1e-4)


FAMILY = {
    "clustered_vit_tiny_patch16_224": {"max_exact_tokens": 0, "window_size": 3, "num_sinks": 4},
    "performer_vit_tiny_patch16_224": {"local_enhancement": True},
    "performer_vit_rope_small_patch16_224": {},
}


def sibling(name: str) -> torch.nn.Module:
    """A model of the family, with parameters that are 0 or near it at first drawn anew."""
    torch.manual_seed(0)
    model = timm.create_model(
        name, img_size=112, dynamic_img_size=False, num_classes=5, depth=2, attn_kwargs=FAMILY[name]
    )
    for key, parameter in model.named_parameters():
        if "gamma_" in key or "local_enhancement" in key or key == "head.weight":
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if "clustered" in name else pytest.mark.slow) for name in FAMILY]
)
@torch.no_grad()
def test_a_program_of_one_size_equals_every_kind_of_model(name: str) -> None:
    model = sibling(name)
    exported = torch.export.export(model, (images(),)).module()
    torch.testing.assert_close(exported(images()), model(images()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if "rope" in name else pytest.mark.slow) for name in FAMILY]
)
@torch.no_grad()
def test_an_onnx_file_of_one_size_equals_every_kind_of_model(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install perf-vit[export]")
    model, path = sibling(name), tmp_path / "model.onnx"
    torch.onnx.export(model, (images(),), path, dynamo=True, opset_version=18, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: images().numpy()})
    torch.testing.assert_close(torch.from_numpy(out), model(images()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ("softmax+", {"center": True, "balance": True}),
        *(pytest.param(kernel, {}, marks=pytest.mark.slow) for kernel in KERNELS),
    ],
)
@torch.no_grad()
def test_an_onnx_backbone_equals_the_model(kernel: str, options: dict, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install perf-vit[export]")
    model, path = backbone(kernel, **options), tmp_path / "model.onnx"
    torch.onnx.export(model, (images(),), path, dynamo=True, opset_version=18, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: images().numpy()})
    torch.testing.assert_close(torch.from_numpy(out), model(images()), rtol=1e-4, atol=1e-4)
