"""Causal attention beside bidirectional attention: time of the forward pass and of a training step, and memory.

    python tools/benchmarks/causal.py --length 4096 --length 16384 --length 65536

One thread, float32, batch of one, the default sizes of chunks. Both run in turns in one process; a training step is
forward and backward. Memory is the growth of the anonymous memory (RssAnon) of a fresh process for each measurement,
less what the call returns: the output, and the gradients of queries, keys and values.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from anonymous_memory import AnonymousPeak

from perf_vit.ops import draw_projection, favor_attention
from perf_vit.ops.kernels import get_kernel
from perf_vit.workflows.progress import say

WAYS = [(causal, training) for training in (False, True) for causal in (False, True)]


def main(
    length: Annotated[list[int] | None, typer.Option(help="Number of tokens; repeatable.")] = None,
    kernel: Annotated[str, typer.Option(help="Name of the kernel.")] = "softmax+",
    num_features: Annotated[int, typer.Option(help="Random features.")] = 256,
    num_heads: Annotated[int, typer.Option(help="Heads.")] = 6,
    head_dim: Annotated[int, typer.Option(help="Channels of a head.")] = 64,
    runs: Annotated[int, typer.Option(help="Timed calls of each; the medians count.")] = 5,
    memory: Annotated[bool, typer.Option(help="Measure memory, too.")] = True,
) -> None:
    """Print a table of milliseconds, ratios and MiB."""
    torch.set_num_threads(1)
    say(f"{kernel}, M = {num_features}, H = {num_heads}, D = {head_dim}; milliseconds of CPU time, growth in MiB")
    say("| tokens | pass | bidirectional | causal | ratio | MiB, bidirectional | MiB, causal |")
    say("|---|---|---|---|---|---|---|")
    for tokens in length or [4096, 16384, 65536]:
        make = partial(make_call, tokens, kernel, num_features, num_heads, head_dim)
        seconds = measured({way: make(*way) for way in WAYS}, runs)
        for training in (False, True):
            milliseconds = [1e3 * seconds[causal, training] for causal in (False, True)]
            cells = [f"{each:,.1f}" for each in milliseconds] + [f"{milliseconds[1] / milliseconds[0]:.2f}"]
            if memory:
                cells += [f"{growth(partial(make, causal, training)):,.0f}" for causal in (False, True)]
            say(f"| {tokens:,} | {'training step' if training else 'forward'} | {' | '.join(cells)} |")


def make_call(
    tokens: int, kernel: str, num_features: int, num_heads: int, head_dim: int, causal: bool, training: bool
) -> Callable[[], list[Tensor]]:
    """Return a function that runs attention and returns its output, and the gradients if `training`."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, num_heads, tokens, head_dim, generator=generator) for _ in range(3))
    projection = draw_projection(num_features, head_dim, generator=generator, kernel=get_kernel(kernel))
    # Short enough that the random features are of use.
    leaves = [(x / 2 if x is not v else x).requires_grad_(training) for x in (q, k, v)]

    def call() -> list[Tensor]:
        out = favor_attention(*leaves, projection, kernel, causal=causal)
        return [out.detach(), *torch.autograd.grad(out.sum(), leaves)] if training else [out]

    return call


def measured(calls: dict[tuple[bool, bool], Callable[[], object]], runs: int) -> dict[tuple[bool, bool], float]:
    """Return the median CPU seconds of calls, made in turns after one that warms up."""
    seconds: dict[tuple[bool, bool], list[float]] = {way: [] for way in calls}
    for run in range(runs + 1):
        for way, call in calls.items():
            start = time.process_time()
            call()
            if run:
                seconds[way].append(time.process_time() - start)
    return {way: statistics.median(each) for way, each in seconds.items()}


def growth(make: Callable[[], Callable[[], list[Tensor]]]) -> float:
    """Return by how many MiB a fresh process grows in the first call, less the tensors that it returns."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(growth_here, make).result()


def growth_here(make: Callable[[], Callable[[], list[Tensor]]]) -> float:
    torch.set_num_threads(1)
    call = make()
    watch = AnonymousPeak()
    returned = call()
    return watch.stop() - sum(each.numel() * each.element_size() for each in returned) / 2**20


if __name__ == "__main__":
    typer.run(main)
