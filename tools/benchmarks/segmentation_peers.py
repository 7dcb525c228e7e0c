"""Other networks on the data of a segmentation config, for so much CPU time, scored like `perf-vit evaluate`.

    python tools/benchmarks/segmentation_peers.py configs/segmentation/buildings_pretrained.yaml \
        data.train.image=a.tif data.train.labels=a.geojson data.val.image=b.tif data.val.labels=b.geojson \
        --network unet-resnet34 --cpu-seconds 480 --test c.tif --test-labels c.geojson

Tiles, augmentation, loss and classes are the config's; tiles are cut to a multiple of 32 px for a U-Net. The learning
rate warms up and decays over the CPU time of the process, whatever else runs on the machine; reading, augmentation and
the backward pass count, validation and the test don't. No epoch is chosen: the weights at the end are scored. U-Nets
(segmentation_models_pytorch) begin with random weights; `--network linear --backbone FOLDER` is one linear layer on the
frozen softmax model that a folder of `perf-vit convert` holds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import segmentation_models_pytorch as smp
import torch
import typer
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
from perf_vit.models import SegmentationSpec, Segmenter
from perf_vit.models.backbone import feature_specs
from perf_vit.models.heads import LinearHead
from perf_vit.sources import open_raster
from perf_vit.tasks import SegmentationLoss
from perf_vit.types import IGNORE_INDEX
from perf_vit.workflows.progress import console
from perf_vit.workflows.reports import SegmentationEvaluation
from perf_vit.workflows.run_config import SegmentationRun
from perf_vit.workflows.segmentation import with_measured_weights

UNETS = ("unet-resnet18", "unet-resnet34")
UNET_MULTIPLE = 32
WARMUP = 0.05


class UNetHead(nn.Module):
    """A U-Net as the whole of a segmenter, whose backbone is the identity."""

    def __init__(self, encoder: str, in_chans: int, num_classes: int) -> None:
        super().__init__()
        self.unet = smp.Unet(encoder, encoder_weights=None, in_channels=in_chans, classes=num_classes)

    def forward(self, features: object, image: Tensor) -> Tensor:
        return self.unet(image)


def main(
    config: Annotated[str, typer.Argument(help="A YAML file of `perf-vit train`.")],
    network: Annotated[str, typer.Option(help=f"{', '.join(UNETS)} or linear.")],
    test: Annotated[Path, typer.Option(help="Raster to score on.")],
    test_labels: Annotated[Path, typer.Option(help="Its labels.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ..., as for `perf-vit train`.")] = None,
    cpu_seconds: Annotated[float, typer.Option(help="To train for, in CPU time of this process.")] = 480,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    backbone: Annotated[Path | None, typer.Option(help="Folder of `perf-vit convert`, for linear.")] = None,
    region: Annotated[tuple[int, int, int, int] | None, typer.Option(help="row col height width to score.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the scores here, as JSON.")] = None,
) -> None:
    """Train, score, print a table."""
    run = load_config(config, SegmentationRun, [*(overrides or []), "out=unused"])
    if network in UNETS:
        run.data.tile_px = max(1, run.data.tile_px // UNET_MULTIPLE) * UNET_MULTIPLE
    torch.manual_seed(run.seed)
    data = build_segmentation_datamodule(run.data, run.seed)
    model = build(network, data, run, backbone)
    optim = with_measured_weights(run.optim, data, multilabel=False)
    loss = SegmentationLoss(optim.loss, optim.class_weights)
    trained = list(filter(lambda each: each.requires_grad, model.parameters()))
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=run.optim.weight_decay)
    tiles, spent = train(model, data, loss, optimizer, cpu_seconds, lr)
    start = time.process_time()
    scores = score(model, run.data, test, test_labels, region)
    scores.title = f"{network}, seed {run.seed}"
    console.print(*scores.tables())
    millions = sum(each.numel() for each in model.parameters()) / 1e6
    console.print(
        f"{millions:.1f} million weights; {tiles:,} tiles of {run.data.tile_px} px in {spent:.0f} s of CPU time, "
        f"scored in {time.process_time() - start:.0f} s"
    )
    if out is not None:
        scores.to_json(out)


def build(network: str, data: SegmentationDataModule, run: SegmentationRun, folder: Path | None) -> Segmenter:
    spec = SegmentationSpec(classes=data.classes, normalizer=data.normalizer, tile_px=data.tile_px)
    in_chans, num_classes = len(data.normalizer.mean), len(data.classes)
    if network in UNETS:
        encoder = network.removeprefix("unet-")
        return Segmenter(nn.Identity(), UNetHead(encoder, in_chans, num_classes), spec, UNET_MULTIPLE)
    if network != "linear" or folder is None:
        raise typer.BadParameter(f"--network must be {', '.join(UNETS)}, or linear with --backbone; got {network}")
    vit = load_softmax(
        folder,
        features_only=True,
        out_indices=tuple(run.model.out_indices),
        img_size=data.tile_px,
        dynamic_img_size=True,
    ).requires_grad_(False)
    specs = feature_specs(vit)
    return Segmenter(vit, LinearHead(specs, in_chans, num_classes), spec, specs[0].stride)


def train(
    model: Segmenter,
    data: SegmentationDataModule,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    cpu_seconds: float,
    lr: float,
) -> tuple[int, float]:
    """Train until the time is up; tiles seen and CPU seconds spent."""
    model.train()
    tiles, start = 0, time.process_time()
    for image, labels, _ in endless(data):
        share = (time.process_time() - start) / cpu_seconds
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (share + 0.005) / WARMUP) * (1 + math.cos(math.pi * share)) / 2
        optimizer.zero_grad()
        loss(model(image), labels).backward()
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
