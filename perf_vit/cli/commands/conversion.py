"""`perf-vit convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["convert"]


def convert(
    source: Annotated[str, typer.Argument(help="A timm model, or a folder with a saved one.")],
    out: Annotated[Path, typer.Option(help="Folder for model.safetensors, config.json and fidelity.html.")],
    weights: Annotated[Path | None, typer.Option(help="Weights of the model; timm's own if left out.")] = None,
    num_classes: Annotated[int | None, typer.Option(help="Classes of the weights; 0 for none.", min=0)] = None,
    mixer: Annotated[
        str, typer.Option(help="clustered: windows, sinks and clusters; performer: FAVOR+.")
    ] = "clustered",
    window_size: Annotated[
        int | None, typer.Option(help="Largest side of a window in patches; 16 by default (clustered).")
    ] = None,
    num_sinks: Annotated[
        int | None, typer.Option(help="Keys that all see exactly; 64 to 256 by image size by default (clustered).")
    ] = None,
    num_clusters: Annotated[
        int | None, typer.Option(help="Clusters of all other keys; 96 by default (clustered).")
    ] = None,
    num_features: Annotated[int | None, typer.Option(help="Random features; 256 by default (performer).")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers to convert, as 0-5,8; all by default.")] = None,
    img_size: Annotated[int | None, typer.Option(help="Side of the images; the model's own by default.")] = None,
    images: Annotated[list[Path] | None, typer.Option(help="Image or folder to measure on; repeat it.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="Choose windows, sinks and clusters of each layer: 1.5 x plain FAVOR+'s time.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Decides projections and crops.", min=0)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model in the folder.")] = False,
    time_softmax: Annotated[bool, typer.Option("--time-softmax", help="Time softmax at any size.")] = False,
) -> None:
    """Make the attention of a pretrained ViT linear, and report what it keeps."""
    from perf_vit.cli.console import say
    from perf_vit.cli.convert import ConversionRequest, convert_model, parse_layers

    given = {
        "window_size": window_size,
        "num_sinks": num_sinks,
        "num_clusters": num_clusters,
        "num_features": num_features,
    }
    report = convert_model(
        ConversionRequest(
            source=source,
            out=out,
            weights=weights,
            num_classes=num_classes,
            mixer=mixer,
            options={name: value for name, value in given.items() if value is not None},
            layers=parse_layers(layers),
            img_size=img_size,
            images=tuple(images or ()),
            budget=budget,
            seed=seed,
            overwrite=overwrite,
            time_softmax=time_softmax,
        )
    )
    say(f"model: {out}", f"report: {report}")
