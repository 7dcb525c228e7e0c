"""Pictures of validation tiles with truth and prediction."""

from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image, ImageDraw
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from perf_vit.errors import ConfigError, MissingPackageError
from perf_vit.plotting import default_colormap
from perf_vit.plotting.panels import ERROR_COLOR, standardized_picture
from perf_vit.tasks import TrainerConfig, build_trainer, draw_classification, draw_objects, draw_segmentation
from perf_vit.transforms import Normalizer
from perf_vit.types import Detections, GeoImage, ObjectLabels

IMAGE = torch.linspace(0, 1, 5 * 16 * 24).reshape(5, 16, 24)


def network(kind: str = "boxes", threshold: float = 0.5, multilabel: bool = False):
    spec = SimpleNamespace(classes=("a", "b"), kind=kind, score_threshold=threshold, multilabel=multilabel,
                           background_index=None if multilabel else 0)  # fmt: skip
    return SimpleNamespace(spec=spec, to_labels=lambda logits: (logits > 0).long() if multilabel else logits.argmax(1))


def color(index: int) -> np.ndarray:
    return np.array(default_colormap(3, 0)[index][:3], np.uint8)


def test_classes_have_the_colours_of_the_map_and_errors_are_those_of_labelled_pixels() -> None:
    labels = torch.zeros(16, 24, dtype=torch.long)
    labels[4:8], labels[12:] = 1, 255
    logits = torch.zeros(2, 16, 24)
    logits[1, :, :5] = 1.0
    image, truth, predicted, errors = draw_segmentation(IMAGE, labels, network(), logits)
    assert image.shape == truth.shape == predicted.shape == errors.shape == (16, 24, 3)
    assert (truth[5, 10] == color(1)).all()
    assert (truth[0, 0] == color(0)).all()
    assert (predicted[0, 4] == color(1)).all()
    assert (predicted[0, 5] == color(0)).all()
    assert (truth[12:] == 255).all()
    # The whole prediction, also where nothing is labelled.
    assert (predicted[12:, 4] == color(1)).all()
    assert (predicted[12:, 5] == color(0)).all()
    wrong = (errors == ERROR_COLOR).all(-1)
    expected = (logits.argmax(0) != labels).numpy()
    expected[12:] = False
    assert (wrong == expected).all()


def test_of_classes_that_do_not_exclude_each_other_the_last_is_shown() -> None:
    labels = torch.zeros(2, 16, 24, dtype=torch.long)
    labels[0, :8], labels[1, 4:12], labels[:, 14:] = 1, 1, 255
    logits = torch.full((2, 16, 24), -1.0)
    logits[0, :, :5] = 1.0
    _, truth, predicted, errors = draw_segmentation(IMAGE, labels, network(multilabel=True), logits)
    assert [tuple(truth[row, 0]) for row in (0, 5, 9, 12)] == [tuple(color(index)) for index in (1, 2, 2, 0)]
    assert (truth[14:] == 255).all()
    assert (predicted[15, 4] == color(1)).all()
    assert (predicted[0, 4] == color(1)).all()
    assert (predicted[0, 5] == color(0)).all()
    assert [(errors[row, 0] == ERROR_COLOR).all() for row in (0, 5, 9, 12, 15)] == [False, True, True, True, False]


def test_8_bit_imagery_is_shown_as_it_was() -> None:
    pixels = np.random.default_rng(0).integers(60, 90, (4, 5, 6)).astype(np.uint8)
    normalizer = Normalizer((70.0, 75.0, 80.0, 60.0), (9.0, 8.0, 7.0, 6.0))
    image = GeoImage(pixels, np.ones((5, 6), bool))
    names = ("Blue", "Green", "Red", "NIR")
    spec = SimpleNamespace(normalizer=normalizer, trained_on=SimpleNamespace(dtype="uint8", names=names))
    assert (standardized_picture(normalizer(image), spec) == pixels[[2, 1, 0]].transpose(1, 2, 0)).all()
    spec.trained_on.dtype = "uint16"
    assert np.ptp(standardized_picture(normalizer(image), spec)) == 255


def test_boxes_that_count_and_sure_detections_are_outlined() -> None:
    boxes = np.array([[2, 3, 10, 9], [12, 2, 20, 14]], np.float32)
    labels = ObjectLabels(labels=np.array([0, 1]), boxes_xyxy=boxes, ignored=np.array([False, True]))
    found = Detections(scores=torch.tensor([0.4, 0.6]), labels=torch.tensor([0, 1]), boxes_xyxy=torch.tensor(boxes))
    image, truth, predicted = draw_objects(IMAGE, labels, network(), found)
    changed = (truth != image).any(-1)
    assert changed[3:10, 2:11].any()
    assert not changed[4:8, 4:9].any()
    assert not changed[:, 12:].any()
    changed = (predicted != image).any(-1)
    assert (predicted[changed] == color(2)).all()
    assert changed[:, 11:].any()
    assert not changed[:, :10].any()


def test_masks_and_oriented_boxes_are_outlined_along_themselves() -> None:
    masks = np.zeros((1, 16, 24), bool)
    masks[0, 4:10, 5:15] = True
    one = {"labels": np.array([0]), "boxes_xyxy": np.array([[5, 4, 15, 10]], np.float32), "ignored": np.zeros(1, bool)}
    none = Detections(scores=torch.zeros(0), labels=torch.zeros(0), masks=torch.zeros(0, 16, 24, dtype=torch.bool))
    image, truth, predicted = draw_objects(IMAGE, ObjectLabels(**one, masks=masks), network("masks"), none)
    inner = np.zeros((16, 24), bool)
    inner[5:9, 6:14] = True
    assert ((truth != image).any(-1) == masks[0] & ~inner).all()
    assert (predicted == image).all()
    turned = np.array([[12, 8, 8, 8, np.pi / 4]], np.float32)
    found = Detections(scores=np.array([0.9]), labels=np.array([1]), oriented_boxes=turned)
    labels = ObjectLabels(**one, oriented_boxes=turned)
    image, truth, predicted = draw_objects(IMAGE, labels, network("oriented_boxes"), found)
    rows, cols = np.nonzero((predicted != image).any(-1))
    # A square that stands on a corner.
    assert abs(rows + 0.5 - 8).max() > 5
    assert (abs(rows + 0.5 - 8) + abs(cols + 0.5 - 12) < 7.2).all()
    assert ((truth != image).any(-1) == (predicted != image).any(-1)).all()


@pytest.mark.parametrize(
    ("kind", "target", "logits", "texts"),
    [
        ("single_label", torch.tensor(1), [2.0, 0.0], (["b"], ["a 0.881"])),
        ("multilabel", torch.tensor([1.0, 1.0]), [-1.0, 2.0], (["a", "b"], ["b 0.881"])),
        ("multilabel", torch.tensor([0.0, 0.0]), [-1.0, -2.0], (["none"], ["none"])),
        ("regression", torch.tensor([1234.5, 0.5]), [1200.0, 0.25], (["a 1.23e+03", "b 0.5"], ["a 1.2e+03", "b 0.25"])),
    ],
)
def test_what_is_said_of_an_image_stands_beside_it(kind, target, logits, texts, monkeypatch) -> None:
    spec = SimpleNamespace(kind=kind, classes=("a", "b"))
    scores = {"single_label": lambda x: x.softmax(1), "multilabel": torch.sigmoid, "regression": lambda x: x}[kind]
    written = []
    draw_text = ImageDraw.ImageDraw.multiline_text
    monkeypatch.setattr(
        ImageDraw.ImageDraw,
        "multiline_text",
        lambda draw, xy, text, **options: (written.append(text), draw_text(draw, xy, text, **options)),
    )
    panels = draw_classification(IMAGE, target, SimpleNamespace(spec=spec, scores=scores), torch.tensor(logits))
    truth, predicted = texts
    assert written[0].split("\n") == ["true:", *truth, "", "predicted:", *predicted]
    seen, words = panels
    assert seen.shape == (16 * 16, 16 * 24, 3)
    assert words.shape == (16 * 16, 384, 3)
    assert (words == 255).any()
    assert (words < 128).any()


class Halves(torch.nn.Module):
    """Predicts class 1 where its weight says so."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(1.0))
        self.spec = network().spec
        self.to_labels = network().to_labels

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        ones = torch.ones_like(image[:, :1])
        return torch.cat([0 * ones, self.weight * ones], 1)


class Task(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Halves()

    def training_step(self, batch, batch_idx):
        # Each step takes .6 off the weight.
        return 0.6 * self.model.weight

    def validation_step(self, batch, batch_idx) -> None:
        self.log("val/iou", 0.5)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def test_each_validation_leaves_a_picture_of_the_averaged_weights(tmp_path) -> None:
    data = [(IMAGE, torch.zeros(16, 24, dtype=torch.long))] * 7
    config = TrainerConfig(
        accelerator="cpu", devices="1", max_epochs=2, num_pictures=2, ema_decay=0.9, gradient_clip=0.0
    )
    trainer = build_trainer(config, tmp_path, progress=False, draw=draw_segmentation)
    trainer.fit(Task(), DataLoader(data, batch_size=7), DataLoader(data, batch_size=7))
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["epoch_0001.png", "epoch_0002.png"]
    picture = np.asarray(Image.open(tmp_path / "pictures" / "epoch_0002.png"))
    # Two rows of four panels, sixteen times as large, with margins.
    assert picture.shape == (2 * (16 * 16 + 6), 4 * (16 * 24 + 6), 3)
    # The weight is -.2 by now, its average .34.
    panels = [picture[10, number * (16 * 24 + 6) + 10] for number in range(4)]
    assert (panels[1] == color(0)).all()
    assert (panels[2] == color(1)).all()
    assert (panels[3] == ERROR_COLOR).all()
    (folder,) = {path.parent for path in (tmp_path / "tensorboard").rglob("events*")}
    events = EventAccumulator(str(folder)).Reload()
    assert len(events.Images("val/pictures")) == 2


class Detecting(Task):
    """Finds one object with a score of .3, and a threshold of .2 when it validates."""

    def __init__(self) -> None:
        super().__init__()
        box = torch.tensor([[2.0, 3.0, 10.0, 9.0]])
        found = Detections(scores=torch.tensor([0.3]), labels=torch.tensor([0]), boxes_xyxy=box)
        self.model.forward = lambda images: [found]

    def on_validation_epoch_end(self) -> None:
        self.model.spec.score_threshold = 0.2


def test_detections_are_drawn_from_the_threshold_of_the_same_validation(tmp_path) -> None:
    none = {"labels": np.zeros(0, int), "boxes_xyxy": np.zeros((0, 4), np.float32), "ignored": np.zeros(0, bool)}
    data = [(IMAGE, ObjectLabels(**none))]
    config = TrainerConfig(accelerator="cpu", devices="1", max_epochs=1, num_pictures=1)
    trainer = build_trainer(config, tmp_path, progress=False, draw=draw_objects)
    loaders = [DataLoader(data, collate_fn=lambda samples: samples[0][0]) for _ in range(2)]
    trainer.fit(Detecting(), *loaders)
    picture = np.asarray(Image.open(tmp_path / "pictures" / "epoch_0001.png"))
    assert (picture == color(1)).all(-1).any()


def test_pictures_are_of_tiles_in_the_precision_of_the_training(tmp_path) -> None:
    seen = []

    class InDouble(Task):
        def __init__(self) -> None:
            super().__init__()
            forward = self.model.forward
            self.model.forward = lambda images, *rest: (seen.append(images.dtype), forward(images, *rest))[1]

    data = [(IMAGE, torch.zeros(16, 24, dtype=torch.long))]
    config = TrainerConfig(accelerator="cpu", devices="1", max_epochs=1, num_pictures=1, precision="64")
    build_trainer(config, tmp_path, progress=False, draw=draw_segmentation).fit(
        InDouble(), DataLoader(data), DataLoader(data)
    )
    assert set(seen) == {torch.float64}


def test_no_pictures_are_drawn_where_none_are_asked_for(tmp_path) -> None:
    data = [(IMAGE, torch.zeros(16, 24, dtype=torch.long))]
    config = TrainerConfig(accelerator="cpu", devices="1", max_epochs=1, num_pictures=0)
    trainer = build_trainer(config, tmp_path, progress=False, draw=draw_segmentation)
    trainer.fit(Task(), DataLoader(data), DataLoader(data))
    assert not (tmp_path / "pictures").exists()


def test_weights_and_biases_comes_beside_tensorboard(tmp_path, monkeypatch) -> None:
    given = {}

    class Recorder(CSVLogger):
        def __init__(self, **options) -> None:
            given.update(options)
            super().__init__(options["save_dir"])

    monkeypatch.setattr("perf_vit.tasks.trainer.WandbLogger", Recorder)
    run = tmp_path / "run"
    trainer = build_trainer(TrainerConfig(accelerator="cpu", logger="wandb"), run, progress=False)
    assert [type(logger) for logger in trainer.loggers] == [TensorBoardLogger, Recorder]
    assert given == {"project": "perf_vit", "name": "run", "save_dir": run}


def test_loggers_that_are_missing_or_unknown_are_one_line(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    with pytest.raises(MissingPackageError, match=r'needs wandb, .*; pip install "perf-vit\[wandb\]"$'):
        build_trainer(TrainerConfig(logger="wandb"), tmp_path)
    with pytest.raises(ConfigError, match=r"trainer\.logger must be tensorboard or wandb, got csv"):
        build_trainer(TrainerConfig(logger="csv"), tmp_path)
    with pytest.raises(ConfigError, match=r"trainer\.num_pictures must be 0 or more"):
        build_trainer(TrainerConfig(num_pictures=-1), tmp_path)
