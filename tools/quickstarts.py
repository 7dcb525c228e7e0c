"""Install a wheel with each extra in an environment of its own and run a quickstart there, outside of the checkout.

    make wheel && python tools/quickstarts.py dist/perf_vit-0.1.0-py3-none-any.whl geo train --out quickstarts

Without names, the core and all extras are tried. A quickstart uses nothing but what its extra brings; random weights
stand for pretrained ones. `--base DIR` names a virtual environment with torch and torchvision that is copied by hard
links, which saves a download of several GB for each extra; pip never writes into a file that exists, so the base stays
as it is.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

SCENE = """
from pathlib import Path
import numpy as np, rasterio, torch
from perf_vit import models
from perf_vit.transforms import Normalizer
for name in ("a.tif", "b.tif"):
    with rasterio.open(name, "w", driver="GTiff", width=200, height=150, count=3, dtype="uint8", crs="EPSG:32637",
                       transform=rasterio.Affine(2, 0, 4e5, 0, -2, 4.5e6)) as file:
        file.write(np.random.default_rng(0).integers(0, 255, (3, 150, 200), np.uint8))
config = models.SegmentationModelConfig(
    backbone="performer_vit_tiny_patch16_224", out_indices=[0], head="linear",
    backbone_kwargs={"depth": 1, "embed_dim": 64, "num_heads": 2},
)
normalizer = Normalizer((100.0,) * 3, (50.0,) * 3)
spec = models.SegmentationSpec(classes=("rest", "ship"), normalizer=normalizer, tile_px=64, MPP
                               label_options={"background": "rest"})
network = models.build_segmenter(config, spec)
state = {f"model.{name}": value for name, value in network.state_dict().items()}
torch.save({"state_dict": state, models.CHECKPOINT_KEY: models.checkpoint_metadata(config, network)}, "best.ckpt")
"""
SLIDE = """
import numpy as np, tifffile
pixels = np.random.default_rng(0).integers(0, 255, (512, 768, 3), np.uint8)
size = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.5, "PhysicalSizeYUnit": "µm"}
stored = dict(tile=(256, 256), photometric="rgb", compression="jpeg")
with tifffile.TiffWriter("a.ome.tif") as file:
    file.write(pixels, subifds=1, metadata=size, **stored)
    file.write(pixels[::2, ::2], subfiletype=1, **stored)
"""
SHIPS = """
from pathlib import Path
from perf_vit.data import make_ship_scene
make_ship_scene(Path("scene"), size_px=256, num_targets=20)
"""
BACKBONE = """
import perf_vit, timm
perf_vit.save_converted(perf_vit.linearize(timm.create_model("vit_tiny_patch16_224", num_classes=0, in_chans=4)), "vit")
"""
DATA = [f"data.{part}.{name}=scene/{file}" for part in ("train", "val")
        for name, file in (("image", "scene.tif"), ("labels", "ships.geojson"))]  # fmt: skip
TRAIN = ["perf-vit", "train", "segmentation/demo", *DATA, "trainer.max_epochs=1", "data.tiles_per_epoch=4", "out=run"]
PREDICT = ["perf-vit", "predict", "--checkpoint", "best.ckpt", "--input", "a.tif"]

CORE = [
    """
import perf_vit, timm, torch
model = timm.create_model("vit_small_patch14_dinov2", img_size=1022)
linear = perf_vit.linearize(model)
tokens = linear.forward_features(torch.randn(1, 3, 1022, 1022))
assert tokens.shape == (1, 5330, 384) and tokens.isfinite().all()
features = timm.create_model("performer_vit_tiny_patch16_224", in_chans=6, img_size=256, features_only=True)
assert features(torch.randn(1, 6, 256, 256))[0].shape == (1, 192, 16, 16)
perf_vit.save_converted(linear, "linear")
assert len(perf_vit.load("linear").state_dict()) == len(linear.state_dict())
""",
]
GEO = [
    SCENE.replace("MPP", ""),
    [*PREDICT, "--output", "map.tif", "--polygons", "gpkg"],
    ["perf-vit", "info", "map.tif"],
    """
import timm
timm.models.save_for_hf(timm.create_model("vit_tiny_patch16_224", num_classes=0), "softmax", safe_serialization=True)
""",
    ["perf-vit", "convert", "softmax", "--num-classes", "0", "--out", "linear"],
    """
from pathlib import Path
import perf_vit
perf_vit.predict(perf_vit.load("best.ckpt"), "a.tif", "again.tif")
with perf_vit.open("map.tif") as first, perf_vit.open("again.tif") as second:
    assert (first.read().pixels == second.read().pixels).all()
assert all(Path(name).stat().st_size for name in ("map.gpkg", "map.png", "map.html", "linear/fidelity.html"))
""",
]
TRAINING = [
    SHIPS,
    ["perf-vit", "init", "segmentation", "--image", "scene/scene.tif", "--labels", "scene/ships.geojson"],
    [*TRAIN],
    ["perf-vit", "evaluate", "--checkpoint", "run", "--input", "scene/scene.tif", "--labels", "scene/ships.geojson"],
    ["perf-vit", "predict", "--checkpoint", "run", "--input", "scene/scene.tif", "--output", "map.tif"],
    """
from pathlib import Path
assert all(Path(name).stat().st_size for name in ("config.yaml", "run/report.html", "map.tif"))
""",
]
SLIDES = [
    SLIDE + SCENE.replace("MPP", "mpp=1.0,"),
    ["perf-vit", "info", "a.ome.tif"],
    [*PREDICT[:-1], "a.ome.tif", "--output", "map.ome.tif", "--polygons", "geojson"],
    """
from pathlib import Path
import openslide, perf_vit
assert openslide.__library_version__ and perf_vit.open("map.ome.tif").size == (256, 384)
assert Path("map.ome.geojson").stat().st_size
""",
]
RAY = [
    SCENE.replace("MPP", ""),
    [*PREDICT, "--input", "b.tif", "--output", "maps", "--engine", "ray", "--num-actors", "1"],
    "from pathlib import Path; assert {'a.tif', 'b.tif'} <= {path.name for path in Path('maps').iterdir()}",
]
EXPORT = [
    """
import onnxruntime, perf_vit, timm, torch
model = timm.create_model("performer_vit_tiny_patch16_224", num_classes=5).eval()
image = torch.randn(2, 3, 224, 224)
torch.onnx.export(model, (image,), "model.onnx", dynamo=True)
session = onnxruntime.InferenceSession("model.onnx")
(scores,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
assert torch.allclose(torch.from_numpy(scores), model(image), atol=1e-4)
assert torch.equal(torch.export.export(model, (image,)).module()(image), model(image))
""",
]
PEFT = [
    SHIPS + BACKBONE,
    [*TRAIN, "model.backbone=vit", "model.backbone_kwargs={}", "model.head=linear", "model.head_kwargs={}",
     "model.lora={rank: 8}"],
    """
import perf_vit, torch
before, after = perf_vit.load("vit").state_dict(), perf_vit.load("run").backbone.model.state_dict()
blocks = [name for name in before.keys() & after.keys() if name.startswith("blocks.")]
changed = {name for name in blocks if not torch.equal(before[name], after[name])}
assert changed and all(name.endswith(("attn.qkv.weight", "attn.proj.weight")) for name in changed), changed
""",
]  # fmt: skip
WANDB = [
    SHIPS,
    [*TRAIN, "trainer.logger=wandb"],
    "from pathlib import Path; assert list(Path('run/wandb').glob('**/*.wandb'))",
]
INTEGRATIONS = [
    """
import perf_vit, torch
import segmentation_models_pytorch as smp
from torchgeo.tasks import SemanticSegmentationTask
image = torch.randn(1, 6, 64, 64)
name = "tu-performer_vit_tiny_patch16_224"
model = smp.DPT(name, encoder_weights=None, in_channels=6, classes=5, dynamic_img_size=True)
assert model.eval()(image).shape == (1, 5, 64, 64)
task = SemanticSegmentationTask(model="dpt", backbone="tu-performer_vit_tiny_patch16_224", in_channels=6, num_classes=5)
""",
]
PEERS = [
    "import torch, performer_pytorch; performer_pytorch.SelfAttention(64, heads=2, causal=False)(torch.randn(1, 9, 64))"
]
QUICKSTARTS: dict[str, list[list[str | list[str]]]] = {
    "core": [CORE],
    "geo": [GEO],
    "train": [TRAINING],
    "slides": [SLIDES],
    "ray": [RAY],
    "export": [EXPORT],
    "peft": [PEFT],
    "wandb": [WANDB],
    "all": [CORE, GEO, TRAINING, SLIDES, RAY, EXPORT, PEFT, WANDB],
    "integrations": [INTEGRATIONS],
    "peers": [PEERS],
}


def install(wheel: Path, extra: str, folder: Path, base: Path | None) -> None:
    """Make an environment, empty or a copy of the base, and install the wheel with an extra."""
    if base is None:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    else:
        subprocess.run(["cp", "--archive", "--link", str(base), str(folder)], check=True)
    named = str(wheel.resolve()) + ("" if extra == "core" else f"[{extra}]")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", named], check=True)
    subprocess.run([*pip, "check"], check=True)


def run(step: str | list[str], environment: Path, folder: Path) -> None:
    """Run a script, or a command of the environment, in a folder; raise `CalledProcessError` if it fails."""
    command = ["python", "-c", step] if isinstance(step, str) else step
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    variables = {**kept, "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}
    subprocess.run([str(environment / "bin" / command[0]), *command[1:]], cwd=folder, env=variables, check=True)


def main() -> None:
    """Print a table of extras: installed or not, quickstart passed or not, and how long both took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("extras", nargs="*", choices=[*QUICKSTARTS, []], metavar="EXTRA", help=", ".join(QUICKSTARTS))
    parser.add_argument("--out", type=Path, default=Path("quickstarts"), help="New folder for environments and files.")
    parser.add_argument("--base", type=Path, help="Virtual environment with torch and torchvision.")
    given = parser.parse_args()
    rows = ["| extra | installed | quickstart |", "|---|---|---|"]
    for extra in given.extras or QUICKSTARTS:
        environment = given.out.resolve() / extra / "environment"
        environment.parent.mkdir(parents=True)
        start, results = time.monotonic(), []
        try:
            install(given.wheel, extra, environment, given.base)
            results.append(f"{time.monotonic() - start:.0f} s")
            start = time.monotonic()
            for number, steps in enumerate(QUICKSTARTS[extra]):
                (work := environment.parent / f"work{number}").mkdir()
                for step in steps:
                    run(step, environment, work)
            results.append(f"passed, {time.monotonic() - start:.0f} s")
        except subprocess.CalledProcessError as error:
            results.append(f"FAILED: {str(error.cmd)[:200]}")
        rows.append(f"| {extra} | {' | '.join(results)} |")
    print("\n".join(rows))
    sys.exit(any("FAILED" in row for row in rows))


if __name__ == "__main__":
    main()
