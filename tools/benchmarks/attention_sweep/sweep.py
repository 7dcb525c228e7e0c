"""One pass over the lengths: every contender that is still fast enough, forward, then forward and backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from contenders import Contender
from memory import peak_extra_bytes
from settings import FORWARD, PASSES, AttentionBenchmark
from torch import Tensor
from verify import draw_inputs

from perf_vit.workflows.conversion_report import Call, alternating_medians

__all__ = ["Measurement", "sweep_lengths"]


@dataclass(frozen=True)
class Measurement:
    """One contender at one length.

    Attributes:
        contender: its name.
        direction: "forward" or "forward+backward".
        length: tokens, L.
        seconds: median of a call; NaN where the contender was left out.
        peak_bytes: most memory above inputs and outputs; NaN where it was left out.
    """

    contender: str
    direction: str
    length: int
    seconds: float = math.nan
    peak_bytes: float = math.nan


def sweep_lengths(
    settings: AttentionBenchmark,
    contenders: list[Contender],
    on_start: Callable[[str, int], None] = lambda direction, length: None,
) -> list[Measurement]:
    """Measure all contenders at all lengths, in both directions.

    Args:
        settings: lengths, sizes, runs and the cap on seconds.
        contenders: what to measure.
        on_start: told (direction, length) before each round.
    """
    measured: list[Measurement] = []
    for direction in PASSES:
        for length in settings.lengths:
            on_start(direction, length)
            past = [m for m in measured if m.direction == direction]
            present = [c for c in contenders if direction in c.passes]
            fast = [c for c in present if _expected_seconds(c, length, past) <= settings.max_seconds]
            round_ = {m.contender: m for m in _measure_round(settings, fast, direction, length)}
            measured += [round_.get(c.name, Measurement(c.name, direction, length)) for c in present]
    return measured


def _expected_seconds(contender: Contender, length: int, past: list[Measurement]) -> float:
    """From the contender's last length, along its growth; 0 at the first, NaN for one that was left out."""
    own = [m for m in past if m.contender == contender.name]
    return own[-1].seconds * (length / own[-1].length) ** contender.growth if own else 0.0


def _measure_round(
    settings: AttentionBenchmark, contenders: list[Contender], direction: str, length: int
) -> Iterator[Measurement]:
    calls = {c.name: _make_call(settings, c, direction, length) for c in contenders}
    seconds = alternating_medians(calls, settings.num_runs, settings.device)
    for name, call in calls.items():
        yield Measurement(name, direction, length, seconds[name], peak_extra_bytes(call, settings.device))


def _make_call(settings: AttentionBenchmark, contender: Contender, direction: str, length: int) -> Call:
    q, k, v = draw_inputs(settings, length, settings.torch_dtype)
    if direction == FORWARD:
        return torch.no_grad()(lambda: (contender.attend(q, k, v),))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    grad_output = torch.ones_like(v)

    def forward_backward() -> tuple[Tensor, ...]:
        output = contender.attend(q, k, v)
        return (output, *torch.autograd.grad(output, inputs, grad_output))

    return forward_backward
