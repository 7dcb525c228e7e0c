"""Which packages each module imports, and what is said where an extra isn't installed."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Names of modules where they differ from those of their distributions.
MODULES = {
    "openslide-python": "openslide",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "segmentation-models-pytorch": "segmentation_models_pytorch",
}
# What a requirement brings and we import too.
BROUGHT = {
    "geopandas": {"pyproj", "pandas"},
    "timm": {"filelock", "huggingface_hub", "yaml", "PIL"},
    "albumentations": {"cv2"},
    # On Linux, where it runs on GPUs.
    "torch": {"triton"},
}


def modules_of(requirements: list[str]) -> set[str]:
    """Modules of requirements, and of the extras of ours that they name."""
    found: set[str] = set()
    for line in requirements:
        name, extras = re.match(r"([\w-]+)(?:\[([\w,]+)\])?", line).groups()
        if name == "perf-vit":
            for extra in extras.split(","):
                found |= modules_of(PROJECT["optional-dependencies"][extra])
        else:
            found |= {MODULES.get(name, name.replace("-", "_")), *BROUGHT.get(name, ())}
    return found


CORE = modules_of(PROJECT["dependencies"])
EXTRAS = {
    name: modules_of(PROJECT["optional-dependencies"][name])
    for name in ("geo", "train", "slides", "ray", "export", "peft", "wandb", "all")
}


@cache
def trees() -> dict[str, ast.Module]:
    """Every module of the package by its name."""
    found = {}
    for path in (ROOT / "perf_vit").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def statements(body: list[ast.stmt], *, in_functions: bool) -> Iterator[ast.stmt]:
    """Imports that run with a module, or also those of its functions; those for type checkers never run."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from statements(node.orelse, in_functions=in_functions)
        elif in_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "finalbody"):
                yield from statements(getattr(node, field, []), in_functions=in_functions)
            for handler in getattr(node, "handlers", []):
                yield from statements(handler.body, in_functions=in_functions)


@cache
def imported(module: str, *, in_functions: bool = False) -> set[str]:
    """Modules that a module imports by name."""
    found = set()
    for node in statements(trees()[module].body, in_functions=in_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def closure(module: str) -> set[str]:
    """Packages of others that are imported with a module, its parents and all that they import."""
    waiting, seen, others = [module], set(), set()
    while waiting:
        name = waiting.pop()
        if name.partition(".")[0] != "perf_vit":
            others.add(name.partition(".")[0])
        elif name in trees() and name not in seen:
            seen.add(name)
            waiting += [*imported(name), *([name.rpartition(".")[0]] if "." in name else [])]
    return others - set(sys.stdlib_module_names)


NEEDS = {
    "core": (
        "perf_vit.backbones",
        "perf_vit.cli.main",
        "perf_vit.conversion",
        "perf_vit.transforms",
        "perf_vit.workflows.load",
        "perf_vit.workflows.progress",
    ),
    "geo": (
        "perf_vit.config",
        "perf_vit.geometry",
        "perf_vit.inference",
        "perf_vit.labels",
        "perf_vit.models",
        "perf_vit.plotting",
        "perf_vit.reporting",
        "perf_vit.sources",
        "perf_vit.workflows.convert",
        "perf_vit.workflows.info",
        "perf_vit.workflows.predict",
        "perf_vit.writers",
    ),
}


@pytest.mark.parametrize(("extra", "module"), [(extra, name) for extra, names in NEEDS.items() for name in names])
def test_a_module_needs_no_packages_but_those_of_its_extra(extra: str, module: str) -> None:
    assert closure(module) - CORE - EXTRAS.get(extra, set()) == set()
    if extra == "geo":
        assert closure(module) - CORE != set()


def test_no_module_imports_slides_ray_or_exporters_before_they_are_used() -> None:
    early = {module: closure(module) - CORE - EXTRAS["train"] for module in trees()}
    assert {module: packages for module, packages in early.items() if packages} == {}


def test_triton_is_imported_with_fused_kernels_only() -> None:
    needing = {module for module in trees() if "triton" in closure(module)}
    assert {module for module in needing if not module.startswith("perf_vit.ops.fused.")} == set()


def test_every_imported_package_belongs_to_an_extra() -> None:
    names = {name.partition(".")[0] for module in trees() for name in imported(module, in_functions=True)}
    assert names - set(sys.stdlib_module_names) - {"perf_vit"} - CORE - EXTRAS["all"] == set()


def test_all_is_all_and_train_contains_geo() -> None:
    assert EXTRAS["geo"] < EXTRAS["train"]
    assert EXTRAS["all"] == set().union(*(EXTRAS[name] for name in EXTRAS if name != "all"))


def test_every_extra_that_is_named_exists() -> None:
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "perf_vit").rglob("*.py")]
    named = re.findall(
        r"""perf-vit\[([\w,]+)\]|\bextra\("(\w+)\"""", "".join(path.read_text(encoding="utf-8") for path in texts)
    )
    names = {name for pair in named for name in "".join(pair).split(",")}
    assert {"geo", "train", "slides", "ray", "export", "peft", "wandb"} <= names
    assert names <= PROJECT["optional-dependencies"].keys()


# Finds no module of the given packages, as if they weren't installed.
WITHOUT = """
import json, sys
from importlib.machinery import PathFinder
missing = set(json.loads(sys.argv[1]))
class Installed(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in missing else super().find_spec(name, path, target)
sys.meta_path[:] = [Installed if each is PathFinder else each for each in sys.meta_path]
"""
SAY = """
import contextlib, io
from perf_vit.errors import MissingPackageError
said = {}
def call(name, function):
    try:
        function()
    except MissingPackageError as error:
        said[name] = str(error)
def command(*args):
    from perf_vit.cli.main import run
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            run(list(args))
    except SystemExit as end:
        said[args[0]] = f"{end.code}: {err.getvalue().strip()}"
"""


def run_without(missing: set[str], script: str, folder: Path) -> dict[str, str]:
    """What a script leaves in `said`, run where packages are missing."""
    code = WITHOUT + SAY + script + "\nprint(json.dumps(said))"
    command = [sys.executable, "-c", code, json.dumps(sorted(missing))]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def lines(needs: dict[str, tuple[str, str]], start: str = "") -> dict[str, str]:
    """Patterns of the errors of calls that need an extra."""
    return {
        name: rf'{start}{re.escape(what)} needs \w+, which isn\'t installed; pip install "perf-vit\[{extra}\]"'
        for name, (what, extra) in needs.items()
    }


TRAINING = {
    "init": ("init", "train"),
    "train": ("training", "train"),
    "evaluate": ("evaluation", "train"),
    "distill": ("distillation", "train"),
}
TRAINING_COMMANDS = {
    **TRAINING,
    "config": ("config", "train"),
    "fit-tile": ("training", "train"),
    "demo": ("the demo", "train"),
}
READING = {"predict": ("prediction", "geo"), "convert": ("convert", "geo")}
COMMANDS = """
command("init", "segmentation", "--image", "a.tif", "--labels", "b.tif")
command("config", "segmentation")
command("train", "segmentation/buildings")
command("fit-tile", "segmentation/buildings")
command("distill", "distillation/vit_small_dinov2")
command("evaluate", "--checkpoint", "best.ckpt", "--input", "a.tif", "--labels", "b.tif")
command("demo")
"""


def test_the_core_makes_models_linear_and_each_call_and_command_names_its_extra(tmp_path) -> None:
    script = """
import timm, torch, perf_vit
assert timm.is_model("performer_vit_tiny_patch16_224")
linear = perf_vit.linearize(timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=3))
perf_vit.save_converted(linear, "linear")
same = perf_vit.load("linear")
image = torch.rand(1, 3, 64, 64)
assert torch.equal(linear.eval()(image), same(image))
open("best.ckpt", "w").close()
call("load", lambda: perf_vit.load("best.ckpt"))
for name in ("init", "train", "evaluate", "distill", "predict", "convert", "open", "InputSpec"):
    call(name, lambda: getattr(perf_vit, name))
said = {"." + name: line for name, line in said.items()}
command("predict", "--checkpoint", "best.ckpt", "--input", "a.tif", "--output", "b.tif")
command("convert", "vit_tiny_patch16_224", "--out", "other")
command("info", "a.tif")
"""
    said = run_without((EXTRAS["all"] | {"cv2", "pandas"}) - CORE, script + COMMANDS, tmp_path)
    packages = {"open": ("perf_vit.sources", "geo"), "InputSpec": ("perf_vit.models", "geo")}
    needs = {**TRAINING, **READING, **packages, "load": ("a checkpoint", "geo")}
    calls = {f".{name}": need for name, need in needs.items()}
    commands = {**TRAINING_COMMANDS, **READING, "info": ("info", "geo")}
    expected = lines(calls) | lines(commands, "2: Error: ")
    assert said.keys() == expected.keys()
    assert [line for name, line in said.items() if not re.fullmatch(expected[name], line)] == []


@pytest.mark.slow
def test_geo_predicts_with_a_trained_model_and_training_names_its_extra(tmp_path) -> None:
    script = """
import numpy as np, perf_vit, rasterio, torch
from perf_vit import models
from perf_vit.transforms import Normalizer
with rasterio.open("a.tif", "w", driver="GTiff", width=50, height=40, count=3, dtype="uint8", crs="EPSG:32637",
                   transform=rasterio.Affine(2, 0, 4e5, 0, -2, 4.5e6)) as file:
    file.write(np.random.default_rng(0).integers(0, 255, (3, 40, 50), np.uint8))
config = models.SegmentationModelConfig(
    backbone="performer_vit_tiny_patch16_224", out_indices=[0], head="linear",
    backbone_kwargs={"depth": 1, "embed_dim": 64, "num_heads": 2},
)
normalizer = Normalizer((100.0,) * 3, (50.0,) * 3)
spec = models.SegmentationSpec(classes=("rest", "ship"), normalizer=normalizer, tile_px=32)
network = models.build_segmenter(config, spec)
state = {f"model.{name}": value for name, value in network.state_dict().items()}
torch.save({"state_dict": state, models.CHECKPOINT_KEY: models.checkpoint_metadata(config, network)}, "best.ckpt")
with contextlib.redirect_stdout(io.StringIO()):
    command("predict", "--checkpoint", "best.ckpt", "--input", "a.tif", "--output", "b.tif")
    command("info", "a.tif", "--model", "best.ckpt")
with perf_vit.open("b.tif") as map:
    assert map.size == (40, 50)
call("Augmentation", lambda: perf_vit.transforms.Augmentation)
"""
    missing = (EXTRAS["all"] | {"cv2"}) - CORE - EXTRAS["geo"]
    said = run_without(missing, script + COMMANDS, tmp_path)
    # A progress bar follows the exit code.
    assert [said.pop(command)[:2] for command in ("predict", "info")] == ["0:", "0:"]
    assert (tmp_path / "b.tif").is_file()
    expected = lines({"Augmentation": ("perf_vit.transforms.Augmentation", "train")})
    expected |= lines(TRAINING_COMMANDS, "2: Error: ")
    assert said.keys() == expected.keys()
    assert [line for name, line in said.items() if not re.fullmatch(expected[name], line)] == []
