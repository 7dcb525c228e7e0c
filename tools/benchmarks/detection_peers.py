"""torchvision's detectors, trained on the data of a config for as much CPU time, and scored by the same code.

    python tools/benchmarks/detection_peers.py configs/detection/cells_bccd.yaml --minutes 8 --model fcos \
        --test-images BCCD/JPEGImages --test-labels BCCD/Annotations --test-list test.txt \
        data.train.image=BCCD/JPEGImages data.train.labels=BCCD/Annotations data.train.names=train.txt ...

The data part of the config and its overrides decide images, split, tiles, augmentation and batches; the network is
torchvision's with its defaults: a ResNet with FPN, 256 channels, weights from scratch. The learning rate follows a
cosine over the budget, and the validation images choose among the states of four moments. Test images are searched
whole. `--zoom` resizes tiles and images alike: 800 px, torchvision's default, is a zoom of 1.67 for images of 480 px.
Objects that are ignored in a tile are left out of its labels.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.resnet import resnet18, resnet50
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from perf_vit.config import load_config
from perf_vit.data import DetectionDataConfig, build_detection_datamodule, read_names
from perf_vit.data.detection_tiles import DetectionBatch
from perf_vit.labels.objects import objects_in, read_object_labels
from perf_vit.metrics import DetectionMetrics, DetectionScores
from perf_vit.sources import open_source
from perf_vit.types import Detections, ObjectLabels
from perf_vit.workflows.progress import console, detection_table, errors
from perf_vit.workflows.run_config import DetectionRun

NUM_VALIDATIONS = 4
WARM_UP = 0.05
# Of a validation tile, as torchvision has it, and of a test image, which may hold more objects.
DETECTIONS_VAL, DETECTIONS_TEST = 100, 400
BACKBONES = {"resnet18": resnet18, "resnet50": resnet50}


def main(
    config: Annotated[str, typer.Argument(help="A detection config.")],
    test_images: Annotated[Path, typer.Option(help="Folder of the test images.")],
    test_labels: Annotated[list[Path], typer.Option(help="Labels, in the training images' format; repeat it.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Of the config, as key=value.")] = None,
    test_list: Annotated[Path | None, typer.Option(help="Names of the test images; all by default.")] = None,
    model: Annotated[str, typer.Option(help="fcos, faster_rcnn or mask_rcnn.")] = "fcos",
    backbone: Annotated[str, typer.Option(help="resnet18 or resnet50.")] = "resnet18",
    minutes: Annotated[float, typer.Option(help="CPU time of the process for training and validation.")] = 8.0,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 5e-4,
    zoom: Annotated[float, typer.Option(help="Tiles and images are resized by this factor.")] = 1.0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Autocast to bfloat16, convolutions channels-last.")] = False,
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file for the scores; the weights go beside it.")] = None,
) -> None:
    """Train a peer and print its scores on the test images."""
    options = load_config(config, DetectionRun, [*(overrides or []), "out=unused", f"seed={seed}"])
    torch.manual_seed(seed)
    peer = Peer(model, backbone, len(options.data.classes), zoom, bf16=bf16)
    training = Training(peer, options.data, lr, 60 * minutes, seed)
    training.run()
    names = None if test_list is None else read_names(test_list, "--test-list")
    title = f"{model} {backbone}, zoom {zoom:g}, lr {lr:g}{', bf16' if bf16 else ''}, seed {seed}"
    report: dict[str, Any] = {"title": title, "seconds": training.seconds, "val_ap50": training.history}
    console.print(
        f"{training.num_tiles:,} tiles in {training.seconds:.0f} s CPU, {training.val_seconds:.0f} s of it validation; "
        f"validation AP50 {' '.join(f'{score:.3f}' for score in training.history)}"
    )
    for labels in test_labels:
        scores = score_images(peer, training, test_images, labels, options.data, names)
        console.print(*detection_table(scores, title=f"{title}: {labels.name}"), sep="\n")
        report[labels.name] = scores.to_dict()
    if out is not None:
        out.write_text(json.dumps(report, indent=2) + "\n")
        torch.save(peer.state_dict(), out.with_suffix(".pth"))


class Peer(nn.Module):
    """A torchvision detector that takes standardised images and perf_vit's labels.

    Args:
        name: fcos, faster_rcnn or mask_rcnn.
        backbone: resnet18 or resnet50.
        num_classes: without background.
        zoom: images are resized by this factor.
        bf16: autocast to bfloat16.
    """

    def __init__(self, name: str, backbone: str, num_classes: int, zoom: float, *, bf16: bool) -> None:
        super().__init__()
        self.name = name
        self.zoom = zoom
        self.bf16 = bf16
        self.model = build_peer(name, backbone, num_classes)
        if bf16:
            self.model.to(memory_format=torch.channels_last)

    def set_detections(self, number: int) -> None:
        part = self.model if self.name == "fcos" else self.model.roi_heads
        part.detections_per_img = number

    @property
    def kind(self) -> str:
        return "masks" if self.name == "mask_rcnn" else "boxes"

    def losses(self, images: list[Tensor], labels: list[ObjectLabels]) -> Tensor:
        self._set_size(images[0])
        with self._autocast():
            losses: dict[str, Tensor] = self.model(images, [self._target(each) for each in labels])
        return torch.stack(list(losses.values())).sum()

    @torch.inference_mode()
    def detect(self, image: Tensor) -> Detections:
        self._set_size(image)
        with self._autocast():
            found = self.model([image])[0]
        scores, labels = found["scores"].float(), found["labels"] - self._first_class
        if self.kind == "masks":
            return Detections(scores=scores, labels=labels, masks=found["masks"][:, 0] > 0.5)
        return Detections(scores=scores, labels=labels, boxes_xyxy=found["boxes"].float())

    @property
    def _first_class(self) -> int:
        return 0 if self.name == "fcos" else 1

    def _target(self, labels: ObjectLabels) -> dict[str, Tensor]:
        keep = np.flatnonzero(~labels.ignored)
        target = {
            "boxes": torch.from_numpy(labels.boxes_xyxy[keep]),
            "labels": torch.from_numpy(labels.labels[keep]) + self._first_class,
        }
        if self.kind == "masks":
            assert labels.masks is not None
            target["masks"] = torch.from_numpy(labels.masks[keep]).to(torch.uint8)
        return target

    def _set_size(self, image: Tensor) -> None:
        shortest = round(self.zoom * min(image.shape[-2:]))
        self.model.transform.min_size, self.model.transform.max_size = (shortest,), 10**6

    def _autocast(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16)


def build_peer(name: str, backbone: str, num_classes: int) -> nn.Module:
    """The networks of torchvision's builders, for any ResNet; the images are standardised already."""
    shared: dict[str, Any] = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    body = BACKBONES[backbone](weights=None)
    if name == "fcos":
        levels = _resnet_fpn_extractor(body, 5, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))
        return FCOS(levels, num_classes, detections_per_img=DETECTIONS_VAL, **shared)
    levels = _resnet_fpn_extractor(body, 5)
    detector = {"faster_rcnn": FasterRCNN, "mask_rcnn": MaskRCNN}[name]
    return detector(levels, num_classes + 1, box_detections_per_img=DETECTIONS_VAL, **shared)


class Training:
    """Trains a peer within a budget of CPU time, validation included, and leaves it with its best weights.

    Args:
        peer: the network.
        data: images, tiles and augmentation.
        lr: peak learning rate.
        budget: CPU seconds of this process.
        seed: of the data.
    """

    def __init__(self, peer: Peer, data: DetectionDataConfig, lr: float, budget: float, seed: int) -> None:
        self.peer = peer
        self.classes = data.classes
        self.data = build_detection_datamodule(data, seed)
        self.optimizer = torch.optim.AdamW(peer.parameters(), lr=lr, weight_decay=0.05)
        self.lr = lr
        self.budget = budget
        self.history: list[float] = []
        self.num_tiles = 0
        self.seconds = self.val_seconds = 0.0

    def run(self) -> None:
        start, best = time.process_time(), -1.0
        weights = copy.deepcopy(self.peer.state_dict())
        for images, labels, _ in self._batches():
            share = (time.process_time() - start) / self.budget
            done = len(self.history)
            due = (done + 1) / NUM_VALIDATIONS
            if done == NUM_VALIDATIONS - 1:
                # The last validation belongs to the budget.
                due -= self.val_seconds / done / self.budget
            if share >= due:
                self.history.append(self._validate())
                if self.history[-1] > best:
                    best, weights = self.history[-1], copy.deepcopy(self.peer.state_dict())
            if len(self.history) == NUM_VALIDATIONS:
                break
            self._step(images, labels, share)
        self.seconds = time.process_time() - start
        self.peer.load_state_dict(weights)
        self.peer.eval()

    def _batches(self) -> Iterator[DetectionBatch]:
        loader = self.data.train_dataloader()
        for epoch in range(10**6):
            loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
            yield from loader

    def _step(self, images: list[Tensor], labels: list[ObjectLabels], share: float) -> None:
        factor = min(1.0, share / WARM_UP) if share < WARM_UP else (1 + math.cos(math.pi * min(share, 1.0))) / 2
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * max(factor, 1e-3)
        loss = self.peer.train().losses(images, labels)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.peer.parameters(), 1.0)
        self.optimizer.step()
        self.num_tiles += len(images)

    def _validate(self) -> float:
        start = time.process_time()
        self.peer.eval()
        metrics = DetectionMetrics(self.classes, self.peer.kind)  # type: ignore[arg-type]
        for images, labels, _ in self.data.val_dataloader():
            metrics.update([self.peer.detect(image) for image in images], labels)
        ap50 = metrics.compute().ap50
        self.val_seconds += time.process_time() - start
        return 0.0 if math.isnan(ap50) else ap50


def score_images(
    peer: Peer, training: Training, images: Path, labels: Path, data: DetectionDataConfig, names: Iterable[str] | None
) -> DetectionScores:
    """Scores on whole images, as `perf-vit evaluate` gives them for our checkpoints."""
    index = read_object_labels(
        labels,
        images,
        label_format=data.train.label_format,
        classes=data.classes,
        skip_classes=data.skip_classes,
        names=None if names is None else list(names),
    )
    peer.set_detections(DETECTIONS_TEST)
    metrics = DetectionMetrics(data.classes, peer.kind)  # type: ignore[arg-type]
    for record in index:
        with errors.status(Path(record.path).name):
            source = open_source(record.path, bands=data.bands)
            pixels = training.data.normalizer(source.read(record.extent))
            source.close()
            found = peer.detect(torch.from_numpy(pixels))
        metrics.update([found], [objects_in(record, record.extent, min_visible=0.0)])
    return metrics.compute()


if __name__ == "__main__":
    typer.run(main)
