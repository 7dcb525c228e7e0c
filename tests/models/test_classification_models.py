"""Networks for whole images, and for slides as bags."""

from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import perf_vit
from perf_vit.errors import ConfigError
from perf_vit.models import (
    CHECKPOINT_KEY,
    ClassificationModelConfig,
    ClassificationSpec,
    Classifier,
    LoraConfig,
    SlideClassificationModelConfig,
    SlideClassificationSpec,
    build_classifier,
    build_slide_classifier,
    checkpoint_metadata,
    load_classifier,
    pretrained_statistics,
)
from perf_vit.models.slide_classification import GatedAttentionPool
from perf_vit.transforms import Normalizer

SMALL = {"depth": 1, "embed_dim": 64, "num_heads": 2}
BACKBONES = {
    "performer_vit_tiny_patch16_224": SMALL,
    "clustered_vit_tiny_patch16_224": SMALL,
    "vit_tiny_patch16_224": SMALL,
    "performer_vit_rope_small_patch16_224": SMALL,
    "hct_base": {},
    "resnet10t": {},
}
TOKENS = [name for name in BACKBONES if "vit" in name]


def test_a_backbone_may_be_named_with_the_tag_of_its_weights() -> None:
    assert make("vit_tiny_patch16_224.augreg_in21k")(torch.zeros(1, 4, 48, 48)).shape == (1, 3)
    with pytest.raises(ConfigError, match="nothing_of_the_kind"):
        make("vit_tiny_patch16_224.nothing_of_the_kind")


def make(backbone: str, *, kind: str = "single_label", tile_px: int = 48, **options) -> Classifier:
    spec = ClassificationSpec(
        kind=kind,
        classes=("a", "b", "c"),
        normalizer=Normalizer((0.0,) * 4, (1.0,) * 4),
        tile_px=tile_px,
        target_mean=(1.0, 2.0, 3.0) if kind == "regression" else (),
        target_std=(1.0, 10.0, 100.0) if kind == "regression" else (),
    )
    config = ClassificationModelConfig(backbone=backbone, backbone_kwargs=BACKBONES.get(backbone, {}), **options)
    return build_classifier(config, spec)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("pool", [None, "avg", "token", "map"])
def test_any_backbone_takes_the_pools_that_it_has_and_refuses_others(backbone, pool) -> None:
    if pool in ("token", "map") and backbone not in TOKENS:
        with pytest.raises(ConfigError, match=f"model.pool {pool} doesn't go with {backbone}"):
            make(backbone, pool=pool)
        return
    torch.manual_seed(0)
    model = make(backbone, pool=pool).eval()
    image = torch.randn(2, 4, 48, 48)
    logits = model(image)
    assert logits.shape == (2, 3)
    # Every part of the image counts, so another corner gives other logits.
    image[0, :, 32:, 32:] += 1
    # Layer scales begin small, so a class token hears little of it at first.
    assert not torch.equal(model(image)[0], logits[0])
    assert torch.equal(model(image)[1], logits[1])


@pytest.mark.parametrize("backbone", ["performer_vit_tiny_patch16_224", "resnet10t"])
def test_a_frozen_backbone_stays_as_it_is_and_what_follows_is_trained(backbone) -> None:
    model = make(backbone, freeze_backbone=True, drop_rate=0.1, pool="map" if "vit" in backbone else None).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(4, 4, 48, 48)).square().sum().backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("head" in name or "attn_pool" in name or ".fc." in name for name in changed)


def trained_names(model: Classifier) -> set[str]:
    model.train()(torch.randn(4, 4, 48, 48)).square().sum().backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_the_last_blocks_are_trained_with_what_is_on_top(pool, monkeypatch) -> None:
    monkeypatch.setitem(BACKBONES, "vit_tiny_patch16_224", {**SMALL, "depth": 3})
    model = make("vit_tiny_patch16_224", trainable_blocks=1, pool=pool)
    names = trained_names(model)
    on_top = ("network.head", "network.norm", "network.fc_norm", "network.attn_pool")
    assert {name for name in names if not name.startswith(on_top)} == {
        name for name, _ in model.named_parameters() if name.startswith("network.blocks.2")
    }
    assert "network.head.weight" in names
    assert [block.training for block in model.network.blocks] == [False, False, True]
    assert not model.is_backbone_frozen
    assert make("vit_tiny_patch16_224", freeze_backbone=True, pool=pool).is_backbone_frozen


def test_the_last_blocks_of_convolutions_are_trained_without_the_statistics_of_the_others() -> None:
    model = make("resnet10t", trainable_blocks=1)
    before = {name: value.clone() for name, value in model.network.named_buffers() if "running" in name}
    assert {name.split(".")[1] for name in trained_names(model)} == {"layer4", "fc"}
    changed = {
        name for name, value in model.network.named_buffers() if "running" in name and (value != before[name]).any()
    }
    assert changed
    assert all(name.startswith("layer4") for name in changed)


def test_checkpointed_activations_change_nothing() -> None:
    torch.manual_seed(0)
    plain, again = make("vit_tiny_patch16_224"), make("vit_tiny_patch16_224", grad_checkpointing=True)
    again.load_state_dict(plain.state_dict())
    image = torch.randn(2, 4, 48, 48)
    for model in (plain, again):
        model.train()(image).square().sum().backward()
    assert again.network.grad_checkpointing
    for ours, theirs in zip(again.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_low_rank_additions_are_trained_with_what_is_on_top_and_load_as_the_plain_network(tmp_path: Path) -> None:
    pytest.importorskip("peft", exc_type=ImportError, reason="pip install perf-vit[peft]")
    torch.manual_seed(0)
    model = make("vit_tiny_patch16_224", lora=LoraConfig(rank=2), pool="map")
    names = trained_names(model)
    assert all(".lora_" in name or "head" in name or "attn_pool" in name for name in names)
    assert {"network.head.weight", "network.attn_pool.q.weight"} <= names
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    config = ClassificationModelConfig(
        backbone="vit_tiny_patch16_224", backbone_kwargs=SMALL, lora=LoraConfig(rank=2), pool="map"
    )
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    path = tmp_path / "best.ckpt"
    torch.save({CHECKPOINT_KEY: checkpoint_metadata(config, model), "state_dict": state}, path)
    loaded = load_classifier(path)
    assert not any("lora" in name for name in loaded.state_dict())
    image = torch.randn(2, 4, 48, 48)
    torch.testing.assert_close(loaded(image), model.eval()(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_a_converted_folder_keeps_its_weights_under_any_pool(tmp_path: Path, pool: str) -> None:
    teacher = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=48, **SMALL)
    folder = tmp_path / "converted"
    perf_vit.save_converted(perf_vit.linearize(teacher), folder)
    spec = ClassificationSpec(
        kind="multilabel", classes=("a", "b"), normalizer=Normalizer((0.0,) * 3, (1.0,) * 3), tile_px=32
    )
    config = ClassificationModelConfig(backbone=str(folder), pool=pool)
    model = build_classifier(config, spec)
    assert torch.equal(model.network.blocks[0].attn.qkv.weight, teacher.blocks[0].attn.qkv.weight)
    assert torch.equal(model.network.norm.weight, teacher.norm.weight)
    # Of a checkpoint, the folder may be gone.
    again = build_classifier(ClassificationModelConfig(backbone="gone", pool=pool), spec, model.saved_backbone)
    again.load_state_dict(model.state_dict())
    image = torch.randn(1, 3, 32, 32)
    assert torch.allclose(again.eval()(image), model.eval()(image), atol=1e-5)


def test_scores_are_probabilities_or_numbers_in_their_unit() -> None:
    logits = torch.tensor([[0.0, 1.0, -2.0]])
    assert make("resnet10t").scores(logits).sum().item() == pytest.approx(1)
    assert torch.allclose(make("resnet10t", kind="multilabel").scores(logits), logits.sigmoid())
    numbers = make("resnet10t", kind="regression")
    assert numbers.scores(logits).tolist() == [[1, 12, -197]]
    assert torch.allclose(numbers.standardised(numbers.scores(logits)), logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile_px": 50}, "multiple of the patch size 16, got 50; try 48"),
        ({"pool": "mean"}, "model.pool must be one of token, avg"),
        ({"trainable_blocks": 2}, "trainable_blocks must be 1 to 1"),
        ({"freeze_backbone": True, "lora": LoraConfig()}, "model.freeze_backbone and model.lora both select"),
    ],
)
def test_what_doesnt_fit_is_a_config_error(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        make("performer_vit_tiny_patch16_224", **options)


def test_statistics_of_pretraining_are_for_pixels_of_8_bits() -> None:
    assert pretrained_statistics("resnet10t").mean[0] == pytest.approx(255 * 0.485)


def test_gated_attention_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    pool = GatedAttentionPool(5, 3).double()
    bag = torch.randn(1, 7, 5, dtype=torch.float64)
    pooled, attention = pool(bag, torch.ones(1, 7, dtype=torch.bool))
    logits = []
    for h in bag[0]:
        gated = torch.tanh(pool.value.weight @ h + pool.value.bias) * torch.sigmoid(
            pool.gate.weight @ h + pool.gate.bias
        )
        logits.append((pool.weight.weight @ gated + pool.weight.bias)[0])
    expected = torch.stack(logits).softmax(0)
    assert torch.allclose(attention[0].double(), expected, atol=1e-6)
    assert torch.allclose(pooled[0], (expected[:, None] * bag[0]).sum(0), atol=1e-6)


def make_slide_classifier(**options) -> torch.nn.Module:
    spec = SlideClassificationSpec(classes=("a", "b"), normalizer=Normalizer((0.0,) * 3, (1.0,) * 3), tile_px=32)
    config = SlideClassificationModelConfig(
        **{
            "backbone": "performer_vit_tiny_patch16_224",
            "backbone_kwargs": SMALL,
            "hidden_dim": 16,
            "attention_dim": 8,
            **options,
        }
    )
    return build_slide_classifier(config, spec)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_a_bag_says_the_same_alone_in_any_order_and_padded_among_others(sizes, seed) -> None:
    torch.manual_seed(seed)
    model = make_slide_classifier().eval()
    bags = [torch.randn(size, 64) for size in sizes]
    padded = torch.full((len(sizes), max(sizes) + 2, 64), 7.0)
    mask = torch.zeros(padded.shape[:2], dtype=torch.bool)
    for row, bag in enumerate(bags):
        padded[row, : len(bag)], mask[row, : len(bag)] = bag, True
    with torch.inference_mode():
        logits, attention = model(padded, mask)
        for row, bag in enumerate(bags):
            order = torch.randperm(len(bag))
            alone, weights = model(bag[order][None], torch.ones(1, len(bag), dtype=torch.bool))
            assert torch.allclose(alone[0], logits[row], atol=1e-5)
            assert torch.allclose(weights[0], attention[row, : len(bag)][order], atol=1e-5)
    assert not attention[~mask].any()
    assert torch.allclose(attention.sum(1), torch.ones(len(sizes)), atol=1e-5)


def test_the_encoder_is_never_trained_and_its_id_is_of_its_weights() -> None:
    torch.manual_seed(0)
    model = make_slide_classifier().train()
    assert not model.encoder.training
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())
    assert model.embed(torch.randn(2, 3, 32, 32)).shape == (2, model.embed_dim)
    before = model.encoder_id()
    with torch.no_grad():
        model.classifier.weight.add_(1)
    assert model.encoder_id() == before
    with torch.no_grad():
        next(model.encoder.parameters()).add_(1e-3)
    assert model.encoder_id() != before


def test_the_id_of_an_encoder_is_also_that_of_settings_without_weights() -> None:
    small = {"depth": 1, "embed_dim": 64, "num_heads": 2}
    choices = [
        {},
        *({"pool": pool} for pool in ("avg", "max", "avgmax")),
        {"backbone_kwargs": small | {"num_heads": 4}},
        {"backbone_kwargs": small | {"pool_include_prefix": True}, "pool": "avg"},
    ]

    def id_of(options: dict) -> str:
        torch.manual_seed(0)
        given = {"backbone": "vit_tiny_patch16_224", "backbone_kwargs": small}
        return make_slide_classifier(**(given | options)).encoder_id()

    assert len({id_of(options) for options in choices}) == len(choices)
    assert id_of({"pool": "token"}) == id_of({}), "token is the ViT's own pooling"


def test_a_pool_with_weights_is_no_pool_of_an_encoder() -> None:
    with pytest.raises(ConfigError, match="use token or avg"):
        make_slide_classifier(pool="map")
