"""The one mechanism of all predictions: what outputs are made of, what is there already, what was begun."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from perf_vit._version import __version__
from perf_vit.errors import OutputError
from perf_vit.inference.jobs.identity import OutputRecord
from perf_vit.inference.jobs.journal import Journal, check_partial_folder, discard_journal, open_journal
from perf_vit.inference.jobs.logs import DamagedPiece, DamageLog
from perf_vit.inference.options import PredictOptions
from perf_vit.writers import check_outputs, existing_error, existing_outputs

__all__ = ["Job", "JobResult", "RecordedJob"]


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """What became of a job.

    Attributes:
        made: False where its outputs existed already.
        out: Path of the main output.
        num_windows: Windows of the input.
        num_pixels: Pixels of the input.
        num_objects: Objects found in this call, None where none are looked for.
        score_threshold: Lowest score of these objects.
        num_rows: Inputs in a table but those that failed, None for other outputs.
        damaged: Parts of the input that couldn't be read and were skipped.
        failed: Errors of inputs of a table that were skipped, by path.
    """

    made: bool
    out: Path | None = None
    num_windows: int = 0
    num_pixels: int = 0
    num_objects: int | None = None
    score_threshold: float | None = None
    num_rows: int | None = None
    damaged: tuple[DamagedPiece, ...] = ()
    failed: Mapping[str, str] | None = None


class Job(ABC):
    """A set of outputs, and everything that decides what they hold.

    Subclasses say what that is; `work` gives the journal of what is left to do, or None where nothing is.

    Attributes:
        out: Main output, which appears last.
        beside: Further outputs that are made with it.
        input_files: Files that are read, none of which may be replaced.
        options: Options of the prediction.
    """

    out: Path
    options: PredictOptions
    _what = "this model's output of this input"

    @property
    def beside(self) -> Sequence[Path]:
        """Further outputs; none by default."""
        return ()

    @property
    def files(self) -> list[Path]:
        """All files that may be written."""
        return [self.out, *self.beside]

    @property
    @abstractmethod
    def input_files(self) -> Sequence[str]:
        """Files that are read."""

    @property
    @abstractmethod
    def begun_with(self) -> Mapping[str, Any]:
        """Plain values that must be the same to go on with what an interrupted call left."""

    @abstractmethod
    def is_done(self, found: Sequence[Path]) -> bool:
        """Whether all outputs are there; refuses those that are not of this job.

        Args:
            found: Outputs that exist, at least one.

        Raises:
            OutputError: Names the first that is another's.
        """

    def check(self) -> bool:
        """Whether nothing is to be done; refuses to replace files that are not this job's.

        Raises:
            OutputError: An output is an input, or exists without `overwrite` and is not of this job.
        """
        check_outputs(self.files, self.input_files, overwrite=True)
        check_partial_folder(self.out)
        found = existing_outputs([self.out, *self.beside])
        return bool(found) and not self.options.overwrite and self.is_done(found)

    @contextmanager
    def work(self) -> Iterator[Journal | None]:
        """Give the journal to finish the job in, alone among all processes; None where nothing is to be done.

        Raises:
            BusyError: Another process works on it.
            OutputError: As `check` says; or the outputs were begun with other settings, or can't be written.
        """
        if self.check():
            discard_journal(self.out)
            yield None
            return
        with open_journal(self.out) as journal:
            # Another process may have finished it between the look above and the lock.
            if self.check():
                yield None
                return
            journal.begin({**self.begun_with, "version": __version__}, resume=self.options.resume)
            if self.options.on_error == "stop" and DamageLog(journal.folder).pieces():
                raise OutputError(
                    f"{journal.folder} holds the unfinished {self.out.name}, made with `on_error=skip`, without the "
                    "parts that can't be read; go on with skip, or begin again with `resume=False`"
                )
            yield journal

    def _other(self, path: Path, reason: str) -> OutputError:
        return existing_error(path, f", but {reason}" if reason else "")


class RecordedJob(Job):
    """A job whose identity is kept in a hidden file next to its outputs, as their formats have no place for it.

    `.NAME.perf_vit.json` holds the identity and a fingerprint of each output, so outputs that were edited since are
    never taken for those of the job.
    """

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """Plain values that decide what the outputs hold: model, settings and content of the inputs."""

    @abstractmethod
    def changed_since(self, out: Path) -> bool:
        """Whether an input is newer than an output."""

    @cached_property
    def _record(self) -> OutputRecord:
        return OutputRecord(self.out)

    @property
    def files(self) -> list[Path]:
        """All files that may be written, with the record."""
        return [*super().files, self._record.path]

    def check(self) -> bool:
        """Whether nothing is to be done; see `Job.check`."""
        check_outputs(self.files, self.input_files, overwrite=True)
        if not self.options.overwrite and self._record.is_foreign():
            raise self._other(self._record.path, "was not made by perf_vit")
        return super().check()

    def is_done(self, found: Sequence[Path]) -> bool:
        """Whether all recorded outputs are there; see `Job.is_done`."""
        content = self._record.read()
        if content is None:
            raise self._other(found[0], "")
        if content["identity"] != self._record.plain(self.identity) or self.changed_since(found[0]):
            raise self._other(found[0], f"not as {self._what} with these settings, or is older than the input")
        if self.options.on_error == "stop" and content["num_damaged"]:
            raise self._other(found[0], "without parts of the input that couldn't be read")
        for path in found:
            if not self._record.holds(path, content):
                raise self._other(path, "was changed since it was made" if path == self.out else "")
        return self._record.is_complete(found, content)

    def finish(self, journal: Journal, made: Mapping[Path, Path], *, num_damaged: int = 0) -> None:
        """Put finished files under their names, the main output last, and keep what they are.

        Args:
            journal: Journal of `work`.
            made: Output to the finished file in the journal's folder, with the main output. One that an interrupted
                call has moved already needs no file.
            num_damaged: Parts of the inputs that were skipped.

        Raises:
            OutputError: Nothing can be written there.
        """
        files = {out: file if file.exists() else out for out, file in made.items()}
        self._record.write(self.identity, files, num_damaged)
        for out, file in sorted(files.items(), key=lambda pair: pair[0] == self.out):
            if file != out:
                journal.move(file, out)
