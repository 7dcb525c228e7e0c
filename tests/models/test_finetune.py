"""Which parts of a backbone are trained, low-rank additions, and activations that are computed again."""

from dataclasses import replace

import pytest
import torch

from perf_vit.errors import ConfigError, MissingPackageError
from perf_vit.models import (
    CHECKPOINT_KEY,
    ClassificationModelConfig,
    ClassificationSpec,
    DetectionModelConfig,
    DetectionSpec,
    LoraConfig,
    SegmentationModelConfig,
    SegmentationSpec,
    build_classifier,
    build_detector,
    build_segmenter,
    checkpoint_metadata,
    load_detector,
    load_segmenter,
)
from perf_vit.models.finetune import merge_lora
from perf_vit.transforms import Normalizer

STATISTICS = Normalizer((0.0,) * 3, (1.0,) * 3)
TINY = SegmentationModelConfig(
    backbone="performer_vit_tiny_patch16_224",
    backbone_kwargs={"depth": 3, "embed_dim": 24, "attn_kwargs": {"num_features": 8}},
    out_indices=[0, 2],
    head="linear",
)
SPEC = SegmentationSpec(classes=("a", "b"), normalizer=STATISTICS, tile_px=32)


def images(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_the_last_blocks_are_trained_and_the_others_evaluated() -> None:
    config = replace(TINY, backbone_kwargs={**TINY.backbone_kwargs, "drop_path_rate": 0.5}, trainable_blocks=1)
    model = build_segmenter(config, SPEC).train()
    model(images()).square().mean().backward()
    blocks = model.backbone.model.blocks
    assert [any(p.grad is not None for p in block.parameters()) for block in blocks] == [False, False, True]
    assert [block.training for block in blocks] == [False, False, True]
    assert all(p.grad is None for p in model.backbone.model.patch_embed.parameters())
    assert not model.is_backbone_frozen
    assert build_segmenter(replace(TINY, freeze_backbone=True), SPEC).is_backbone_frozen


def test_frozen_norms_keep_weights_and_statistics_of_a_segmenter_and_a_classifier() -> None:
    config = replace(TINY, backbone="resnet18", backbone_kwargs={}, out_indices=[1, 2], freeze_norms=True)
    segmenter = build_segmenter(config, SPEC)
    spec = ClassificationSpec(kind="single_label", classes=("a", "b"), normalizer=STATISTICS, tile_px=32)
    classifier = build_classifier(ClassificationModelConfig(backbone="resnet18", freeze_norms=True), spec)
    for model, backbone in ((segmenter, segmenter.backbone), (classifier, classifier.network)):
        model.train()
        before = {name: value.clone() for name, value in backbone.named_buffers()}
        model(images()).sum().backward()
        assert before
        assert all(torch.equal(value, before[name]) for name, value in backbone.named_buffers())
        assert {name for name, p in backbone.named_parameters() if p.requires_grad and ".bn" in f".{name}"} == set()
        assert backbone.conv1.weight.grad is not None


def test_the_last_stages_of_a_convolutional_backbone_are_trained_without_the_statistics_of_the_others() -> None:
    config = replace(TINY, backbone="resnet18", backbone_kwargs={}, out_indices=[1, 2], trainable_blocks=1)
    model = build_segmenter(config, SPEC).train()
    backbone = model.backbone
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    model(images()).sum().backward()
    changed = {name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("layer2.") for name in changed)
    assert {n.split(".")[0] for n, p in backbone.named_parameters() if p.requires_grad} == {"layer2"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainable_blocks": 4}, "trainable_blocks must be 1 to 3"),
        ({"trainable_blocks": 0}, "trainable_blocks must be 1 to 3"),
        (
            {"freeze_backbone": True, "trainable_blocks": 1},
            "model.freeze_backbone and model.trainable_blocks both",
        ),
        ({"trainable_blocks": 1, "lora": LoraConfig()}, "model.trainable_blocks and model.lora both select"),
        ({"freeze_backbone": True, "lora": LoraConfig()}, "model.freeze_backbone and model.lora both select"),
        ({"freeze_norms": True}, "^model.freeze_norms: LinearVisionTransformer has no batch norms; leave it out$"),
    ],
)
def test_options_that_do_not_fit_are_one_line(change, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build_segmenter(replace(TINY, **change), SPEC)


def test_without_peft_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(MissingPackageError, match=r'^model\.lora needs peft, .*pip install "perf-vit\[peft\]"$'):
        build_segmenter(replace(TINY, lora=LoraConfig()), SPEC)


@pytest.mark.parametrize(
    ("backbone", "kwargs"), [(TINY.backbone, TINY.backbone_kwargs), ("hct_base", {"attn_kwargs": {"num_features": 8}})]
)
def test_checkpointed_activations_give_the_same_gradients_from_fewer_stored_values(backbone, kwargs) -> None:
    config = replace(TINY, backbone=backbone, backbone_kwargs=kwargs, out_indices=[0, 2])
    gradients, stored = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build_segmenter(replace(config, grad_checkpointing=checkpointing), SPEC).double()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: (sizes.append(t.numel()), t)[1], lambda t: t
        ):
            loss = model(images(64).double()).square().mean()
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        stored.append(sum(sizes))
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-12)
    assert stored[1] < 0.6 * stored[0]


def lora_segmenter(**changes):
    pytest.importorskip("peft", exc_type=ImportError, reason="pip install perf-vit[peft]")
    torch.manual_seed(0)
    config = replace(TINY, lora=LoraConfig(rank=2, alpha=6.0), **changes)
    return config, build_segmenter(config, SPEC)


def trained(model, step) -> None:
    """A few steps, after which the additions are no longer zero."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        step().backward()
        optimizer.step()


def test_low_rank_additions_are_all_of_the_backbone_that_is_trained() -> None:
    _, model = lora_segmenter()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained(model, lambda: model(images()).square().mean())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    in_backbone = {name for name in changed if name.startswith("backbone.")}
    assert in_backbone
    assert all(".lora_" in name for name in in_backbone)
    assert {name.split(".attn.")[1].split(".")[0] for name in in_backbone} == {"qkv", "proj"}
    assert len(in_backbone) == 3 * 2 * 2
    assert changed - in_backbone


def test_a_checkpoint_with_low_rank_additions_loads_as_the_plain_network(tmp_path) -> None:
    config, model = lora_segmenter()
    trained(model, lambda: model(images()).square().mean())
    path = tmp_path / "best.ckpt"
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({CHECKPOINT_KEY: checkpoint_metadata(config, model), "state_dict": state}, path)
    loaded = load_segmenter(path)
    assert not any("lora" in name for name in loaded.state_dict())
    plain = build_segmenter(TINY, SPEC)
    assert list(loaded.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(loaded(images()), model.eval()(images()), rtol=1e-5, atol=1e-5)


def test_a_detector_with_low_rank_additions_loads_as_the_plain_network(tmp_path) -> None:
    pytest.importorskip("peft", exc_type=ImportError, reason="pip install perf-vit[peft]")
    config = DetectionModelConfig(
        backbone=TINY.backbone, backbone_kwargs=TINY.backbone_kwargs, out_indices=[2], strides=[8], channels=64,
        head_kwargs={"num_convs": 1}, lora=LoraConfig(targets=["qkv"]),
    )  # fmt: skip
    model = build_detector(config, DetectionSpec(classes=("a",), normalizer=STATISTICS, tile_px=32))
    trained(model, lambda: sum(level.square().mean() for level in model._levels(images())[0]))
    path = tmp_path / "best.ckpt"
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({CHECKPOINT_KEY: checkpoint_metadata(config, model), "state_dict": state}, path)
    loaded = load_detector(path)
    for ours, theirs in zip(loaded._levels(images())[0], model.eval()._levels(images())[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_merged_weights_are_the_sum_of_weights_and_scaled_additions() -> None:
    weight, a, b = torch.randn(4, 3), torch.randn(2, 3), torch.randn(4, 2)
    state = {"x.base_layer.weight": weight, "x.base_layer.bias": torch.ones(4), "y.weight": torch.zeros(1),
             "x.lora_B.default.weight": b, "x.lora_A.default.weight": a}  # fmt: skip
    merged = merge_lora(state, LoraConfig(rank=2, alpha=8.0))
    assert list(merged) == ["x.weight", "x.bias", "y.weight"]
    torch.testing.assert_close(merged["x.weight"], weight + 4 * b @ a)


def test_a_backbone_without_the_layers_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"model\.lora\.targets must be layers of the attention, \[\]"):
        lora_segmenter(backbone="resnet18", backbone_kwargs={}, out_indices=[1])


def test_eva_takes_no_additions_to_its_queries() -> None:
    pytest.importorskip("peft", exc_type=ImportError, reason="pip install perf-vit[peft]")
    eva = {"backbone": "eva02_tiny_patch14_224", "backbone_kwargs": {"depth": 1}}
    eva = replace(TINY, **eva, out_indices=[0], lora=LoraConfig())
    with pytest.raises(ConfigError, match="doesn't support LoRA of qkv"):
        build_segmenter(eva, replace(SPEC, tile_px=28))
