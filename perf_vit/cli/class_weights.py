"""Class weights from the labels that a run trains on."""

from __future__ import annotations

from dataclasses import replace

from rich.markup import escape
from rich.table import Table

from perf_vit.cli.console import console, errors
from perf_vit.data import WindowDataModule, count_class_pixels
from perf_vit.errors import ConfigError
from perf_vit.tasks import OptimConfig, balanced_weights

__all__ = ["with_measured_weights"]


def with_measured_weights(optim: OptimConfig, data: WindowDataModule, *, multilabel: bool) -> OptimConfig:
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
    table = Table(title="balanced class weights")
    for column in ("class", "pixels", "share", "weight"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for name, count, weight in zip(data.classes, pixels, weights, strict=True):
        table.add_row(escape(name), f"{count:,}", f"{count / max(1, sum(pixels)):.3%}", f"{weight:.4g}")
    console.print(table)
    absent = [name for name, count in zip(data.classes, pixels, strict=True) if not count]
    if absent:
        errors.print(
            f"Warning: {len(absent)} of {len(pixels)} classes have no pixel in the training labels, so their weight is "
            f"1: {', '.join(absent)}",
            markup=False,
            soft_wrap=True,
        )
    return replace(optim, class_weights=weights)
