"""Class weights from the labels that a run trains on."""

from __future__ import annotations

from dataclasses import replace

from perf_vit.cli.console import new_table, say_line, show
from perf_vit.data import SegmentationDataModule, count_class_pixels
from perf_vit.errors import ConfigError
from perf_vit.tasks import SegmentationOptimConfig, balanced_weights

__all__ = ["with_measured_weights"]


def with_measured_weights(
    optim: SegmentationOptimConfig, data: SegmentationDataModule, *, multilabel: bool
) -> SegmentationOptimConfig:
    """The same with numbers in place of `class_weights: balanced`; prints them, with the pixels of each class.

    Classes without a pixel in the training labels are a warning.

    Raises:
        ConfigError: with `multilabel`, where several classes may be true at a pixel.
    """
    if optim.class_weights != "balanced":
        return optim
    if multilabel:
        raise ConfigError(
            "optim.class_weights: balanced is for classes that exclude each other; with data.multilabel, give numbers, "
            "or a loss that looks for the rare, as 'optim.loss={dice: 1}'"
        )
    pixels = count_class_pixels(data.train.sources, len(data.classes))
    weights = balanced_weights(pixels)
    table = new_table("balanced class weights", ("class", "pixels", "share", "weight"))
    for name, count, weight in zip(data.classes, pixels, weights, strict=True):
        table.add_row(name, f"{count:,}", f"{count / max(1, sum(pixels)):.3%}", f"{weight:.4g}")
    show(table)
    absent = [name for name, count in zip(data.classes, pixels, strict=True) if not count]
    if absent:
        say_line(
            "Warning",
            f"{len(absent)} of {len(pixels)} classes have no pixel in the training labels, so their weight is "
            f"1: {', '.join(absent)}",
        )
    return replace(optim, class_weights=weights)
