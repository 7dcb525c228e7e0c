"""Parts computed in several threads are those that one thread computes."""

import contextvars
import math
import multiprocessing
import os
import time

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import perf_vit
from perf_vit.layers.chunked import _chunks
from perf_vit.ops.workers import each_in_threads, num_workers

X = torch.zeros(1, 4, 8)


@pytest.fixture(params=[2, 3])
def threads(request):
    """Number of torch's threads during the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    with torch.no_grad():
        if num_workers(X) == 1:
            pytest.skip("OpenMP's threads can't be limited here")
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("number", [0, 1, 2, 5, 7])
def test_results_come_in_order_and_each_thread_computes_alone(threads: int, number: int) -> None:
    with torch.no_grad():
        found = each_in_threads(lambda part: (part, torch.get_num_threads()), range(number), num_workers(X))
    assert [part for part, _ in found] == list(range(number))
    assert {used for _, used in found} <= ({1} if number > 1 else {threads})
    assert torch.get_num_threads() == threads


def test_threads_inherit_modes_and_context(threads: int) -> None:
    variable = contextvars.ContextVar("variable", default="outside")
    variable.set("inside")

    def state(_: int) -> tuple:
        autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled(), *autocast, variable.get()

    with torch.no_grad():
        assert set(each_in_threads(state, range(4), num_workers(X))) == {state(0)}
        with torch.autocast("cpu", torch.bfloat16):
            assert set(each_in_threads(state, range(4), num_workers(X))) == {state(0)}
    with torch.inference_mode():
        assert set(each_in_threads(state, range(4), num_workers(X))) == {state(0)}


def test_errors_reach_the_caller(threads: int) -> None:
    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        each_in_threads(lambda part: 1 / part, [1, 0, 2], num_workers(X))


def test_no_part_is_at_work_after_an_error(threads: int) -> None:
    begun, ended = [], []

    def slow(part: int) -> None:
        if part == 0:
            raise ZeroDivisionError
        begun.append(part)
        time.sleep(0.05)
        ended.append(part)

    with torch.no_grad(), pytest.raises(ZeroDivisionError):
        each_in_threads(slow, range(50), num_workers(X))
    assert sorted(begun) == sorted(ended)
    assert len(ended) < 49


def test_products_compute_alone_where_a_number_of_threads_was_set(threads: int) -> None:
    x = torch.randn(64, 96, 96)

    def product(_: int) -> int:
        torch.bmm(x, x)
        return len(os.listdir("/proc/self/task"))

    with torch.no_grad():
        each_in_threads(float, range(9), num_workers(X))
        before = len(os.listdir("/proc/self/task"))
        assert max(each_in_threads(product, range(9), num_workers(X))) <= before


def test_each_thread_gets_as_many_tokens() -> None:
    for length in (1, 255, 256, 1370, 5330, 21_316, 100_003):
        for number in (1, 2, 3, 4, 10, 64):
            sizes = [len(range(length)[part]) for part in _chunks(length, 1024, number)]
            assert sum(sizes) == length
            assert max(sizes) <= 1024
            if number * 256 <= length:
                assert math.ceil(len(sizes) / number) * max(sizes) <= 1.1 * length / number


def test_one_thread_where_operations_are_recorded_or_watched(threads: int) -> None:
    assert num_workers(X) == 1  # Gradients.
    with torch.no_grad():
        assert num_workers(X) == threads
        assert num_workers(X.to("meta")) == 1
        with FlopCounterMode(display=False):
            assert num_workers(X) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_process_starts_its_own_threads(threads: int) -> None:
    with torch.no_grad():
        each_in_threads(float, range(4), num_workers(X))
    child = multiprocessing.get_context("fork").Process(target=_in_child)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def _in_child() -> None:
    with torch.no_grad():
        assert each_in_threads(float, range(4), num_workers(X)) == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("mixer", ["clustered", "performer"])
def test_a_model_gives_the_same_with_any_number_of_threads(threads: int, mixer: str) -> None:
    torch.manual_seed(0)
    size = {"img_size": (272, 288), "depth": 2, "embed_dim": 96, "num_heads": 6}
    vit = timm.create_model("vit_tiny_patch16_224", **size).eval().double()
    options = {"max_exact_tokens": 0} if mixer == "clustered" else {}
    model = perf_vit.linearize(vit, mixer, **options)
    image = torch.randn(4, 3, 272, 288, dtype=torch.float64)
    with torch.inference_mode():
        found = model(image)
        torch.set_num_threads(1)
        expected = model(image)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
