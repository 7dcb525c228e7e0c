"""`perf-vit init` and `config`, and the keys in the help of `train`."""

from __future__ import annotations

from importlib import resources
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from perf_vit.cli.arguments import INPUT, OUTPUT, given_options
from perf_vit.errors import extra

if TYPE_CHECKING:
    from rich.table import Table

    from perf_vit.config import ConfigKey

__all__ = ["CommandWithKeys", "config", "init"]

_TASKS = "segmentation, detection, classification, regression or slide_classification"

Task = Annotated[str, typer.Argument(metavar="TASK", help=f"{_TASKS[0].upper()}{_TASKS[1:]}.")]


def init(
    context: typer.Context,
    task: Task,
    image: Annotated[
        str, typer.Option(help="A raster, mosaic or slide, or a folder of images.", rich_help_panel=INPUT)
    ],
    labels: Annotated[
        str | None,
        typer.Option(
            help="Its labels: a mask, polygons, a label file or folder, or a CSV; folders by class need none.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    val_image: Annotated[
        str | None, typer.Option(help="Images to validate on; a part of --image by default.", rich_help_panel=INPUT)
    ] = None,
    val_labels: Annotated[str | None, typer.Option(help="Labels of --val-image.", rich_help_panel=INPUT)] = None,
    label_format: Annotated[
        str | None,
        typer.Option(help="Of labels of objects: coco, voc, yolo, ...; recognised by default.", rich_help_panel=INPUT),
    ] = None,
    attribute: Annotated[
        str | None, typer.Option(help="Column with the classes; looked for by default.", rich_help_panel=INPUT)
    ] = None,
    out: Annotated[Path, typer.Option(help="The config to write.", rich_help_panel=OUTPUT)] = Path("config.yaml"),
    run: Annotated[
        str | None, typer.Option(help="Run folder; runs/ and the config's name by default.", rich_help_panel=OUTPUT)
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a config that exists.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Write a commented config for your own images and labels, and print the next three commands."""
    from perf_vit.workflows.first_config import init
    from perf_vit.workflows.progress import say

    made = init(task, image, labels, **given_options(context, {"task", "image", "labels"}))
    say(*made.facts, "", f"config: {made.path}", *(f"list: {path}" for path in made.files), "")
    say("Next:", *(f"  {command}" for command in made.commands))


def config(
    task: Annotated[str | None, typer.Argument(metavar="TASK", help=f"{_TASKS}, or distillation.")] = None,
    every: Annotated[bool, typer.Option("--all", help="List every key, also those that are seldom set.")] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of all configs, for editors.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List the config keys of a task: type, default and meaning."""
    from dataclasses import asdict

    from perf_vit.workflows.progress import say, say_json, show

    with extra("train", "config"):
        from perf_vit.config import shipped_configs
        from perf_vit.workflows.registry import config_schema, config_schemas, task_keys

    if schema:
        say_json(config_schema())
        return
    if task is None:
        say(f"tasks: {', '.join(config_schemas())}", *shipped_configs(), "Give a task to list its keys.")
        return
    keys = task_keys(task, usual=not every)
    if json:
        say_json([asdict(key) for key in keys])
        return
    show(*_tables(keys))
    if not every:
        say(f"The usual keys; all: perf-vit config {task} --all")


def _tables(keys: list[ConfigKey]) -> list[Table]:
    """One table a section."""
    from perf_vit.workflows.progress import new_table

    columns = ("key", "type", "default", "meaning")
    tables = {group: new_table(group, columns, left=columns) for group in dict.fromkeys(key.group for key in keys)}
    for key in keys:
        tables[key.group].add_row(key.name, key.type, "required" if key.default is None else key.default, key.meaning)
    return list(tables.values())


class CommandWithKeys(TyperCommand):
    """Command whose help lists the keys of configs, by section.

    Their names are read from `help_keys.json`, which `tools/help_keys.py` writes, because the dataclasses that declare
    them import torch. Keys of tasks in other packages are listed by `perf-vit config TASK` only.
    """

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help of the command, then the names of the keys of all tasks."""
        super().format_help(ctx, formatter)
        from perf_vit.workflows.progress import new_table, show

        text = resources.files("perf_vit.cli").joinpath("help_keys.json").read_text(encoding="utf-8")
        sections = loads(text)["distill" if self.name == "distill" else "train"]
        title = "keys (perf-vit config TASK --all: type, default and meaning)"
        table = new_table(title, ("section", "keys"), left=("section", "keys"))
        for section, names in sections.items():
            table.add_row(section, ", ".join(names))
        some = any(name.endswith("*") for names in sections.values() for name in names)
        table.caption = "* of some tasks only" if some else None
        show(table)
