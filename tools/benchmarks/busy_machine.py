"""How much two busy processes slow a softmax and a converted ViT down, by how the threads of torch wait.

    python tools/benchmarks/busy_machine.py --weights vit.safetensors --size 1022 --size 2044

Three processes time the models in turns, started without OpenMP's variables: as a library with nothing set, as a
library that calls `perf_vit.wait_passively()` after `import torch`, and as the command line starts. Each model runs
alone, then beside `--busy` processes that only count, `--runs` times; the medians count. Run it on an idle machine.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

MIXERS = ("softmax", "clustered")
VARIABLES = ("OMP_", "GOMP_", "KMP_", "MKL_")


class Way(StrEnum):
    """How a process is told to wait."""

    NOTHING = "nothing"
    LIBRARY = "library"
    COMMAND = "command"


TITLES = {
    Way.NOTHING: "nothing set",
    Way.LIBRARY: "perf_vit.wait_passively()",
    Way.COMMAND: "perf-vit",
}


def main(
    weights: Annotated[Path, typer.Option(help="State dict, .safetensors.")],
    model_name: Annotated[str, typer.Option(help="timm's name of the model.")] = "vit_small_patch14_dinov2",
    size: Annotated[list[int] | None, typer.Option(help="Side of an image in pixels; repeat it.")] = None,
    way: Annotated[list[Way] | None, typer.Option(help="How the threads wait; repeat it; default: all.")] = None,
    runs: Annotated[int, typer.Option(help="Timed passes of each model, alone and beside the busy processes.")] = 3,
    busy: Annotated[int, typer.Option(help="Busy processes of one thread.")] = 2,
) -> None:
    """Print a table for each size."""
    for side in size or [1022, 2044]:
        with ExitStack() as stack:
            timers = {each: stack.enter_context(started(each, model_name, weights, side)) for each in way or Way}
            show(list(timers), measured(timers, runs, busy), side, busy)


Seconds = dict[tuple[Way, str, bool], float]
"""Median seconds by way, mixer and whether the machine was busy."""


def measured(timers: dict[Way, subprocess.Popen[str]], runs: int, busy: int) -> Seconds:
    seconds = defaultdict(list)
    for run in range(runs + 1):
        for way, timer in timers.items():
            for mixer in MIXERS:
                for num_busy in (0, busy):
                    with counting(num_busy):
                        took = ask(timer, mixer)
                    # The first pass of each allocates.
                    if run:
                        seconds[way, mixer, bool(num_busy)].append(took)
    return {key: statistics.median(each) for key, each in seconds.items()}


@contextmanager
def counting(num: int) -> Iterator[None]:
    """Keep some processes of one thread busy."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num)]
    # Python takes a moment to start.
    time.sleep(0.3)
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def started(way: Way, model_name: str, weights: Path, size: int) -> Iterator[subprocess.Popen[str]]:
    """A process of this file that answers the name of a mixer with the seconds of a pass."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(VARIABLES)}
    with tempfile.TemporaryDirectory() as folder:
        # The package takes a process for the command line by the name of the script.
        script = Path(folder, "perf-vit" if way is Way.COMMAND else "library.py")
        script.write_text(
            f"import sys; sys.path[0] = {str(Path(__file__).parent)!r}\nimport busy_machine\n{START[way]}"
        )
        command = [sys.executable, str(script), model_name, str(weights), str(size)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()
            process.wait()


# What a process of each way does before it builds the models.
START = {
    Way.NOTHING: "import torch\nbusy_machine.serve()\n",
    Way.LIBRARY: "import torch, perf_vit\nperf_vit.wait_passively()\nbusy_machine.serve()\n",
    # A command as any other of the package, so that its own start is what is measured.
    Way.COMMAND: (
        "from perf_vit.cli import main\nmain.app.command('time')(lambda: busy_machine.serve())\nmain.run(['time'])\n"
    ),
}


def ask(timer: subprocess.Popen[str], mixer: str) -> float:
    assert timer.stdin is not None
    assert timer.stdout is not None
    timer.stdin.write(f"{mixer}\n")
    timer.stdin.flush()
    return float(timer.stdout.readline())


def serve() -> None:
    """Answer with seconds for as long as somebody asks."""
    import torch
    from conversion_speed import model_of, picture

    model_name, weights, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    models, image = {mixer: model_of(model_name, weights, size, mixer) for mixer in MIXERS}, picture(size)
    print("ready", flush=True)
    with torch.inference_mode():
        for line in sys.stdin:
            start = time.perf_counter()
            models[line.strip()].forward_features(image)
            print(time.perf_counter() - start, flush=True)


def show(ways: list[Way], seconds: Seconds, size: int, busy: int) -> None:
    table = Table(title=f"{size} px, {len(os.sched_getaffinity(0))} cores, beside {busy} busy processes")
    for header in ("", *(f"{mixer}, {word}" for mixer in MIXERS for word in ("alone, s", "busy, s", "x")), "ratio"):
        table.add_column(header, justify="right")
    for way in ways:
        row, factors = [TITLES[way]], []
        for mixer in MIXERS:
            alone, beside = seconds[way, mixer, False], seconds[way, mixer, True]
            factors.append(beside / alone)
            row += [f"{alone:.2f}", f"{beside:.2f}", f"{beside / alone:.2f}"]
        table.add_row(*row, f"{factors[1] / factors[0]:.2f}")
    Console(width=160).print(table)
    print("x: times as long as alone; ratio: x of the converted model, divided by that of softmax")


if __name__ == "__main__":
    typer.run(main)
