"""The map of a whole image in one forward pass."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import timm
import torch
from affine import Affine
from command_line import call
from small_models import save_segmenter, write_half_empty

import perf_vit
from perf_vit.errors import CheckpointError, DamagedDataError, NotFiniteError, OptionError, OutputError
from perf_vit.inference import SegmentationPredictOptions, SegmentationPredictor, whole_plan
from perf_vit.inference.whole import WholeImage
from perf_vit.models import SegmentationModelConfig, build_segmenter
from perf_vit.sources import SlideSource
from perf_vit.streaming.journal import TokenJournal
from perf_vit.types import Window
from perf_vit.workflows.predict import plan


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and a raster of 96 x 160 px whose columns from 70 on are nodata."""
    folder = tmp_path_factory.mktemp("whole")
    write_half_empty(folder / "scene.tif")
    return save_segmenter(folder / "model.ckpt"), folder / "scene.tif"


def predict(files: tuple[Path, Path], out: Path, **options):
    return perf_vit.predict(*files, out, progress=False, **{"whole": True, **options})


def expected(files: tuple[Path, Path]) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of the whole scene in one forward pass in memory, and valid pixels."""
    model = perf_vit.load(files[0]).eval()
    source = model.spec.open(files[1])
    image = source.read(Window(0, 0, 96, 160))
    with torch.inference_mode():
        pixels = torch.from_numpy(model.spec.normalizer(image))[None]
        scores = model(pixels, valid=torch.from_numpy(image.valid)[None])[0]
    return scores.softmax(0).numpy(), image.valid


def test_the_map_is_that_of_a_forward_pass_in_memory(files, tmp_path) -> None:
    done = predict(files, tmp_path / "map.tif", kind="probabilities", quicklook=True)
    assert (done.made, done.num_windows, done.num_pixels) == (True, 1, 96 * 160)
    probabilities, valid = expected(files)
    with rasterio.open(tmp_path / "map.tif") as found, rasterio.open(files[1]) as scene:
        np.testing.assert_allclose(found.read()[:, valid], probabilities[:, valid], atol=1e-5)
        assert np.isnan(found.read()[:, ~valid]).all()
        assert (found.crs, found.transform) == (scene.crs, scene.transform)
        assert found.tags()["PERF_VIT_WHOLE"] == "float32"
        assert "PERF_VIT_WINDOW_SIZE" not in found.tags()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.png", "map.tif"]
    assert not predict(files, tmp_path / "map.tif", kind="probabilities").made


@pytest.mark.parametrize("store", ["memory", "bfloat16"])
def test_tokens_may_be_elsewhere(files, tmp_path, store: str) -> None:
    predict(files, tmp_path / "map.tif", store=store, token_folder=tmp_path / "scratch")
    probabilities, valid = expected(files)
    with rasterio.open(tmp_path / "map.tif") as found:
        agree = found.read(1)[valid] == probabilities.argmax(0)[valid]
    assert agree.mean() > (0.999 if store == "memory" else 0.95)
    assert not any((tmp_path / "scratch").glob("*"))


def test_bands_of_any_height_give_the_same_map(files, monkeypatch) -> None:
    predictor = SegmentationPredictor(files[0], SegmentationPredictOptions(whole=True))
    source = predictor.open(files[1])
    probabilities, valid = expected(files)
    whole = WholeImage(predictor.model.eval(), source, 2)
    tokens = whole.tokens(None, torch.float32, lambda done, total: None)
    monkeypatch.setattr("perf_vit.inference.whole._STRIP_ROWS", 30)
    whole._part = 3, 4
    strips = list(whole.strips(tokens, (0, 96), lambda done, total: None))
    assert [(strip.window.row, strip.window.height) for strip in strips] == [(0, 30), (30, 18), (48, 30), (78, 18)]
    scores = torch.from_numpy(np.concatenate([strip.scores for strip in strips], axis=1)).softmax(0).numpy()
    np.testing.assert_allclose(scores[:, valid], probabilities[:, valid], atol=1e-5)
    # The rows that are wanted lie in the second band.
    assert [strip.window.row for strip in whole.strips(tokens, (50, 60), lambda done, total: None)] == [48, 78]
    with torch.no_grad():
        predictor.model.head.classifiers[0][2].bias.fill_(torch.inf)
    with pytest.raises(NotFiniteError, match=r"scene\.tif: scores of Window\(.* are not finite"):
        list(whole.strips(tokens, (0, 96), lambda done, total: None))


def test_options_of_windows_are_refused(files, tmp_path) -> None:
    for options, message in (
        ({"window_size": 32}, "window_size is of windows, and `whole` has none"),
        ({"flips": True}, "flips is of windows"),
        ({"precision": "bf16"}, "precision is of windows"),
        ({"device": "cuda"}, "device must be cpu with `whole`, got cuda"),
        ({"store": "int8"}, "store must be one of float32, bfloat16, float16, memory, got int8"),
        ({"store": "memory", "whole": False}, "store is for `whole`; leave it out"),
        ({"engine": "ray"}, "engine ray shares windows"),
    ):
        with pytest.raises(OptionError, match=message):
            predict(files, tmp_path / "map.tif", **options)
    softmax = SegmentationModelConfig(
        backbone="vit_tiny_patch16_224", backbone_kwargs={"depth": 1, "embed_dim": 32, "num_heads": 2}, head="linear"
    )
    spec = perf_vit.load(files[0]).spec
    with pytest.raises(
        CheckpointError, match=r"block 0 has softmax attention .* convert the model with perf_vit\.linear"
    ):
        perf_vit.predict(
            build_segmenter(softmax, spec), files[1], tmp_path / "map.tif", whole=True, progress=False
        )  # fmt: skip
    with pytest.raises(CheckpointError, match="must be a plain ViT of perf_vit with a head"):
        perf_vit.predict(torch.nn.Conv2d(3, 2, 1), files[1], tmp_path / "map.tif", whole=True, progress=False)
    assert not list(tmp_path.iterdir())


def test_relative_biases_are_refused(files) -> None:
    model = timm.create_model("vit_relpos_small_patch16_224", depth=1, embed_dim=32, num_heads=2).eval()
    with pytest.raises(CheckpointError, match="got VisionTransformerRelPos with relative position biases, which need"):
        perf_vit.stream(model, files[1], progress=False)


def test_several_images_give_a_map_each(files, tmp_path) -> None:
    other = tmp_path / "other.tif"
    other.write_bytes(files[1].read_bytes())
    report = perf_vit.predict(files[0], [files[1], other], tmp_path / "maps", whole=True, progress=False)
    assert [each.status for each in report.inputs] == ["done", "done"]
    with rasterio.open(tmp_path / "maps/scene.tif") as first, rasterio.open(tmp_path / "maps/other.tif") as second:
        assert (first.read() == second.read()).all()


class Stop:
    """Progress that raises an error after some rows of tokens."""

    def __init__(self, error: type[BaseException], after: int) -> None:
        self.error, self.after, self.calls = error, after, []

    def __call__(self, done: int, total: int) -> None:
        self.calls.append((done, total))
        if done >= self.after:
            raise self.error


@pytest.mark.parametrize(
    ("error", "keep_tokens", "is_kept"),
    [(RuntimeError, False, True), (KeyboardInterrupt, False, False), (KeyboardInterrupt, True, True)],
)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_an_interrupted_map_goes_on(
    files, tmp_path, error: type[BaseException], keep_tokens: bool, is_kept: bool, elsewhere: bool
) -> None:
    given = {"token_folder": tmp_path / "scratch"} if elsewhere else {}
    options = SegmentationPredictOptions(whole=True, keep_tokens=keep_tokens, **given)
    predict(files, tmp_path / "expected.tif")
    # In the pass of the only block.
    stop = Stop(error, 14)
    with pytest.raises(error):
        SegmentationPredictor(files[0], options).run(files[1], tmp_path / "map.tif", on_progress=stop)
    kept = list((tmp_path / "scratch").glob("*/journal.json") if elsewhere else tmp_path.glob("*/tokens/journal.json"))
    assert len(kept) == is_kept
    goes_on = Stop(error, 10**6)
    SegmentationPredictor(files[0], options).run(files[1], tmp_path / "map.tif", on_progress=goes_on)
    # Six rows of tokens: they are embedded, collected, attended to and given to the head.
    assert goes_on.calls[-1] == (24, 24)
    assert (goes_on.calls[0][0] > 6) == is_kept
    assert (tmp_path / "map.tif").read_bytes() == (tmp_path / "expected.tif").read_bytes()
    assert not any((tmp_path / "scratch").glob("*"))
    assert not any(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_tokens_stay_until_the_last_rows_are_on_disk(files, tmp_path, monkeypatch, elsewhere: bool) -> None:
    given = {"token_folder": tmp_path / "scratch"} if elsewhere else {}
    options = SegmentationPredictOptions(whole=True, **given)

    def fail(*_: object) -> None:
        raise OutputError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="the disk is full"):
        patch.setattr("perf_vit.writers.StripStore.write", fail)
        SegmentationPredictor(files[0], options).run(files[1], tmp_path / "map.tif")
    goes_on = Stop(RuntimeError, 10**6)
    SegmentationPredictor(files[0], options).run(files[1], tmp_path / "map.tif", on_progress=goes_on)
    # Only the head is left to do.
    assert goes_on.calls == [(6, 6)]
    assert not any((tmp_path / "scratch").glob("*"))
    assert [path.name for path in tmp_path.glob("map*")] == ["map.tif"]


def test_tokens_that_stayed_after_the_last_row_are_deleted_by_the_next_call(files, tmp_path, monkeypatch) -> None:
    options = SegmentationPredictOptions(whole=True, token_folder=tmp_path / "scratch")
    remove = TokenJournal.remove

    def remove_or_end(journal: TokenJournal) -> None:
        if journal.num_done is not None:
            raise RuntimeError
        remove(journal)

    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(TokenJournal, "remove", remove_or_end)
        SegmentationPredictor(files[0], options).run(files[1], tmp_path / "map.tif")
    assert any((tmp_path / "scratch").glob("*/*.bin"))
    progress = Stop(RuntimeError, 10**6)
    assert SegmentationPredictor(files[0], options).run(files[1], tmp_path / "map.tif", on_progress=progress).made
    # All rows were there.
    assert not progress.calls
    assert not any((tmp_path / "scratch").glob("*"))


@pytest.fixture
def damaged_files(files, tmp_path) -> tuple[Path, Path]:
    """A checkpoint, and a raster of 160 x 160 px of which a block of 64 px can't be read."""
    path = tmp_path / "damaged.tif"
    pixels = np.random.default_rng(0).integers(1, 255, (3, 160, 160)).astype(np.uint8)
    with rasterio.open(
        path, "w", driver="GTiff", height=160, width=160, count=3, dtype="uint8", crs="EPSG:32636", compress="deflate",
        transform=Affine(0.5, 0, 500_000, 0, -0.5, 4_000_000), tiled=True, blockxsize=64, blockysize=64,
        interleave="pixel",
    ) as file:  # fmt: skip
        file.write(pixels)
    with rasterio.open(path) as file:
        place = int(file.get_tag_item("BLOCK_OFFSET_1_1", "TIFF", bidx=1))
    content = bytearray(path.read_bytes())
    content[place : place + 5000] = bytes(5000)
    path.write_bytes(content)
    return files[0], path


@pytest.mark.parametrize("elsewhere", [False, True])
def test_damage_that_tokens_were_made_with_is_in_the_map_that_goes_on(damaged_files, tmp_path, elsewhere) -> None:
    given = {"whole": True, **({"token_folder": tmp_path / "scratch"} if elsewhere else {})}
    skip = SegmentationPredictOptions(on_error="skip", **given)
    expected = SegmentationPredictor(damaged_files[0], skip).run(damaged_files[1], tmp_path / "expected.tif")
    assert len(expected.damaged) >= 1
    out = tmp_path / "map.tif"
    with pytest.raises(RuntimeError):
        SegmentationPredictor(damaged_files[0], skip).run(damaged_files[1], out, on_progress=Stop(RuntimeError, 14))
    assert (tmp_path / "map.tif.partial").exists() != elsewhere
    with pytest.raises(OutputError, match=r"unfinished tokens made with on_error = skip, now stop; .*`resume=False`"):
        perf_vit.predict(*damaged_files, out, progress=False, **given)
    assert SegmentationPredictor(damaged_files[0], skip).run(damaged_files[1], out).damaged == expected.damaged
    assert out.read_bytes() == (tmp_path / "expected.tif").read_bytes()
    assert not any((tmp_path / "scratch").glob("*"))


def test_damaged_pieces_are_those_that_the_map_leaves_out(damaged_files, tmp_path, monkeypatch) -> None:
    # The head reads other windows than the embedding, so other pieces can't be read.
    monkeypatch.setattr("perf_vit.streaming.dense.DenseHead.part_size", lambda self, rows: (2, 3))
    options = SegmentationPredictOptions(on_error="skip", whole=True)
    made = SegmentationPredictor(damaged_files[0], options).run(damaged_files[1], tmp_path / "map.tif")
    left_out = np.zeros((160, 160), bool)
    for piece in made.damaged:
        left_out[piece.window.row : piece.window.row_stop, piece.window.col : piece.window.col_stop] = True
    with rasterio.open(tmp_path / "map.tif") as found:
        np.testing.assert_array_equal(found.read_masks(1) == 0, left_out)
    assert 64 * 64 <= left_out.sum() < 160 * 160


def test_tokens_of_another_model_are_refused(files, tmp_path) -> None:
    options = {"whole": True, "token_folder": tmp_path / "scratch"}
    first = SegmentationPredictor(files[0], SegmentationPredictOptions(**options))
    with pytest.raises(RuntimeError):
        first.run(files[1], tmp_path / "map.tif", on_progress=Stop(RuntimeError, 14))
    other = save_segmenter(tmp_path / "other.ckpt", target="another")
    with pytest.raises(OutputError, match=r"unfinished tokens made with model = .* begin again with `resume=False`"):
        perf_vit.predict(other, files[1], tmp_path / "map.tif", progress=False, **options)
    # They stay as they are.
    assert len(list((tmp_path / "scratch").glob("*/tokens.bin"))) == 1
    assert perf_vit.predict(other, files[1], tmp_path / "map.tif", progress=False, **options, resume=False).made
    assert not any((tmp_path / "scratch").glob("*"))


def test_a_plan_tells_what_a_map_takes(files, tmp_path, monkeypatch) -> None:
    found = plan(*files, tmp_path / "map.tif", whole=True)
    # One block: embedded, collected, attended to, given to the head; its input and its output are files.
    assert (found.grid, found.num_tokens, found.num_trips, found.num_files) == ((6, 10), 60, 4, 2)
    assert found.disk_bytes == 2 * 60 * 64 * 4
    assert found.seconds > 0
    assert found.timed == (6, 10)
    in_memory = plan(*files, tmp_path / "map.tif", whole=True, store="memory")
    assert in_memory.disk_bytes == 0
    assert in_memory.memory_bytes == found.memory_bytes + 60 * 64 * 4
    replace(found, free_disk=10**9, free_memory=10**10).check()
    for change, message in (
        (
            {"free_disk": 1000},
            r"the tokens need .* GB in .*map\.tif\.partial/tokens, got 0\.0 GB free; give `token_f",
        ),
        ({"free_memory": 1000}, r"a whole image needs .* GB of memory, got 0\.0 GB free; use more memory, or windows"),
        ({"free_memory": 1000, "folder": None}, "use `store=float32` for a file"),
    ):
        with pytest.raises(OutputError, match=message):
            replace(found, **change).check()
    with pytest.raises(OptionError, match="plan is of the map of one image with `whole`"):
        plan(*files, tmp_path / "map.tif")
    # Every run begins with the check.
    monkeypatch.setattr("perf_vit.inference.whole_plan._free_memory", lambda: 1000)
    with pytest.raises(OutputError, match="a whole image needs"):
        predict(files, tmp_path / "map.tif")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("listed", "folder", "files_of_group", "expected"),
    [
        ("0::/job\n", "job", {"max": "7000\n", "current": "5000\n", "stat": "anon 2000\nactive_file 1000\n"}, 3000),
        ("0::/job\n", ".", {"max": "7000\n", "current": "9000\n", "stat": ""}, 0),
        ("0::/job\n", "job", {"max": "max\n", "current": "5000\n", "stat": ""}, 8 * 1024),
        ("0::/job\n", "job", {"max": "99999\n", "current": "5000\n", "stat": ""}, 8 * 1024),
        (
            "4:memory:/job\n0::/\n",
            "memory/job",
            {
                "limit_in_bytes": "7000\n",
                "usage_in_bytes": "5000\n",
                "stat": "active_file 1\ntotal_inactive_file 500\n",
            },
            2500,
        ),
        ("4:memory:/job\n", "memory", {"limit_in_bytes": f"{2**63}\n", "usage_in_bytes": "5\n", "stat": ""}, 8 * 1024),
        ("", ".", {}, 8 * 1024),
    ],
)
def test_free_memory_is_that_of_the_machine_and_of_its_container(
    monkeypatch, tmp_path, listed: str, folder: str, files_of_group: dict[str, str], expected: int
) -> None:
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for name, text in files_of_group.items():
        (tmp_path / folder / f"memory.{name}").write_text(text)
    (tmp_path / "listed").write_text(listed)
    (tmp_path / "meminfo").write_text("MemTotal: 16 kB\nMemAvailable: 8 kB\n")
    monkeypatch.setattr("perf_vit.threads._CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr("perf_vit.threads._LISTED_GROUPS", tmp_path / "listed")
    monkeypatch.setattr("perf_vit.inference.whole_plan._MEMORY_INFO", tmp_path / "meminfo")
    assert whole_plan._free_memory() == expected


def test_the_command_prints_the_plan_and_ends(files, tmp_path, capsys) -> None:
    out = tmp_path / "map.tif"
    command = ["predict", "--checkpoint", str(files[0]), "--input", str(files[1]), "--output", str(out), "--whole"]
    assert call([*command, "--plan"]) == 0
    printed = capsys.readouterr().out
    for text in ("60 of 6 x 10", "4 over the image", "from 6 x 10 tokens", "2 files of tokens"):
        assert text in printed
    assert not list(tmp_path.iterdir())
    assert call([*command, "--keep-tokens", "--no-report"]) == 0
    assert out.exists()


def test_files_of_tokens_are_let_go_of_before_their_folder_goes(files, tmp_path, monkeypatch) -> None:
    """Windows deletes no file that is mapped into memory."""
    real, mapped = TokenJournal.remove, []

    def remove(journal: TokenJournal) -> None:
        names = [path.name for path in journal.folder.glob("*.bin")]
        mapped.append([name for name in names if name in Path("/proc/self/maps").read_text()])
        real(journal)

    monkeypatch.setattr(TokenJournal, "remove", remove)
    predict(files, tmp_path / "map.tif", token_folder=tmp_path / "scratch", store="float32")
    assert mapped
    assert not any(mapped)


def test_a_level_that_cannot_be_read_is_no_reason_to_refuse_a_slide(monkeypatch) -> None:
    def read_reduced(source: SlideSource, size: int) -> None:
        raise DamagedDataError("level 3 is damaged")

    monkeypatch.setattr(SlideSource, "read_reduced", read_reduced)
    assert whole_plan._valid_share(object.__new__(SlideSource)) == 1.0
