import csv
import pickle
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning
from small_models import BACKBONE, NORMALIZER, save_classifier, save_slide_classifier, save_small_detector

import perf_vit
from perf_vit.data import ClassificationViews
from perf_vit.errors import DataWarning, InputError
from perf_vit.inference import ClassificationPredictOptions, ClassificationPredictor
from perf_vit.inference.options import move_to_device
from perf_vit.inference.prefetch import FirstWindows, Tile, in_batches, load_ahead, to_device
from perf_vit.models import (
    InputBands,
    SegmentationModelConfig,
    SegmentationSpec,
    build_segmenter,
    load_classifier,
)
from perf_vit.models.heads import SEGMENTATION_HEADS
from perf_vit.sources import open_source
from perf_vit.sources._gdal import plain_images_allowed
from perf_vit.threads import num_processors
from perf_vit.types import GeoImage, Window
from perf_vit.workflows.slide_classification import _embedded


@pytest.mark.parametrize(("num_threads", "depth"), [(1, 1), (4, 3), (3, 50)])
def test_items_come_in_their_order_and_no_more_than_depth_are_held(num_threads, depth) -> None:
    waits = np.random.default_rng(0).uniform(0, 0.01, 30)
    lock, begun, taken, held = threading.Lock(), 0, 0, []

    def load(item: int) -> int:
        nonlocal begun
        with lock:
            begun += 1
            held.append(begun - taken)
        time.sleep(waits[item])
        return item * item

    found = []
    for result in load_ahead(range(30), load, num_threads=num_threads, depth=depth):
        found.append(result)
        with lock:
            taken += 1
    assert found == [item * item for item in range(30)]
    # The one that the caller works on is no longer held.
    assert max(held) <= depth + 1


def test_an_error_comes_in_its_turn_and_nothing_is_loaded_after_it() -> None:
    loaded = []

    def load(item: int) -> int:
        if item == 5:
            raise ValueError("item 5")
        loaded.append(item)
        return item

    found = []
    with pytest.raises(ValueError, match="item 5"):
        found.extend(load_ahead(range(100), load, num_threads=2, depth=4))
    assert max(loaded) <= 9
    found = []
    with pytest.raises(ValueError, match="item 5"):
        for item in load_ahead(range(100), load, num_threads=2, depth=4):
            found.append(item)
    assert found == [0, 1, 2, 3, 4]


def test_batches_after_one_that_failed_are_not_consumed() -> None:
    computed, consumed = [], []
    last = threading.Event()

    def forward(entries: list[Tile]) -> torch.Tensor:
        computed.append(len(entries))
        if len(computed) == 4:
            last.set()
        return torch.zeros(len(entries), 1, 2, 2)

    def consume(entries: list[Tile], scores) -> list[int]:
        consumed.append(entries[0].window.row)
        if len(consumed) == 2:
            # The third batch waits in the queue once the fourth is computed.
            assert last.wait(20)
            raise OSError("the second batch")
        return []

    tiles = (Tile(Window(row, 0, 2, 2), np.ones((2, 2), bool), np.zeros((1, 2, 2), np.float32)) for row in range(9))
    with pytest.raises(OSError, match="the second batch"):
        list(in_batches(forward, tiles, consume, 1))
    assert len(computed) == 4
    assert consumed == [0, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_scores_that_are_computed_in_a_stream_of_the_caller_are_complete() -> None:
    def forward(entries: list[Tile]) -> torch.Tensor:
        torch.cuda._sleep(200_000_000)
        return torch.stack([torch.full((1, 512, 512), entry.window.row + 1.0, device="cuda") for entry in entries])

    valid, pixels = np.ones((512, 512), bool), np.zeros((1, 512, 512), np.float32)
    tiles = (Tile(Window(row, 0, 512, 512), valid, pixels) for row in range(6))
    with torch.cuda.stream(torch.cuda.Stream()):
        found = list(in_batches(forward, tiles, lambda _, scores: [np.unique(s).tolist() for s in scores], 2))
    assert found == [[row + 1.0] for row in range(6)]


def test_no_thread_is_left_when_a_caller_stops_early() -> None:
    items = load_ahead(range(100), lambda item: time.sleep(0.001), num_threads=3, depth=6)
    next(items)
    assert reader_threads()
    items.close()
    assert reader_threads() == []


def reader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("perf_vit-reader")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("model") / "checkpoints" / "best.ckpt", "single_label")


def write_images(
    folder: Path, number: int = 10, broken: tuple[int, ...] = (), bright: tuple[int, ...] = ()
) -> list[str]:
    """PNG images of 40 x 50 px."""
    paths = []
    for index in range(number):
        pixels = np.random.default_rng(index).normal(100, 20, (40, 50, 3)).clip(0, 200)
        paths.append(folder / f"{index}.png")
        Image.fromarray((pixels / (20 if index in bright else 1)).astype(np.uint8)).save(paths[-1])
        if index in broken:
            paths[-1].write_bytes(b"no image")
    return [str(path) for path in paths]


def rows_of(table: Path) -> list[list[str]]:
    with table.open(newline="") as file:
        return list(csv.reader(file))


def predictor_of(checkpoint: Path, **options) -> ClassificationPredictor:
    return ClassificationPredictor(checkpoint, ClassificationPredictOptions(device="cpu", **options))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_next_images_are_read_while_the_model_computes(checkpoint, tmp_path, monkeypatch, batch_size) -> None:
    paths = write_images(tmp_path)
    predictor = predictor_of(checkpoint, batch_size=batch_size)
    done = {path: threading.Event() for path in paths}
    read, score = predictor.read_input, predictor.scores
    num_scored, names = 0, []

    def read_noted(path: str):
        found = read(path)
        names.append(threading.current_thread().name)
        done[path].set()
        return found

    def score_waiting(tiles, valid):
        nonlocal num_scored
        num_scored += len(tiles)
        # Nobody reads these images but threads, as this one waits for them.
        assert all(done[path].wait(10) for path in paths[: num_scored + batch_size])
        return score(tiles, valid)

    monkeypatch.setattr(predictor, "read_input", read_noted)
    monkeypatch.setattr(predictor, "scores", score_waiting)
    assert predictor.run(paths, tmp_path / "found.csv").num_rows == 10
    assert all(name.startswith("perf_vit-reader") for name in names)


def test_rows_are_those_of_batches_read_one_by_one(checkpoint, tmp_path) -> None:
    paths = write_images(tmp_path)
    predictor = predictor_of(checkpoint, batch_size=4)
    expected = {}
    for start in range(0, 10, 4):
        expected |= predictor.rows(tmp_path, {path: predictor.read_input(path) for path in paths[start : start + 4]})
    for num_readers in (1, 4):
        out = tmp_path / f"found_{num_readers}.csv"
        predictor_of(checkpoint, batch_size=4, num_readers=num_readers).run(paths, out)
        assert rows_of(out)[1:] == [[path, *expected[path]] for path in paths]


def test_each_image_that_cant_be_read_is_named_in_its_row(checkpoint, tmp_path) -> None:
    paths = write_images(tmp_path, broken=(1, 2, 9))
    out = tmp_path / "found.csv"
    result = predictor_of(checkpoint, batch_size=3, num_readers=4, on_error="skip").run(paths, out)
    assert sorted(result.failed) == [paths[index] for index in (1, 2, 9)]
    rows = rows_of(out)[1:]
    assert [row[0] for row in rows] == paths
    assert [index for index, row in enumerate(rows) if row[-1]] == [1, 2, 9]
    assert all(path in row[-1] for path, row in zip(paths, rows, strict=True) if row[-1])


def test_no_thread_is_left_by_a_table_that_an_image_stops(checkpoint, tmp_path) -> None:
    paths = write_images(tmp_path, number=30, broken=(4,))
    with pytest.raises(InputError, match=r"4\.png") as stopped:
        predictor_of(checkpoint, num_readers=3).run(paths, tmp_path / "found.csv")
    # The traceback, which a caller may keep, holds nothing open.
    assert stopped.value.__traceback__ is not None
    assert reader_threads() == []


def test_an_evaluation_reads_the_next_images_while_the_model_computes(checkpoint, tmp_path, monkeypatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_images(tmp_path / name, number=4)
    begun = [threading.Event() for _ in range(8)]
    read, score = ClassificationViews.__getitem__, ClassificationPredictor.scores
    num_scored = 0

    def read_noted(self, index: int):
        begun[index].set()
        return read(self, index)

    def score_waiting(self, tiles, valid):
        nonlocal num_scored
        num_scored += len(tiles)
        assert all(each.wait(10) for each in begun[: num_scored + 2])
        return score(self, tiles, valid)

    before = perf_vit.evaluate(checkpoint, tmp_path, None, batch_size=2, device="cpu")
    monkeypatch.setattr(ClassificationViews, "__getitem__", read_noted)
    monkeypatch.setattr(ClassificationPredictor, "scores", score_waiting)
    assert perf_vit.evaluate(checkpoint, tmp_path, None, batch_size=2, device="cpu").table == before.table
    assert num_scored == 8


def test_the_tissue_of_the_next_slide_is_found_while_a_slide_is_embedded() -> None:
    found = {name: threading.Event() for name in "abc"}

    class Slides:
        def attempted(self, compute, path: str):
            return compute(path)

        def read_input(self, path: str) -> tuple[str, ...]:
            found[path].set()
            return (f"windows of {path}",)

        def embed(self, path: str, on_window, tissue) -> tuple[str, ...]:
            following = chr(ord(path) + 1)
            assert following not in found or found[following].wait(10)
            return tissue

    assert list(_embedded(Slides(), list("abc"))) == [(f"windows of {name}",) for name in "abc"]


def test_first_windows_are_read_at_once_and_the_others_when_they_are_asked_for() -> None:
    read: list[Window] = []

    class Plane:
        def read(self, window: Window) -> GeoImage:
            read.append(window)
            pixels = np.full((1, *window.shape), window.col, np.uint8)
            return GeoImage.from_mask(pixels, pixels >= 0)

    windows = [Window(0, col, 2, 2) for col in (0, 2, 4)]
    source = FirstWindows(Plane(), windows[:2])
    assert read == windows[:2]
    assert [source.read(window).pixels.max() for window in windows] == [0, 2, 4]
    assert read == windows
    # Each is kept until it is given.
    source.read(windows[0])
    assert read == [*windows, windows[0]]


def test_the_first_image_unlike_those_of_training_is_the_one_that_is_named(checkpoint, tmp_path, monkeypatch) -> None:
    paths = write_images(tmp_path, number=16, bright=range(3, 16))
    model = load_classifier(checkpoint)
    bands = InputBands(names=(), dtype="uint8", low=(60.0,) * 3, high=(140.0,) * 3)
    model.spec = replace(model.spec, trained_on=bands)
    read = ClassificationPredictor.read_input

    def read_late(self, path: str):
        time.sleep(0.05 * (path in paths[3:5]))
        return read(self, path)

    monkeypatch.setattr(ClassificationPredictor, "read_input", read_late)
    predictor = ClassificationPredictor(model, ClassificationPredictOptions(num_readers=8, batch_size=2))
    with pytest.warns(DataWarning) as said:
        predictor.run(paths, tmp_path / "found.csv")
    assert [str(each.message).split(" is not like")[0] for each in said] == [paths[3]]


def test_threads_that_open_plain_images_leave_each_others_filters_alone(tmp_path) -> None:
    paths = write_images(tmp_path, number=40)
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        list(load_ahead(paths, lambda path: open_source(path).close(), num_threads=8, depth=40))
    assert said == []
    first, second = plain_images_allowed(), plain_images_allowed()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        warnings.warn("no place", NotGeoreferencedWarning, stacklevel=1)
        assert said == []
        second.__exit__(None, None, None)
        warnings.warn("no place", NotGeoreferencedWarning, stacklevel=1)
        assert len(said) == 1
    others = [each for each in warnings.filters if each[2] is not NotGeoreferencedWarning]
    assert others == [each for each in before if each[2] is not NotGeoreferencedWarning]
    assert len(warnings.filters) - len(others) <= 1


def test_filters_that_are_set_while_plain_images_are_open_stay() -> None:
    with warnings.catch_warnings():
        with plain_images_allowed():
            warnings.simplefilter("error", DataWarning)
        with pytest.raises(DataWarning):
            warnings.warn("of data", DataWarning, stacklevel=1)


def test_filters_can_be_sent_to_other_processes() -> None:
    with warnings.catch_warnings(), plain_images_allowed():
        ours = [each for each in warnings.filters if each[2] is NotGeoreferencedWarning]
        assert ours
        assert pickle.loads(pickle.dumps(ours)) == ours


def test_a_thread_that_needs_a_place_is_warned_while_another_allows_plain_images() -> None:
    def warn() -> int:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            warnings.warn("no place", NotGeoreferencedWarning, stacklevel=1)
        return len(said)

    with plain_images_allowed(), ThreadPoolExecutor(1) as pool:
        assert pool.submit(warn).result() == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tiles_on_a_device_are_the_same_numbers(device) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    tiles = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    moved = to_device(tiles, device)
    assert torch.equal(moved.cpu(), tiles)
    assert moved.is_contiguous(memory_format=torch.channels_last) == (device == "cuda")


class _Moved(torch.nn.Conv2d):
    """A convolution that notes what it is moved with."""

    def __init__(self) -> None:
        super().__init__(3, 4, 3)
        self.given: list[tuple] = []

    def to(self, *args, **kwargs):
        self.given.append((args, kwargs))
        return self


@pytest.mark.parametrize(("device", "is_gpu"), [("cpu", False), ("cuda", True), ("cuda:1", True), ("mps", False)])
def test_weights_are_channels_last_on_gpus_only(device, is_gpu) -> None:
    model = _Moved()
    assert move_to_device(model, device) == device
    layouts = [((), {"memory_format": torch.channels_last})] if is_gpu else []
    assert model.given == [((device,), {}), *layouts]


@pytest.mark.parametrize("backbone", ["performer_vit_tiny_patch16_224", "resnet10t"])
@pytest.mark.parametrize("head", sorted(SEGMENTATION_HEADS))
def test_segmenters_take_weights_and_tiles_that_are_channels_last(backbone, head) -> None:
    kwargs = BACKBONE["backbone_kwargs"] if backbone == BACKBONE["backbone"] else {}
    config = SegmentationModelConfig(backbone=backbone, backbone_kwargs=kwargs, out_indices=[0], head=head)
    spec = SegmentationSpec(classes=("a", "b"), normalizer=NORMALIZER, tile_px=64)
    torch.manual_seed(0)
    model = build_segmenter(config, spec).eval()
    tiles, valid = torch.randn(2, 3, 64, 64), torch.ones(2, 64, 64, dtype=torch.bool)
    valid[:, :20] = False
    with torch.inference_mode():
        expected = model(tiles, valid=valid)
        model.to(memory_format=torch.channels_last)
        found = model(tiles.contiguous(memory_format=torch.channels_last), valid=valid)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("save", [save_classifier, save_slide_classifier, save_small_detector])
def test_other_networks_take_weights_and_tiles_that_are_channels_last(save, tmp_path) -> None:
    more = ("single_label",) if save is save_classifier else ()
    model = perf_vit.load(save(tmp_path / "best.ckpt", *more))
    encode = getattr(model, "embed", model)
    tiles = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = encode(tiles)
        model.to(memory_format=torch.channels_last)
        found = encode(tiles.contiguous(memory_format=torch.channels_last))
    if save is save_small_detector:
        expected, found = ([each.boxes_xyxy for each in every] for every in (expected, found))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_there_is_a_reader_for_each_processor_unless_another_number_is_asked_for(checkpoint, monkeypatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)), raising=False)
    assert predictor_of(checkpoint).num_readers == num_processors() == 6
    assert predictor_of(checkpoint, num_readers=3).num_readers == 3
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    assert num_processors() == 16
