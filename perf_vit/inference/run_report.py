"""What became of each of many inputs, for people and for programs."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock, Timeout

from perf_vit._version import __version__
from perf_vit.errors import OutputError
from perf_vit.inference.damage import DamagedPiece
from perf_vit.io import check_outputs, write_json

__all__ = ["REPORT", "InputReport", "InputStatus", "RunReport", "check_report", "reserve_report"]

REPORT = "report.json"
"""Name of a run's report in its output folder."""

InputStatus = Literal["done", "skipped-existing", "failed", "busy"]


@dataclass(frozen=True, kw_only=True)
class InputReport:
    """What became of one input.

    Attributes:
        input: its path.
        output: path of its main output.
        status: "skipped-existing" where its outputs were there already, "busy" where another process makes it.
        seconds: spent on it.
        num_windows: of the source.
        num_pixels: of the source.
        num_objects: that were found in this run, None where none are looked for.
        damaged: what couldn't be read and is left out.
        error: one line, None where there is none.
        cause: the error itself, where it isn't lost between processes.
    """

    input: str
    output: str
    status: InputStatus
    seconds: float = 0.0
    num_windows: int = 0
    num_pixels: int = 0
    num_objects: int | None = None
    damaged: tuple[DamagedPiece, ...] = ()
    error: str | None = None
    cause: Exception | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """As plain values of JSON; windows are [row, col, height, width]."""
        return {
            "input": self.input,
            "output": self.output,
            "status": self.status,
            "seconds": round(self.seconds, 3),
            "num_windows": self.num_windows,
            "num_pixels": self.num_pixels,
            **({} if self.num_objects is None else {"num_objects": self.num_objects}),
            "damaged": [{"window": list(astuple(piece.window)), "reason": piece.reason} for piece in self.damaged],
            "error": self.error,
        }


@dataclass
class RunReport:
    """What became of all inputs of a run.

    Attributes:
        inputs: in the order they were finished.
        header: what else is to be known of the run: the model, its settings.
    """

    inputs: list[InputReport] = field(default_factory=list)
    header: Mapping[str, Any] = field(default_factory=dict)

    def count(self, status: InputStatus) -> int:
        """Inputs of a status."""
        return sum(report.status == status for report in self.inputs)

    @property
    def num_damaged(self) -> int:
        """Damaged pieces of all inputs."""
        return sum(len(report.damaged) for report in self.inputs)

    def to_dict(self) -> dict[str, Any]:
        """As plain values of JSON."""
        made = [report for report in self.inputs if report.status == "done"]
        totals = {
            "inputs": len(self.inputs),
            **{status: self.count(status) for status in get_args(InputStatus)},
            "seconds": round(sum(report.seconds for report in self.inputs), 3),
            "num_windows": sum(report.num_windows for report in made),
            "num_pixels": sum(report.num_pixels for report in made),
            "num_damaged": self.num_damaged,
        }
        inputs = [report.to_dict() for report in self.inputs]
        return {"perf_vit_version": __version__, **self.header, "totals": totals, "inputs": inputs}

    def write(self, path: Path) -> None:
        """Write it as JSON, all or nothing.

        Raises:
            OutputError: nothing can be written there.
        """
        write_json(path, self.to_dict())


def check_report(folder: Path, *, overwrite: bool = False) -> None:
    """Refuse a folder where the report would replace a file that is no report of an earlier run.

    Args:
        folder: of the outputs.
        overwrite: allow it.

    Raises:
        OutputError: it would.
    """
    if not (overwrite or _is_report(folder / REPORT)):
        check_outputs([folder / REPORT], [])


@contextmanager
def reserve_report(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """The path of a run's report in its output folder, which is made if need be.

    `report.json`; while another run into the same folder has that, `report-HOST-PROCESS.json`. The report of an
    earlier run is replaced.

    Args:
        folder: of the outputs.
        overwrite: replace any other file of the report's name too.

    Raises:
        OutputError: nothing can be written there, or another file has the report's name.
    """
    path = folder / REPORT
    check_report(folder, overwrite=overwrite)
    lock = FileLock(folder / ".perf_vit-report.lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        yield folder / f"report-{socket.gethostname()}-{os.getpid()}.json"
        return
    except OSError as error:
        not_folder = isinstance(error, FileExistsError | NotADirectoryError)
        reason = "it is no folder" if not_folder else str(error.strerror or error).lower()
        raise OutputError(f"can't write into {folder}: {reason}; several outputs need a folder") from error
    try:
        yield path
    finally:
        with suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()


def _is_report(path: Path) -> bool:
    """Whether a file is the report of a run."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.keys() >= {"perf_vit_version", "totals", "inputs"}
