"""What a user can get wrong with conversion and creation; one line says what was expected and what came."""

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import perf_vit
from perf_vit.layers import ClusteredOptions, LinearizedAttention
from perf_vit.layers.token_grid import TokenGrid
from perf_vit.ops import clustered_attention

VIT = "vit_tiny_patch16_224"
PERFORMER = "performer_vit_tiny_patch16_224"


def build(name: str = VIT, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{"depth": 2, "img_size": 64, **kwargs}).eval()


def message_of(error: pytest.ExceptionInfo[ValueError]) -> str:
    """The message, which must be one line."""
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "swin_tiny_patch4_window7_224",
        "swinv2_tiny_window8_256",
        "mvitv2_tiny",
        "hiera_tiny_224",
        "samvit_base_patch16",
        "beit_base_patch16_224",
        "vit_relpos_small_patch16_224",
        "cait_xxs24_224",
        "xcit_nano_12_p16_224",
        "vit_pwee_patch16_reg1_gap_256",
        "vit_dwee_patch16_reg1_gap_256",
    ],
)
def test_other_attention_and_none_are_refused(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match="expected a model with timm's Attention") as error:
        perf_vit.linearize(model)
    assert f"got {type(model).__name__} with none of them; attention with windows, pooling" in message_of(error)


@pytest.mark.parametrize(
    ("mixer", "options", "message"),
    [
        ("clustered", {"num_clusters": 0}, "num_clusters must be at least 1, got 0"),
        ("clustered", {"kernel": "softmax+"}, "kernel is an option of mixer='performer', got mixer='clustered'; use"),
        ("performer", {"num_clusters": 8}, "num_clusters is an option of mixer='clustered', got mixer='performer'"),
        ("softmax", {"num_sinks": 8}, "num_sinks is an option of mixer='clustered', got mixer='softmax'"),
        ("softmax", {"per_layer": {0: {"mixer": "clustered", "norms": "chi"}}}, "norms is an option of mixer='perf"),
        ("clustered", {"num_features": 8, "per_layer": {0: {"mixer": "performer"}}}, "num_features is an option of"),
    ],
)
def test_options_of_another_mixer_are_refused(mixer, options, message) -> None:
    with pytest.raises(ValueError, match=message) as error:
        perf_vit.linearize(build(), mixer, **options)
    message_of(error)


@pytest.mark.parametrize(
    ("name", "got"),
    [
        ("mobilevit_xxs", "got ByobNet with none"),
        ("csatv2", "got CSATv2 with none"),
        ("naflexvit_base_patch16_gap", "got NaFlexVit with none"),
        ("crossvit_tiny_240", "got CrossVit with ModuleList"),
        ("pit_ti_224", "got PoolingVisionTransformer with ConvEmbedding"),
    ],
)
def test_models_that_tell_no_grid_are_refused_windows_and_become_performers(name: str, got: str) -> None:
    model = timm.create_model(name).eval()
    with pytest.raises(ValueError, match="windows, sinks and local enhancement need the grid: expected ") as error:
        perf_vit.linearize(model)
    assert f"{got}; use mixer='performer'" in message_of(error)
    linear = perf_vit.linearize(model, "performer", num_features=32)
    with torch.no_grad():
        assert linear(torch.zeros(1, *model.pretrained_cfg["input_size"])).isfinite().all()


def test_two_vits_in_one_model_are_refused() -> None:
    pair = nn.ModuleList([build(), build()])
    with pytest.raises(ValueError, match="expected one ViT in ModuleList, got 2; convert each of them"):
        perf_vit.linearize(pair)


def test_linear_models_are_refused() -> None:
    for model, layer in [
        (build(PERFORMER), r"blocks\.0\.attn"),
        (perf_vit.linearize(build(features_only=True, out_indices=1)), r"blocks\.0\.attn"),
        (timm.create_model("hct_base"), r"stages\.3\.0\.attn"),
    ]:
        with pytest.raises(ValueError, match=rf"linear already \({layer}\); convert the softmax model"):
            perf_vit.linearize(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixer": "clusterd"}, r"one of clustered, .*; did you mean 'clustered'\?"),
        ({"num_sink": 8}, r"options of mixer='clustered' are .*, got 'num_sink'; did you mean 'num_sinks'\?"),
        ({"windows": 8}, r"got 'windows'; did you mean 'window_size'\?"),
        ({"num_prefix_tokens": 3}, "options must not hold num_prefix_tokens"),
        ({"layer_index": 3}, "options must not hold layer_index"),
        (
            {"mixer": "performer", "kernel": "softmax"},
            r"kernel must be one of .*, got 'softmax'; did you mean 'softmax\+'\?",
        ),
        (
            {"mixer": "performer", "kernel": "softmax-hyp+", "num_features": 33},
            r"multiple of 2 for kernel 'softmax-hyp\+' .*, got 33; try 34",
        ),
        ({"mixer": "performer", "num_features": 0}, "must be at least 1, got 0"),
        ({"mixer": "performer", "num_features": -2}, "must be at least 1, got -2"),
        ({"mixer": "performer", "num_features": 2.5}, r"num_features must be an integer, got 2\.5; pass an int"),
        ({"mixer": "performer", "num_features": "64"}, "num_features must be an integer, got '64'; pass an int"),
        ({"window_size": 7.5}, r"window_size must be an integer, got 7\.5; pass an int"),
        ({"num_sinks": -1}, "num_sinks must be at least 0, got -1"),
        ({"layers": [1, 2]}, "layers must be indices from 0 to 1, got 2; leave layers out to convert all"),
        ({"layers": [-1]}, "layers must be indices from 0 to 1, got -1"),
        ({"layers": 1}, "layers must be indices of attention layers, got 1; pass a list of integers"),
        ({"layers": "01"}, "layers must be indices of attention layers, got '01'; pass a list"),
        ({"layers": [0.5]}, r"layers must be indices of attention layers, got \[0\.5\]; pass a list"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        perf_vit.linearize(build(), **arguments)
    message_of(error)


def test_attention_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attn_drop must be 0, got 0\.1: .*; create the model with attn_drop_rate=0"):
        perf_vit.linearize(build(attn_drop_rate=0.1))


def test_a_name_is_no_model() -> None:
    with pytest.raises(ValueError, match=r"expected a model, got 'vit_tiny_patch16_224'; timm\.create_model makes one"):
        perf_vit.linearize(VIT)


@pytest.mark.parametrize(
    ("attn_kwargs", "message"),
    [
        ({"num_features": 33, "kernel": "softmax-hyp+"}, "multiple of 2 for kernel .*, got 33; try 34"),
        ({"num_features": 0}, "must be at least 1, got 0"),
        ({"num_features": -4}, "must be at least 1, got -4"),
        ({"num_features": 2.5}, r"num_features must be an integer, got 2\.5"),
        ({"seed": 0.5}, r"seed must be an integer, got 0\.5"),
        ({"num_feature": 64}, r"got 'num_feature'; did you mean 'num_features'\?"),
    ],
)
@pytest.mark.parametrize("name", [PERFORMER, "hct_base"])
def test_wrong_options_of_our_models_are_named(name: str, attn_kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        timm.create_model(name, attn_kwargs=attn_kwargs)
    message_of(error)


@pytest.mark.parametrize("grid", [(4, 4), (5, 4), (0, 15), (-3, -5), (15,), (3, 5, 1), 15, None])
def test_a_grid_that_does_not_fit_is_named(grid: object) -> None:
    q = torch.zeros(1, 1, 16, 8)
    with pytest.raises(ValueError, match=r"grid=? ?(must be )?\(rows, columns\) of the patches") as error:
        clustered_attention(q, q, q, grid=grid)
    assert "1 prefix tokens" in message_of(error)


def test_a_layer_alone_asks_for_its_grid() -> None:
    layer = LinearizedAttention(
        build().blocks[0].attn, ClusteredOptions(window_size=2, max_exact_tokens=0), TokenGrid()
    )
    x = torch.zeros(1, 15, 192)
    with pytest.raises(ValueError, match=r"the grid of 15 patch tokens, got None; .* grid\.size = \(rows, columns\)"):
        layer(x)
    layer.grid.size = (4, 4)
    with pytest.raises(ValueError, match=r"the grid of 15 patch tokens, got \(4, 4\)"):
        layer(x)
    layer.grid.size = (3, 5)
    assert layer(x).shape == x.shape


@pytest.mark.parametrize(
    ("ours", "other", "kwargs"),
    [
        (PERFORMER, "resnet18", {}),
        (PERFORMER, "swin_tiny_patch4_window7_224", {}),
        (PERFORMER, "vit_tiny_patch16_224", {"depth": 3}),
        (PERFORMER, "vit_small_patch16_224", {"depth": 2}),
        ("hct_base", "vit_tiny_patch16_224", {"depth": 1}),
    ],
)
@pytest.mark.parametrize("way", ["checkpoint_path", "pretrained_cfg_overlay"])
def test_weights_of_another_architecture_are_never_loaded(
    tmp_path: Path, ours: str, other: str, kwargs: dict, way: str
) -> None:
    path = str(tmp_path / "other.pth")
    torch.save(timm.create_model(other, **kwargs).state_dict(), path)
    size = {} if ours == "hct_base" else {"depth": 2}
    given = (
        {"checkpoint_path": path}
        if way == "checkpoint_path"
        else {"pretrained": True, "pretrained_cfg_overlay": {"file": path}}
    )
    # torch's own error, as for every timm model: it lists each name that is missing, too many or of another shape.
    with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict for (LinearVision|HighResolution)"):
        timm.create_model(ours, **size, **given)
