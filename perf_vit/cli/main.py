"""The `perf-vit` command."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Annotated, Any

import typer

from perf_vit._version import __version__
from perf_vit.cli.arguments import with_flags
from perf_vit.cli.configs import CommandWithKeys, config, init
from perf_vit.cli.convert_and_info import convert, demo, info
from perf_vit.cli.predict import evaluate, predict
from perf_vit.cli.train import distill, fit_tile, train
from perf_vit.errors import DataWarning, PerfVitError, is_out_of_memory, reason_line
from perf_vit.threads import wait_passively
from perf_vit.workflows.progress import note_to_stdout, say, say_line, show_any_text

__all__ = ["app", "run"]

app = typer.Typer(
    name="perf-vit",
    help="Vision transformers with linear attention for imagery too large to downsample.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(init)
# Overrides with dashes reach the config loader, whose error says how they are written.
_WITH_KEYS: tuple[Callable[..., None], ...] = (train, fit_tile, distill)
for _trainer in _WITH_KEYS:
    app.command(cls=CommandWithKeys, context_settings={"ignore_unknown_options": True})(_trainer)
for _command in (predict, evaluate, convert, info, config, demo):
    app.command()(_command)


def _print_version(value: bool) -> None:
    if value:
        say(f"perf-vit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Version.")
    ] = False,
) -> None:
    pass


@cache
def _group() -> Any:
    """Group of all commands, built once: reading the signatures of all commands takes longer than most errors."""
    return typer.main.get_command(app)


def run(args: list[str] | None = None) -> None:
    """Run the command line and exit: 0 when all went well, 2 with one line on stderr for what a user can mend."""
    wait_passively()
    show_any_text()
    note_to_stdout()
    sys.unraisablehook = _unraisable
    try:
        with _warnings_as_lines():
            _group()(args)
    except PerfVitError as error:
        sys.exit(_fail(_own_words(error)))
    except (OSError, MemoryError) as error:
        sys.exit(_fail(f"{type(error).__name__}: {error}"))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        hint = (
            "give a smaller --batch-size or --window-size to predict and evaluate, smaller batches or tiles to others"
        )
        sys.exit(_fail(f"MemoryError: {reason_line(error)}; {hint}"))


def _unraisable(found: sys.UnraisableHookArgs) -> None:
    """Say nothing of GDAL's messages that aren't text, which rasterio can't log; the error that follows says enough."""
    if not (isinstance(found.exc_value, UnicodeDecodeError) and "rasterio" in str(found.object)):
        sys.__unraisablehook__(found)


def _own_words(error: PerfVitError) -> str:
    """What an error says; one of a data loader's worker comes with the traceback of that process before it."""
    text = str(error)
    if "Traceback (most recent call last)" not in text:
        return with_flags(error, text, _group())
    name = f"{type(error).__name__}: "
    return text[text.rindex(name) + len(name) :] if name in text else text.strip().splitlines()[-1]


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Print each warning about the data once a run, as one line without the code that found it."""
    told: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("always", DataWarning)
        # Of rasterio, where polygons are burnt in pixels; whatever needs a place says so itself.
        warnings.filterwarnings("ignore", "Dataset has no geotransform")
        other = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **options: Any) -> None:
            if not issubclass(category, DataWarning):
                other(message, category, *place, **options)
            elif str(message) not in told:
                told.add(str(message))
                say_line("Warning", str(message))

        warnings.showwarning = show
        yield


def _fail(message: str) -> int:
    say_line("Error", message)
    return 2
