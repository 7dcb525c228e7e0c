"""Every task keeps what its training images were like and tells of input that isn't like them."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
from command_line import call
from encoder_weights import save_encoder

from perf_vit.models import load_classifier, load_detector, load_segmenter, load_slide_classifier

PLACE = rasterio.Affine(1, 0, 5e5, 0, -1, 4e6)
NAMES = ("red", "nir")
VIT = "{depth: 1, embed_dim: 64, num_heads: 2, attn_kwargs: {num_features: 16}}"
NETWORK = f"model: {{backbone: performer_vit_tiny_patch16_224, backbone_kwargs: {VIT}, %s}}"
TRAINER = "trainer: {max_epochs: 1, accelerator: cpu, report: false}"
CONFIGS = {
    "segmentation": [
        "data: {classes: [a, b], tile_px: 32, tiles_per_epoch: 2, batch_size: 2}",
        NETWORK % "out_indices: [0], head: linear",
        TRAINER,
    ],
    "detection": [
        "data: {classes: [a], tile_px: 32, tiles_per_epoch: 2, batch_size: 2, "
        "train: {label_format: csv}, val: {label_format: csv}}",
        "model: {backbone: test_resnet, strides: [8], channels: 64, head: fcos, head_kwargs: {num_convs: 1}}",
        TRAINER,
    ],
    "classification": ["data: {tile_px: 32, batch_size: 2}", NETWORK % "pool: avg", TRAINER],
    "slide_classification": [
        "data: {mpp: null, tissue: null, tile_px: 32, batch_size: 2}",
        NETWORK % "pool: avg, hidden_dim: 16, attention_dim: 8",
        TRAINER,
    ],
}
LOAD = {
    "segmentation": load_segmenter,
    "detection": load_detector,
    "classification": load_classifier,
    "slide_classification": load_slide_classifier,
}


def write(path: Path, seed: int, *, names=NAMES, factor: float = 1.0, dtype: str = "uint16") -> Path:
    """A scene of 64 x 64 px, darker or brighter than others by a third or so."""
    rng = np.random.default_rng(seed)
    light = np.exp(rng.normal(0, 0.3))
    pixels = rng.normal(light * np.array([900, 3000]), light * 150, (64, 64, 2)).transpose(2, 0, 1) * factor
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver="GTiff", height=64, width=64, count=2, dtype=dtype, crs="EPSG:32636", transform=PLACE
    ) as file:
        file.write(pixels.astype(dtype))
        file.descriptions = names
    return path


def train_args(task: str, root: Path) -> list[str]:
    """Files to train a task on, and the arguments that name them."""
    if task == "segmentation":
        for part in ("train", "val"):
            write(root / part / "images" / "0.tif", 0)
            labels = root / part / "labels" / "0.tif"
            labels.parent.mkdir()
            with rasterio.open(root / part / "images" / "0.tif") as image:
                profile = {**image.profile, "count": 1, "dtype": "uint8"}
            with rasterio.open(labels, "w", **profile) as file:
                file.write(np.random.default_rng(0).integers(0, 2, (1, 64, 64)).astype(np.uint8))
        return [f"data.{p}.{k[:-1] if k == 'images' else k}={root / p / k / '0.tif'}" for p in ("train", "val")
                for k in ("images", "labels")]  # fmt: skip
    names = [f"{number % 2}/{number}.tif" for number in range(8)]
    for number, name in enumerate(names):
        write(root / "images" / name, number)
    if task == "classification":
        return [f"data.train.image={root / 'images'}"]
    rows = [f"{name},4,4,30,30,a" if task == "detection" else f"{name},{name[0]}" for name in names]
    header = "image_path,xmin,ymin,xmax,ymax,label" if task == "detection" else "slide,label"
    (root / "labels.csv").write_text("\n".join([header, *rows]))
    if task == "slide_classification":
        weights = save_encoder(root / "encoder.safetensors")
        files = [f"data.train.labels={root / 'labels.csv'}", f"data.train.image={root / 'images'}"]
        return [*files, f"model.weights={weights}"]
    return [f"data.{part}.{key}={root / name}" for part in ("train", "val")
            for key, name in (("image", "images"), ("labels", "labels.csv"))]  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def trained(request, tmp_path_factory) -> tuple[str, Path, Path]:
    task, root = request.param, tmp_path_factory.mktemp(request.param)
    (root / "config.yaml").write_text("\n".join([f"task: {task}", *CONFIGS[task]]))
    assert call(["train", root / "config.yaml", f"out={root / 'run'}", *train_args(task, root)]) == 0
    return task, root, root / "run" / "checkpoints" / "last.ckpt"


def predict(task: str, checkpoint: Path, inputs: list[Path], out: Path) -> None:
    output = out if task in ("segmentation", "detection") else out / "table.csv"
    out.mkdir()
    device = ["--device", "cpu"]
    assert call(["predict", "--input", *inputs, "--checkpoint", checkpoint, "--output", output, *device]) == 0


def test_the_checkpoint_holds_names_dtype_and_ranges(trained) -> None:
    task, _, checkpoint = trained
    bands = LOAD[task](checkpoint).spec.trained_on
    assert bands.names == NAMES
    assert bands.dtype == "uint16"
    assert 200 < bands.low[0] < bands.high[0] < 3000
    assert bands.high[0] < bands.high[1] < 9000


def test_other_scenes_of_the_same_sensor_are_predicted_in_silence(trained, tmp_path, capsys) -> None:
    task, _, checkpoint = trained
    inputs = [write(tmp_path / f"{seed}.tif", seed) for seed in (50, 51, 52)]
    predict(task, checkpoint, inputs, tmp_path / "out")
    assert "is not like" not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ("nir", "red")}, "in another order: nir, red, in training red, nir"),
        ({"factor": 1e-4, "dtype": "float32"}, "2 of 2 bands have another range"),
    ],
)
def test_input_unlike_the_training_images_is_told_once_a_run(trained, tmp_path, capsys, change, message) -> None:
    task, _, checkpoint = trained
    inputs = [write(tmp_path / f"{seed}.tif", seed, **change) for seed in (50, 51, 52)]
    predict(task, checkpoint, inputs, tmp_path / "out")
    printed = " ".join("".join(capsys.readouterr()).split())
    assert printed.count("is not like the images that the model was trained on") == 1
    assert message in printed


def test_evaluation_tells_too(trained, tmp_path, capsys) -> None:
    task, root, checkpoint = trained
    names = ["0.tif"] if task == "segmentation" else [f"{number % 2}/{number}.tif" for number in range(8)]
    for number, name in enumerate(names):
        write(tmp_path / "images" / name, number, factor=1e-4, dtype="float32")
    images = tmp_path / "images" / "0.tif" if task == "segmentation" else tmp_path / "images"
    labels = root / "val" / "labels" / "0.tif" if task == "segmentation" else root / "labels.csv"
    given = [] if task == "classification" else ["--labels", labels]
    args = ["evaluate", "--checkpoint", checkpoint, "--input", images, *given, "--device", "cpu"]
    assert call(args) == 0
    printed = " ".join("".join(capsys.readouterr()).split())
    assert printed.count("is not like the images that the model was trained on") == 1
