"""Several processes that share an image compute what one process computes."""

import pytest
import torch
import torch.multiprocessing
from run_stripe import COMPARED, LARGE_SIZE, SMALL_SIZE, run_stripe
from streamed_models import MODELS, Image, build_for, holes, streamed

from perf_vit.errors import InputError, OptionError
from perf_vit.streaming.processes import Processes


@pytest.fixture(scope="module", params=[2, 3])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each process found, by model and size."""
    folder = tmp_path_factory.mktemp("stripes")
    # Forked processes need not import everything again.
    arguments = (str(folder), request.param)
    torch.multiprocessing.start_processes(run_stripe, arguments, nprocs=request.param, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.mark.parametrize("name", MODELS)
def test_stripes_equal_the_image_in_one_process(results: list[dict], name: str) -> None:
    size = SMALL_SIZE
    model, _ = build_for(name, *size)
    expected, (middle,) = streamed(model, Image(*size, holes(*size)), indices=(1,))
    ours = [each[name, size] for each in results]
    assert [each["own"][1] for each in ours[:-1]] == [each["own"][0] for each in ours[1:]]
    assert all(start < stop for start, stop in (each["own"] for each in ours))
    for key, reference in (("tokens", expected), ("middle", middle)):
        whole = torch.cat([each[key] for each in ours])
        everything = reference.store.read(slice(0, reference.layout.num_tokens))
        assert float((whole - everything).norm() / everything.norm()) < 1e-9
    for each in ours:
        torch.testing.assert_close(each["prefix"], expected.normed_prefix(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(each["mean"], expected.mean(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", COMPARED)
def test_traffic_does_not_grow_with_the_image(results: list[dict], name: str) -> None:
    small, large = (results[0][name, size]["num_bytes"] for size in (SMALL_SIZE, LARGE_SIZE))
    if "clustered" not in name:
        # Sums, weights and scales of features of 2 heads in 3 blocks, the mean of the tokens, and a flag of the copy.
        num_features = build_for(name, *SMALL_SIZE)[0].blocks[0].attn.options.num_features
        assert small == large == 3 * 2 * num_features * (16 + 1 + 1) * 8 + 32 * 8 + 4
    else:
        # A sample of less than 8,192 tokens crosses as well.
        assert small < large < small + 3 * 3 * 32 * 8192 * 8


def test_more_processes_than_rows_of_windows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perf_vit.streaming.processes.rank_and_world_size", lambda: (0, 5))
    with pytest.raises(OptionError, match=r"processes must be at most 4 for an image of 64 rows .* got 5; start fewer"):
        Processes().stripe(64, 16)


def test_different_images_in_one_group_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process has another image, so the largest number of all isn't this one's."""
    processes = Processes()
    processes.check_same("a.tif of 3 x 4 tokens")
    monkeypatch.setattr(processes, "reduce", lambda values, operation: torch.maximum(values, torch.tensor([7])))
    with pytest.raises(OptionError, match=r"share one image, but they were given different ones, here a\.tif of 3 x 4"):
        processes.check_same("a.tif of 3 x 4 tokens")


def test_a_process_that_fails_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    processes, given = Processes(), []

    def reduce(values: torch.Tensor, operation: str) -> torch.Tensor:
        given.append(float(values))
        return torch.ones(1)

    monkeypatch.setattr(processes, "reduce", reduce)
    with pytest.raises(InputError, match="another process that shares the image failed"), processes.failing_together():
        pass
    with pytest.raises(OSError, match="mine"), processes.failing_together():
        raise OSError("mine")
    assert given == [0, 1]


@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_stripes_cover_all_rows_in_whole_groups(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    stripes = []
    for rank in range(number):
        monkeypatch.setattr("perf_vit.streaming.processes.rank_and_world_size", lambda rank=rank: (rank, number))
        stripes.append(Processes().stripe(103, 13))
    assert [row for first, stop in stripes for row in range(first, stop)] == list(range(103))
    assert all(first % 13 == 0 and first < stop for first, stop in stripes)
