"""What timm asks of every registered model, after its own test-suite.

Construction and shapes are checked for all names on the meta device; whatever computes, for small models of each kind.
"""

import copy
import fnmatch
import functools
import pickle

import pytest
import timm
import torch
from timm.layers import create_feature_extractor
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

import perf_vit
from perf_vit.layers import LinearizedAttention

ROPE_VITS = timm.list_models(module="rope_vit")
VITS = [*timm.list_models(module="linear_vit"), *ROPE_VITS]
NAMES = [*VITS, *timm.list_models(module="hct")]
SMALL_VITS = [
    "performer_vit_tiny_patch8_224",
    "performer_vit_tiny_patch16_224",
    "performer_vit_small_patch14_224",
    "clustered_vit_tiny_patch16_224",
    "performer_vit_rope_small_patch16_224",
    "clustered_vit_rope_small_patch16_224",
]
SMALL = [*SMALL_VITS, "hct_base"]
# The patch size makes no difference to what these compute again, cut or record.
each_kind = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if "patch8" in name or "patch14" in name else ()) for name in SMALL],
)
# Windows and sinks that leave something to the clusters of few tokens.
SMALL_ATTENTION = {"max_exact_tokens": 0, "window_size": 3, "num_sinks": 4, "num_clusters": 8}
# A multiple of each patch size, non-square.
SIZE = (112, 224)
META = {"device": "meta", "dtype": torch.float32}


def build(name: str, size: tuple[int, int] = SIZE, model_seed: int = 0, **kwargs) -> nn.Module:
    vit_kwargs = {"img_size": size, "depth": 2} if name in VITS else {}
    if name.startswith("clustered"):
        vit_kwargs["attn_kwargs"] = SMALL_ATTENTION
    torch.manual_seed(model_seed)
    model = timm.create_model(name, **{"num_classes": 7, **vit_kwargs, **kwargs}).eval()
    for key, parameter in model.named_parameters():
        # New rotary models add 1e-5 of each block, and their heads start near 0: nothing that a test would see.
        if "gamma_" in key:
            nn.init.constant_(parameter, 0.5)
        elif name in ROPE_VITS and key.endswith("head.weight"):
            nn.init.normal_(parameter, std=0.02)
    return model


def images(size: tuple[int, int] = SIZE, in_chans: int = 3, device: str = "cpu") -> torch.Tensor:
    generator = None if device == "meta" else torch.Generator().manual_seed(1)
    return torch.randn(2, in_chans, *size, generator=generator, device=device)


def patch_size_of(name: str) -> int:
    return int(name.split("_")[-2].removeprefix("patch"))


def num_prefix_tokens_of(name: str) -> int:
    return 5 if name in ROPE_VITS else 1


def feature_shape(name: str, num_features: int) -> tuple[int, ...]:
    """Shape of `forward_features` of two images: prefix and patch tokens, or a map of stride 128."""
    if name not in VITS:
        return 2, num_features, 1, 2
    patch_size = patch_size_of(name)
    return 2, num_prefix_tokens_of(name) + SIZE[0] // patch_size * (SIZE[1] // patch_size), num_features


def wrapped_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict as the wrapper for features names it."""
    return {f"model.{key}": value for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", NAMES)
def test_default_cfg_names_layers_that_exist(name: str) -> None:
    model = timm.create_model(name, **META)
    cfg, shapes = model.default_cfg, {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert cfg["architecture"] == name
    assert shapes[f"{cfg['classifier']}.weight"] == (cfg["num_classes"], model.num_features)
    assert shapes[f"{cfg['first_conv']}.weight"][1] == cfg["input_size"][0]
    assert model.num_classes == cfg["num_classes"]
    assert model.get_classifier() is model.get_submodule(cfg["classifier"])
    assert len(cfg["mean"]) == len(cfg["std"]) == cfg["input_size"][0]
    # Everything is made on the device that was asked for.
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("name", NAMES)
def test_heads_and_features_have_the_promised_shapes(name: str) -> None:
    model, x = build(name, **META), images(device="meta")
    features = model.forward_features(x)
    assert features.shape == feature_shape(name, model.num_features)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model.forward_head(features).shape == (2, 7)


@pytest.mark.parametrize("name", SMALL)
def test_a_new_classifier_has_the_promised_shapes(name: str) -> None:
    model, x = build(name, **META), images(device="meta")
    pooled = 2, model.head_hidden_size
    assert model(x).shape == (2, 7)
    model.reset_classifier(0)
    assert model(x).shape == build(name, num_classes=0, **META)(x).shape == pooled
    model.reset_classifier(3)
    assert model.num_classes == 3
    # The ViT of our oldest timm makes every new classifier on the CPU.
    model.to("meta")
    assert model(x).shape == (2, 3)
    model.reset_classifier(0, "")
    unpooled = build(name, num_classes=0, global_pool="", **META)(x).shape
    assert model(x).shape == unpooled == feature_shape(name, model.num_features)


# The ViTs have this from timm, from one version on.
@pytest.mark.parametrize("name", [name for name in NAMES if name not in VITS])
def test_a_new_classifier_is_like_the_other_parameters(name: str) -> None:
    model = build(name, **META).to(torch.float64).requires_grad_(False)
    model.reset_classifier(0, "")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.reset_classifier(5, "avg")
    assert all((p.dtype, p.is_meta) == (torch.float64, True) for p in model.get_classifier().parameters())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_argument_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match="not_an_argument"):
        timm.create_model(name, not_an_argument=1, **META)


def test_optimizers_scale_the_rate_of_a_converted_model_by_depth() -> None:
    model = perf_vit.linearize(
        timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=7, **META), local_enhancement=True
    )
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    named = {id(parameter): key for key, parameter in model.named_parameters()}
    scales = {named[id(p)]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert sorted(scales) == sorted(named.values())
    expected = {"patch_embed.proj.weight": 0.125, "blocks.0.attn.qkv.weight": 0.25, "blocks.1.attn.qkv.weight": 0.5}
    assert {key: scales[key] for key in expected} == expected
    assert scales["head.weight"] == 1
    assert all(
        scales[key] == scales[f"blocks.{key.split('.')[1]}.attn.qkv.weight"] for key in scales if "local_" in key
    )


@pytest.mark.parametrize("name", NAMES)
def test_optimizers_take_the_models_groups(name: str) -> None:
    model = build(name, **META)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    named = {id(parameter): key for key, parameter in model.named_parameters()}
    decays = {named[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert sorted(decays) == sorted(named.values())
    tokens = {key for key in decays if key in {"cls_token", "reg_token", "pos_embed"}}
    assert {key for key, decay in decays.items() if not decay} == tokens | {
        key for key, parameter in model.named_parameters() if parameter.ndim <= 1
    }


@pytest.mark.parametrize("name", NAMES)
def test_layer_decay_grows_from_the_stem_to_the_head(name: str) -> None:
    model = build(name, **META)
    excluded = model.no_weight_decay()
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=excluded, layer_decay=0.5)
    named = {id(parameter): parameter_name for parameter_name, parameter in model.named_parameters()}
    scales = {named[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert sorted(scales) == sorted(named.values())
    assert sum(len(group["params"]) for group in groups) == len(named)

    cfg = model.default_cfg
    blocks = [scale for key, scale in scales.items() if key.startswith(("blocks.", "stages."))]
    assert scales[f"{cfg['classifier']}.weight"] == 1
    assert scales[f"{cfg['first_conv']}.weight"] == min(scales.values()) < blocks[0]
    assert scales["norm.weight"] == blocks[-1] == 0.5
    assert blocks == sorted(blocks)
    assert len(set(blocks)) == (2 if name in VITS else 10)

    undecayed = {named[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    listed = {key for key in scales if any(fnmatch.fnmatch(key, pattern) for pattern in excluded)}
    assert undecayed == listed | {key for key, p in model.named_parameters() if p.ndim <= 1}


@pytest.mark.parametrize("name", SMALL)
def test_shapes_follow_a_change_of_dtype(name: str) -> None:
    model = build(name, **META).to(torch.bfloat16)
    assert model(images(device="meta").bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("in_chans", [1, 4, 13])
@pytest.mark.parametrize("name", SMALL)
def test_any_number_of_channels(name: str, in_chans: int) -> None:
    model = build(name, in_chans=in_chans)
    assert model.get_parameter(f"{model.default_cfg['first_conv']}.weight").shape[1] == in_chans
    with torch.no_grad():
        assert model(images(in_chans=in_chans)).isfinite().all()


@pytest.mark.parametrize("name", SMALL)
def test_forward_is_head_of_features(name: str) -> None:
    model = build(name)
    with torch.no_grad():
        features = model.forward_features(images())
        pooled = model.forward_head(features, pre_logits=True)
        assert torch.equal(model(images()), model.forward_head(features))
        torch.testing.assert_close(model(images()), model.get_classifier()(pooled))
        model.reset_classifier(0)
        assert torch.equal(model(images()), pooled)


@each_kind
def test_features_only_gives_the_maps_of_out_indices(name: str) -> None:
    whole = build(name)
    with torch.no_grad():
        expected = whole.forward_intermediates(images(), intermediates_only=True)
        for out_indices in [(0,), (0, -1), (1,)]:
            model = build(name, features_only=True, out_indices=out_indices, num_classes=None)
            model.load_state_dict(wrapped_state(whole), strict=False)
            maps, info = model(images()), model.feature_info
            assert len(maps) == len(info.channels()) == len(out_indices)
            for index, each, channels, stride in zip(out_indices, maps, info.channels(), info.reduction(), strict=True):
                assert torch.equal(each, expected[index])
                assert each.shape == (2, channels, *(-(-length // stride) for length in SIZE))


@pytest.mark.parametrize("name", SMALL)
def test_intermediates_are_those_of_the_forward_pass(name: str) -> None:
    model = build(name)
    with torch.no_grad():
        final, maps = model.forward_intermediates(images(), norm=True)
        assert torch.equal(final, model.forward_features(images()))
        assert torch.equal(model.forward_head(final), model(images()))
        assert len(maps) == len(model.feature_info)
        last = maps[-1].flatten(2).mT if name in VITS else maps[-1]
        assert torch.equal(last, final[:, num_prefix_tokens_of(name) :] if name in VITS else final)
        assert torch.equal(model.forward_intermediates(images(), 1, norm=True, intermediates_only=True)[0], maps[-1])


@each_kind
def test_pruning_keeps_the_maps_and_no_unused_parameter(name: str) -> None:
    model = build(name)
    last = len(model.feature_info) - 1
    with torch.no_grad():
        maps = model.forward_intermediates(images(), intermediates_only=True)
    for index in range(last + 1):
        pruned = copy.deepcopy(model)
        kept = pruned.prune_intermediate_layers([index], prune_norm=True)
        (alone,) = pruned.forward_intermediates(images(), indices=kept, intermediates_only=True)
        (early,) = model.forward_intermediates(images(), indices=[index], stop_early=True, intermediates_only=True)
        assert torch.equal(alone, maps[index])
        assert torch.equal(early, maps[index])
        (alone.square().sum() + pruned(images()).square().sum()).backward()
        assert [key for key, p in pruned.named_parameters() if p.grad is None] == []
    kept_head = copy.deepcopy(model)
    kept_head.prune_intermediate_layers([last], prune_head=False)
    assert torch.equal(kept_head(images()), model(images()))


@each_kind
def test_every_parameter_gets_a_finite_gradient(name: str) -> None:
    model = build(name).train()
    model(images()).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@each_kind
def test_gradient_checkpointing_changes_neither_output_nor_gradients(name: str) -> None:
    results = []
    for enable in (False, True):
        model = build(name).train()
        model.set_grad_checkpointing(enable)
        outputs = [model(images()), *model.forward_intermediates(images(), intermediates_only=True)]
        sum(each.square().sum() for each in outputs).backward()
        results.append([*(each.detach() for each in outputs), *(p.grad for p in model.parameters())])
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*results, strict=True))


@pytest.mark.parametrize("name", SMALL_VITS)
def test_input_size_can_change_afterwards(name: str) -> None:
    model = build(name)
    model.set_input_size((168, 112) if patch_size_of(name) == 14 else (128, 176))
    size = tuple(model.patch_embed.img_size)
    assert model(images(size)).shape == (2, 7)
    assert model(images(size)).isfinite().all()
    model.set_input_size(img_size=(112, 168), patch_size=(28, 14))
    assert model(images((112, 168))).shape == (2, 7)
    assert model(images((112, 168))).isfinite().all()


@pytest.mark.parametrize("name", SMALL_VITS)
@torch.no_grad()
def test_images_of_any_size_go_through_one_model(name: str) -> None:
    dynamic, fixed = (build(name, dynamic_img_size=dynamic) for dynamic in (True, False))
    # On the way back to a size, nothing of the other ones is left.
    for size in (SIZE, (224, 112), (112, 336), SIZE):
        resized = copy.deepcopy(fixed)
        resized.set_input_size(size)
        torch.testing.assert_close(dynamic(images(size)), resized(images(size)))


@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_copies_and_pickles_give_the_same_output(name: str) -> None:
    model = build(name)
    expected = model(images())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(images()), expected)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=()
            if name in {"performer_vit_tiny_patch16_224", "clustered_vit_tiny_patch16_224"}
            else pytest.mark.slow,
        )
        for name in SMALL
        if "patch8" not in name and "patch14" not in name
    ],
)
@torch.no_grad()
def test_dynamo_takes_a_model_as_one_graph(name: str) -> None:
    model = build(name)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), model(images()))


@each_kind
def test_traced_graph_equals_eager_bit_for_bit(name: str) -> None:
    model = build(name)
    head = model.default_cfg["classifier"]
    traced = create_feature_extractor(model, [head])
    with torch.no_grad():
        assert torch.equal(traced(images())[head], model(images()))
    traced(images())[head].square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# TorchScript's compiler takes no autograd.Function, keyword-only dataclass or registry of kernels, all of which the
# attention is made of, and torch has put it aside for `torch.export`; its tracer records what is computed.
@pytest.mark.filterwarnings("ignore")
@each_kind
def test_torchscript_records_a_model_but_does_not_compile_it(name: str) -> None:
    model = build(name)
    # On some processors oneDNN takes another kernel for a recorded convolution, which rounds otherwise.
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        traced = torch.jit.trace(model, images(), check_trace=False)
        assert torch.equal(traced(images()[:1]), model(images()[:1]))
    with pytest.raises((RuntimeError, ValueError)):
        torch.jit.script(model)


@pytest.mark.parametrize("name", SMALL)
def test_a_model_saves_its_parameters_and_no_projection(name: str) -> None:
    model, twin = build(name), build(name, model_seed=3)
    assert not any("projection" in key for key in model.state_dict())
    twin.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(twin(images()), model(images()))
    assert any(isinstance(module, LinearizedAttention) for module in model.modules())


@pytest.mark.parametrize(
    "check",
    [
        test_a_new_classifier_has_the_promised_shapes,
        test_shapes_follow_a_change_of_dtype,
        test_forward_is_head_of_features,
        test_features_only_gives_the_maps_of_out_indices,
        test_intermediates_are_those_of_the_forward_pass,
        test_pruning_keeps_the_maps_and_no_unused_parameter,
        test_every_parameter_gets_a_finite_gradient,
        test_gradient_checkpointing_changes_neither_output_nor_gradients,
        test_input_size_can_change_afterwards,
        test_images_of_any_size_go_through_one_model,
        test_copies_and_pickles_give_the_same_output,
        test_dynamo_takes_a_model_as_one_graph,
        test_traced_graph_equals_eager_bit_for_bit,
    ],
)
@pytest.mark.parametrize("mixer", ["linformer", "reformer", "s4", "h3", "windowed", "registers"])
@pytest.mark.slow
def test_a_model_with_another_mixer_keeps_the_contract(mixer: str, check, monkeypatch) -> None:
    monkeypatch.setitem(globals(), "build", functools.partial(build, mixer=mixer))
    check("performer_vit_tiny_patch16_224")
