import json
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from label_cases import write_image

from perf_vit.config import load_config
from perf_vit.data import DetectionDataConfig, DetectionSplitConfig, build_detection_datamodule
from perf_vit.errors import ConfigError, DataWarning, InputError


@pytest.fixture
def ships(tmp_path: Path) -> DetectionSplitConfig:
    """Ten images in COCO's format, each with one ship and one dock."""
    images, annotations = [], []
    for number in range(10):
        write_image(tmp_path / "images" / f"{number}.png", height=70, width=90, seed=number)
        images.append({"id": number, "file_name": f"{number}.png", "height": 70, "width": 90})
        for kind in (1, 2):
            box = [10 * kind, 5 * number, 8, 6]
            annotations.append({"id": len(annotations), "image_id": number, "category_id": kind, "bbox": box})
    categories = [{"id": 1, "name": "ship"}, {"id": 2, "name": "dock"}]
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return DetectionSplitConfig(image=str(tmp_path / "images"), labels=str(labels))


def _config(split: DetectionSplitConfig, **changes) -> DetectionDataConfig:
    options = {"tile_px": 32, "batch_size": 2, "tiles_per_epoch": 6, "classes": ["ship", "dock"], **changes}
    return DetectionDataConfig(train=split, **options)


def _names(index) -> set[str]:
    return {Path(record.path).stem for record in index}


def test_batches_are_lists_of_standardised_tiles_and_objects(ships) -> None:
    data = build_detection_datamodule(_config(ships, num_workers=2), seed=0)
    batches = list(data.train_dataloader())
    assert len(batches) == 3
    images, objects, _ = batches[0]
    assert isinstance(images, list)
    assert isinstance(objects, list)
    assert [image.shape for image in images] == [(3, 32, 32)] * 2
    assert abs(float(torch.stack([image for images, *_ in batches for image in images]).mean())) < 0.3
    assert data.classes == ("ship", "dock")
    first = next(iter(data.val_dataloader()))
    assert len(first[0]) == len(first[1]) == 2


def test_a_seed_splits_images_the_same_way_each_time(ships) -> None:
    splits = [build_detection_datamodule(_config(ships, val_share=0.3), seed=seed) for seed in (0, 0, 1)]
    names = [(_names(data.train_index), _names(data.val_index)) for data in splits]
    assert names[0] == names[1] != names[2]
    assert len(names[0][1]) == 3
    assert names[0][0] | names[0][1] == {str(number) for number in range(10)}
    assert not names[0][0] & names[0][1]


def test_lists_of_names_split_images(ships, tmp_path) -> None:
    (tmp_path / "train.txt").write_text("0\n1.png\n\n2\n")
    (tmp_path / "val.txt").write_text("7\n")
    train, val = (
        DetectionSplitConfig(image=ships.image, labels=ships.labels, names=str(tmp_path / f"{name}.txt"))
        for name in ("train", "val")
    )
    data = build_detection_datamodule(_config(train, val=val), seed=0)
    assert _names(data.train_index) == {"0", "1", "2"}
    assert _names(data.val_index) == {"7"}


def test_grey_images_are_validated_on_as_they_are_trained_on(ships, tmp_path) -> None:
    for number in range(10):
        write_image(tmp_path / "grey" / f"{number}.png", height=70, width=90, num_bands=1, seed=number)
    grey = DetectionSplitConfig(image=str(tmp_path / "grey"), labels=ships.labels)
    data = build_detection_datamodule(_config(ships, val=grey), seed=0)
    image, *_ = data.val[0]
    assert image.shape == (3, 32, 32)
    mean, std = (torch.tensor(values)[:, None, None] for values in (data.normalizer.mean, data.normalizer.std))
    read = image * std + mean
    torch.testing.assert_close(read[0], read[2])
    with pytest.raises(ConfigError, match="the validation images have 3 bands, the training images 1"):
        build_detection_datamodule(_config(grey, val=ships), seed=0)


def test_every_object_of_the_validation_images_is_counted_once(ships) -> None:
    data = build_detection_datamodule(_config(ships), seed=0)
    counted = np.concatenate([o.labels[~o.ignored] for _, objects, _ in data.val_dataloader() for o in objects])
    assert np.bincount(counted).tolist() == [2, 2]


def test_augmentation_of_every_kind_keeps_shapes_and_boxes_inside(ships) -> None:
    config = _config(ships, sampler="balanced")
    config.augment.scale = (0.5, 2.0)
    config.augment.gain = config.augment.offset = 0.2
    data = build_detection_datamodule(config, seed=0)
    for index in range(30):
        image, objects, _ = data.train[index]
        assert image.shape == (3, 32, 32)
        assert (objects.boxes_xyxy >= 0).all()
        assert (objects.boxes_xyxy <= 32).all()
        assert (objects.boxes_xyxy[:, 2:] > objects.boxes_xyxy[:, :2]).all()


def test_the_config_loads_from_yaml(ships, tmp_path) -> None:
    text = f"classes: [ship, dock]\ntrain:\n  image: {ships.image}\n  labels: {ships.labels}\n  label_format: coco\n"
    (tmp_path / "data.yaml").write_text(text + "augment:\n  scale: [0.8, 1.25]\n")
    config = load_config(tmp_path / "data.yaml", DetectionDataConfig, ["sampler=random", "tile_px=32"])
    assert len(build_detection_datamodule(config, seed=0).train) == 200


def test_the_documented_config_fits_the_schema(tmp_path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text()
    block = page.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "data.yaml").write_text(textwrap.dedent(block.removeprefix("data:\n")))
    config = load_config(tmp_path / "data.yaml", DetectionDataConfig)
    assert config.sampler == "balanced"
    assert config.augment.scale == (0.8, 1.25)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": []}, r"data\.classes must name at least one class"),
        ({"sampler": "grid"}, r"data\.sampler must be one of random, objects, balanced, got grid"),
        ({"min_visible": 2}, r"data\.min_visible must lie between 0 and 1, got 2"),
        ({"val_share": 1.0}, "of 10 images leaves none to train or validate on"),
        ({"batch_size": 7}, r"data\.tiles_per_epoch must be at least 7, got 6"),
    ],
)
def test_values_that_do_not_fit_are_errors(ships, changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build_detection_datamodule(_config(ships, **changes), seed=0)


def test_an_empty_or_missing_list_is_an_error(ships, tmp_path) -> None:
    ships.names = str(tmp_path / "list.txt")
    with pytest.raises(ConfigError, match=r"can't read data\.train\.names"):
        build_detection_datamodule(_config(ships), seed=0)
    Path(ships.names).write_text("\n")
    with pytest.raises(ConfigError, match="names no image"):
        build_detection_datamodule(_config(ships), seed=0)


def test_unknown_classes_of_the_labels_are_an_error(ships) -> None:
    with pytest.raises(InputError, match="objects of class dock; the classes are ship"):
        build_detection_datamodule(_config(ships, classes=["ship"]), seed=0)


@pytest.mark.parametrize("sampler", ["objects", "random"])
@pytest.mark.parametrize("part", ["train", "val"])
def test_parts_without_objects_are_an_error(ships, tmp_path, part, sampler) -> None:
    content = json.loads(Path(ships.labels).read_text())
    (tmp_path / "none.json").write_text(json.dumps({**content, "annotations": []}))
    parts = {
        "train": ships,
        "val": ships,
        part: DetectionSplitConfig(image=ships.image, labels=str(tmp_path / "none.json")),
    }
    with (
        pytest.raises(
            InputError, match=rf"expected objects to .* in the images of data\.{part}, got none in 10 images"
        ),
        pytest.warns(DataWarning, match="2 of 2 classes have no objects"),
    ):
        build_detection_datamodule(_config(parts["train"], val=parts["val"], sampler=sampler), seed=0)


@pytest.mark.parametrize("part", ["train", "val"])
def test_objects_on_no_data_are_counted_and_refused_where_all_are(make_scene, tmp_path, part) -> None:
    pixels = np.full((3, 64, 64), 200, np.float32)
    good = make_scene(pixels=pixels, nodata=None).rename(tmp_path / "good.tif")
    pixels[:, :, :20] = np.nan
    half = make_scene(pixels=pixels, nodata=None).rename(tmp_path / "half.tif")

    def split(name: str, image: Path, *rows: str) -> DetectionSplitConfig:
        lines = ["image,xmin,ymin,xmax,ymax,label", *(f"{image.name},{row},ship" for row in rows)]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
        return DetectionSplitConfig(image=str(image), labels=str(tmp_path / f"{name}.csv"), label_format="csv")

    def build(**parts: DetectionSplitConfig) -> None:
        whole = split("whole", good, "2,2,9,9")
        splits = {"train": whole, "val": whole, **parts}
        statistics = {"mean": [1.0] * 3, "std": [1.0] * 3}
        build_detection_datamodule(_config(splits["train"], classes=["ship"], val=splits["val"], **statistics), seed=0)

    word = {"train": "training", "val": "validation"}[part]
    with pytest.warns(DataWarning, match=f"1 of 3 objects in the 1 {word} images checked cover no valid pixel"):
        build(**{part: split("some", half, "2,2,9,9", "18,2,22,9", "30,30,40,40")})
    with pytest.raises(InputError, match=r"2 of 2 objects .* no valid pixel, .*half\.tif; check the nodata"):
        build(**{part: split("none", half, "2,2,9,9", "1,20,18,29")})


def test_images_without_a_valid_pixel_are_an_error(make_scene, tmp_path) -> None:
    scene = make_scene(pixels=np.zeros((3, 40, 40), np.uint8), nodata=0)
    (tmp_path / "t.csv").write_text(f"image,xmin,ymin,xmax,ymax,label\n{scene.name},1,1,9,9,ship\n")
    split = DetectionSplitConfig(image=str(scene), labels=str(tmp_path / "t.csv"), label_format="csv")
    with pytest.raises(InputError, match="1 of 1 objects in the 1 training images checked cover no valid pixel"):
        build_detection_datamodule(_config(split, classes=["ship"], val=split), seed=0)
