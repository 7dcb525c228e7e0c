"""Kinds of files: how each is damaged, and which commands read it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fuzzing import values
from fuzzing.mutations import BYTE_MUTATIONS, UNDAMAGED, Rng, mutate_png, mutate_tiff_tag
from fuzzing.workshop import SHORT, TASKS, Workshop

__all__ = ["KINDS", "Kind"]

Mutation = Callable[[bytes, bytes, Rng], bytes]
Commands = Callable[[Path, Workshop, Path, Rng], list[list[str]]]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of file.

    Attributes:
        name: for the table.
        commands: (damaged file, workshop, folder for outputs, generator) -> command lines.
        mutations: by name, those of its own beside `BYTE_MUTATIONS`.
        seeds: pattern of its valid files below the seeds' folder; all of the folder `name` if left out.
        subfolder: where the damaged file goes below the case's folder.
        siblings: whether the seeds' other files go beside it.
        weight: share of all files, relative to other kinds.
    """

    name: str
    commands: Commands
    mutations: dict[str, Mutation] = field(default_factory=dict)
    seeds: str = ""
    subfolder: str = "."
    siblings: bool = False
    weight: float = 1

    def all_mutations(self) -> dict[str, Mutation]:
        """Those of bytes, those of its own, and the control."""
        return {UNDAMAGED: lambda data, other, rng: data, **BYTE_MUTATIONS, **self.mutations}

    def find_seeds(self, folder: Path) -> list[Path]:
        """Its valid files, by name."""
        return sorted(folder.glob(self.seeds or f"{self.name}/*"))

    def place(self, seed: Path, data: bytes, case: Path) -> Path:
        """Write the damaged file where the commands look for it."""
        folder = case / self.subfolder
        folder.mkdir(parents=True, exist_ok=True)
        if self.siblings:
            shutil.copytree(seed.parent, folder, dirs_exist_ok=True)
        (folder / seed.name).write_bytes(data)
        return folder / seed.name


def _predict(shop: Workshop, task: str, image: Path | str, output: Path, *extra: str) -> list[str]:
    checkpoint = str(shop.checkpoint(task))
    return ["predict", "--checkpoint", checkpoint, "--input", str(image), "--output", str(output), *extra]


def _evaluate(shop: Workshop, task: str, image: Path | str, labels: Path, *extra: str) -> list[str]:
    checkpoint = str(shop.checkpoint(task))
    return ["evaluate", "--checkpoint", checkpoint, "--input", str(image), "--labels", str(labels), *extra]


def _train(shop: Workshop, task: str, out: Path, *overrides: str) -> list[str]:
    return ["train", str(shop.config(task)), f"out={out / 'run'}", *overrides, *SHORT]


def _one_of(rng: Rng, options: Sequence[list[str]]) -> list[str]:
    return options[int(rng.integers(len(options)))]


def _image_commands(victim: Path, shop: Workshop, out: Path, rng: Rng) -> list[list[str]]:
    uses = _label_raster_uses(victim, shop, out) if victim.stem in _ONE_BAND else _picture_uses(victim, shop, out)
    return [["info", str(victim)], _one_of(rng, uses)]


def _picture_uses(victim: Path, shop: Workshop, out: Path) -> list[list[str]]:
    has_place = victim.suffix in {".tif", ".vrt"}
    mask = shop.folder / ("mask.tif" if has_place else "mask.png")
    files = [f"data.train.image={victim}", f"data.train.labels={mask}"]
    uses = [
        _predict(shop, "segmentation", victim, out / "map.tif"),
        _predict(shop, "segmentation", victim, out / "map.tif", "--on-error", "skip", "--polygons", "geojson"),
        _predict(shop, "detection", victim, out / "found.json"),
        _predict(shop, "classification", victim, out / "classes.csv"),
        _train(shop, "segmentation", out, *files),
    ]
    if has_place:
        uses.append(_predict(shop, "segmentation", victim, out / "map.tif", "--crs", "EPSG:4326"))
        uses.append(_predict(shop, "segmentation", victim.parent, out / "map.tif", "--mosaic"))
    return uses


def _label_raster_uses(victim: Path, shop: Workshop, out: Path) -> list[list[str]]:
    # Masks of instances have their image's name.
    image = out / f"{victim.stem}.tif"
    shutil.copy(shop.image if victim.suffix == ".tif" else shop.seeds / "tiff" / "plain.tif", image)
    return [
        _evaluate(shop, "segmentation", image, victim, "--json", str(out / "scores.json")),
        _train(shop, "segmentation", out, f"data.train.image={image}", f"data.train.labels={victim}"),
        _evaluate(shop, "detection", image, victim, "--label-format", "instances"),
    ]


def _stac_commands(victim: Path, shop: Workshop, out: Path, rng: Rng) -> list[list[str]]:
    return [_predict(shop, "segmentation", victim, out / "map.tif", "--mosaic")]


def _slide_commands(victim: Path, shop: Workshop, out: Path, rng: Rng) -> list[list[str]]:
    uses = [
        _predict(shop, "segmentation", victim, out / "map.tif"),
        _predict(shop, "segmentation", victim, out / "map.tif", "--tissue", "auto", "--mpp", "1"),
        _predict(shop, "slide_classification", victim, out / "slides.csv"),
    ]
    return [["info", str(victim), "--json"], _one_of(rng, uses)]


def _list_commands(victim: Path, shop: Workshop, out: Path, rng: Rng) -> list[list[str]]:
    uses = [
        _predict(shop, "segmentation", victim, out / "maps"),
        _predict(shop, "detection", victim, out / "found"),
        _predict(shop, "classification", victim, out / "classes.csv"),
    ]
    return [_one_of(rng, uses)]


def _vector_commands(victim: Path, shop: Workshop, out: Path, rng: Rng) -> list[list[str]]:
    attribute = "classification" if victim.stem == "qupath" else "class"
    by_class = [f"data.attribute={attribute}", "data.classes=[land,ship,car]", "data.background=land"]
    uses = [
        _evaluate(shop, "segmentation", shop.image, victim),
        _train(shop, "segmentation", out, f"data.train.labels={victim}"),
        _train(shop, "segmentation", out, f"data.train.labels={victim}", *by_class),
        _evaluate(shop, "detection", shop.image, victim, "--label-format", "polygons"),
    ]
    if victim.suffix == ".geojson":
        uses.append(_predict(shop, "segmentation", shop.slide, out / "map.tif", "--tissue", str(victim)))
    return [_one_of(rng, uses)]


def _object_commands(label_format: str) -> Commands:
    def commands(victim: Path, shop: Workshop, out: Path, rng: Rng) -> list[list[str]]:
        images = shop.images if label_format in {"coco", "csv"} else shop.image
        labels = victim if label_format in {"coco", "csv"} else victim.parent
        files = [f"data.train.labels={labels}", f"data.train.image={images}"]
        as_train = ["data.val.labels", "data.val.image"]
        validated = [f"{key}={item.split('=', 1)[1]}" for key, item in zip(as_train, files, strict=True)]
        named = [f"data.train.label_format={label_format}", f"data.val.label_format={label_format}"]
        uses = [
            _evaluate(shop, "detection", images, labels, "--label-format", label_format),
            _train(shop, "detection", out, *files, *validated, *named),
        ]
        return [_one_of(rng, uses)]

    return commands


def _class_commands(victim: Path, shop: Workshop, out: Path, rng: Rng) -> list[list[str]]:
    images = f"data.train.image={shop.folder / 'classes'}"
    uses = [
        _evaluate(shop, "classification", shop.folder / "classes", victim, "--json", str(out / "scores.json")),
        _train(shop, "classification", out, images, f"data.train.labels={victim}"),
    ]
    return [_one_of(rng, uses)]


def _config_commands(victim: Path, shop: Workshop, out: Path, rng: Rng) -> list[list[str]]:
    return [["train", str(victim), f"out={out / 'run'}", *SHORT]]


def _checkpoint_commands(victim: Path, shop: Workshop, out: Path, rng: Rng) -> list[list[str]]:
    task = victim.stem
    image, output = (shop.slide, "slides.csv") if task == "slide_classification" else (shop.image, "out.csv")
    output = {"segmentation": "map.tif", "detection": "found.json"}.get(task, output)
    predict = ["predict", "--checkpoint", str(victim), "--input", str(image), "--output", str(out / output)]
    uses = [predict]
    if task == "segmentation":
        uses.append(["info", str(shop.image), "--model", str(victim)])
        labels = str(shop.folder / "mask.tif")
        uses.append(["evaluate", "--checkpoint", str(victim), "--input", str(shop.image), "--labels", labels])
    return [_one_of(rng, [predict, *uses])]


def _resume_commands(victim: Path, shop: Workshop, out: Path, rng: Rng) -> list[list[str]]:
    """Go on with a run whose last checkpoint is damaged."""
    task = victim.stem
    shutil.copytree(shop.checkpoint(task).parents[1], out / "run")
    shutil.copy(victim, out / "run" / "checkpoints" / "last.ckpt")
    overrides = [*SHORT[1:], "trainer.max_epochs=2", "resume=true"]
    return [["train", str(shop.config(task)), f"out={out / 'run'}", *overrides]]


def _folder_commands(victim: Path, shop: Workshop, out: Path, rng: Rng) -> list[list[str]]:
    config = str(shop.config(f"converted_{rng.choice(TASKS[:3])}"))
    return [["train", config, f"out={out / 'run'}", f"model.backbone={victim.parent}", *SHORT]]


# Of the seeds; the others have three bands.
_ONE_BAND = {"mask", "palette", "grey", "grey16", "bilevel"}
_JSON = {"values changed": values.mutate_json, "text changed": values.mutate_text}
_TEXT = {"text changed": values.mutate_text}
_TAGS = {"tags changed": mutate_tiff_tag}
_CHECKPOINT = {"values changed": values.mutate_checkpoint, "archive changed": values.mutate_checkpoint_member}

KINDS: tuple[Kind, ...] = (
    Kind(name="tiff", commands=_image_commands, mutations=_TAGS, weight=4),
    Kind(name="png", commands=_image_commands, mutations={"chunks changed": mutate_png}, weight=2),
    Kind(name="jpeg", commands=_image_commands, weight=2),
    Kind(name="slide", commands=_slide_commands, mutations={**_TAGS, "text changed": values.mutate_text}, weight=2),
    Kind(name="vrt", commands=_image_commands, mutations=_TEXT),
    Kind(name="stac", commands=_stac_commands, mutations=_JSON),
    Kind(name="list", commands=_list_commands, mutations=_TEXT),
    Kind(name="classes", commands=_class_commands, mutations=_TEXT),
    Kind(name="geojson", commands=_vector_commands, mutations=_JSON, weight=3),
    Kind(name="gpkg", commands=_vector_commands),
    Kind(name="parquet", commands=_vector_commands),
    Kind(name="coco", commands=_object_commands("coco"), mutations=_JSON, weight=3),
    Kind(name="voc", commands=_object_commands("voc"), mutations=_TEXT, subfolder="labels"),
    Kind(name="yolo", commands=_object_commands("yolo"), mutations=_TEXT, subfolder="labels"),
    Kind(name="dota", commands=_object_commands("dota"), mutations=_TEXT, subfolder="labels"),
    Kind(name="table", commands=_object_commands("csv"), mutations=_TEXT),
    Kind(
        name="yaml",
        commands=_config_commands,
        mutations={"values changed": values.mutate_yaml, "text changed": values.mutate_text},
        weight=3,
    ),
    Kind(name="checkpoint", commands=_checkpoint_commands, mutations=_CHECKPOINT, weight=3),
    Kind(name="resumed run", commands=_resume_commands, mutations=_CHECKPOINT, seeds="checkpoint/*"),
    Kind(
        name="model config",
        commands=_folder_commands,
        mutations=_JSON,
        seeds="model folder/config.json",
        subfolder="model",
        siblings=True,
    ),
    Kind(
        name="model weights",
        commands=_folder_commands,
        mutations={"values changed": values.mutate_safetensors},
        seeds="model folder/*.safetensors",
        subfolder="model",
        siblings=True,
    ),
)
