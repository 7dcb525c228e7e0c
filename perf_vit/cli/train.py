"""`perf-vit train`, `fit-tile` and `distill`."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["distill", "fit_tile", "train"]


def train(
    config: Annotated[str, typer.Argument(help="A YAML file, or a shipped one: configs/segmentation/buildings.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ..., as in data.tile_px=512")] = None,
) -> None:
    """Train a model from a config file and key=value overrides."""
    from perf_vit.workflows.progress import say, show_log
    from perf_vit.workflows.train import train

    show_log()
    run = train(config, overrides)
    say(f"best checkpoint: {run.best}")
    if (report := run.folder / "report.html").exists():
        say(f"report: {report}")


def fit_tile(
    config: Annotated[str, typer.Argument(help="A YAML file, or a shipped one, whose data are there.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ..., as in 'model.lora={rank: 8}'")] = None,
    memory: Annotated[str | None, typer.Option(help="16GB, 500MB, ...; what is free now by default.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Tiles a step; the config's by default.", min=1)] = None,
    max_tile: Annotated[int, typer.Option(help="The largest side to try, in pixels.", min=1)] = 8192,
) -> None:
    """Find the largest tile that a config can be trained on, by training a little on growing ones."""
    from perf_vit.workflows.progress import say
    from perf_vit.workflows.train import fit_tile

    def on_measured(tile_px: int, peak_bytes: int | None) -> None:
        say(f"{tile_px} px: " + ("out of memory" if peak_bytes is None else f"{peak_bytes / 1e9:.2f} GB"))

    found = fit_tile(
        config, overrides, memory=memory, batch_size=batch_size, max_tile=max_tile, on_measured=on_measured
    )
    say(
        f"largest tile: data.tile_px={found.tile_px}, {found.peak_bytes / 1e9:.2f} of {found.memory_bytes / 1e9:.2f} GB"
    )


def distill(
    config: Annotated[
        str, typer.Argument(help="A YAML file, or a shipped one: configs/distillation/vit_small_dinov2.yaml")
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ..., as in optim.max_minutes=20")] = None,
) -> None:
    """Train the linear copy of a pretrained ViT to give its tokens, on images without labels."""
    from perf_vit.workflows.distill import distill
    from perf_vit.workflows.progress import say, show_log

    show_log()
    run = distill(config, overrides)
    say(f"student: {run.best}")
