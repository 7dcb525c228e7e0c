"""What the predictors of whole images and slides share: a row an input, each on disk when it is known."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import nn

from perf_vit.errors import (
    CheckpointError,
    InputError,
    MissingPackageError,
    OptionError,
    OutputError,
    reason_line,
)
from perf_vit.inference.jobs import JobResult
from perf_vit.inference.jobs.table_job import GrowingTable, RowLog, TableJob, write_table
from perf_vit.inference.options import PredictOptions
from perf_vit.inference.predictor import OnProgress, Predictor, ignore_progress
from perf_vit.inference.prefetch import load_ahead
from perf_vit.inference.ray import RayPool
from perf_vit.plotting.pictures import Picture
from perf_vit.reporting.outputs import write_table_report
from perf_vit.threads import num_processors

__all__ = ["TablePredictor"]

Model = TypeVar("Model", bound=nn.Module)
Options = TypeVar("Options", bound=PredictOptions)
Result = TypeVar("Result")

Rows = Mapping[str, list[str] | InputError]
"""The row of each input, or why it can't be read."""


# Of no single input: a full disk, a device that isn't there.
_FAULTS_OF_THE_RUN = (OutputError, OptionError, CheckpointError, MissingPackageError)


class TablePredictor(Predictor[Model, Options]):
    """Writes a CSV file with a row an input.

    Threads read inputs ahead of the model. Rows go into the folder `OUT.partial` as they come, where an interrupted
    call goes on, and every few seconds into the table itself, where they can be looked at.
    """

    noun: ClassVar[str] = "images"

    def run(
        self,
        source: str | Path | Sequence[str],
        out: str | Path,
        *,
        on_progress: OnProgress = ignore_progress,
        pool: RayPool | None = None,
    ) -> JobResult:
        """Write the table of some inputs, unless it is there.

        Args:
            source: Paths of the inputs, or of one.
            out: Path of the table, .csv.
            on_progress: Called with (inputs done, inputs in all).
            pool: Ray processes that share the inputs.

        Raises:
            BusyError: Another process writes it.
            InputError: An input can't be read, or with `on_error="skip"` none.
            OutputError: The table can't be written, or is another file without `overwrite`.
        """
        paths = [str(source)] if isinstance(source, str | Path) else list(source)
        job = self.job(paths, out)
        with job.work() as journal:
            if journal is None:
                return JobResult(made=False, out=job.out, beside=tuple(path for path in job.beside if path.exists()))
            log, failed = RowLog(job, journal.folder), dict[str, str]()
            self._fill(job, log, failed, journal.folder.absolute(), on_progress, pool)
            if not log.rows:
                raise InputError(
                    f"none of {len(paths)} {self.noun} could be read, the first: {next(iter(failed.values()))}"
                )
            table = write_table(journal.folder / job.out.name, *self._table(paths, log.rows, failed))
            made = {job.out: table, **self.files_of(job.out, list(log.rows), paths, journal.folder)}
            if self.options.report:
                made[job.out.with_suffix(".html")] = self._report(journal.folder, table)
            job.finish(journal, made, num_damaged=len(failed))
        beside = tuple(path for path in job.beside if path.exists())
        return JobResult(made=True, out=job.out, num_rows=len(log.rows), failed=failed, beside=beside)

    def _fill(
        self,
        job: TableJob,
        log: RowLog,
        failed: dict[str, str],
        folder: Path,
        on_progress: OnProgress,
        pool: RayPool | None,
    ) -> None:
        """Compute the missing rows; the table holds those that are known meanwhile, however the call ends."""
        growing = GrowingTable(job.out, folder)

        def grow() -> None:
            known = [path for path in job.paths if path in log.rows or path in failed]
            growing.write(*self._table(known, log.rows, failed))

        todo = [path for path in job.paths if path not in log.rows]
        try:
            with closing(self._computed(todo, folder, pool)) as batches:
                for rows in batches:
                    failed |= self._noted(rows, log)
                    on_progress(len(log.rows) + len(failed), len(job.paths))
                    if log.rows and growing.is_due:
                        grow()
        except BaseException:
            if log.rows:
                grow()
            raise

    def _report(self, folder: Path, table: Path) -> Path:
        path, settings = folder / "report.tmp", self.described()
        write_table_report(
            path,
            table,
            partial(self.picture_of, folder),
            columns=self.columns,
            column=self.class_column,
            settings=settings,
        )
        return path

    @property
    def class_column(self) -> str | None:
        """Column with the predicted class, None for numbers."""
        return next((name for name in self.columns if name in ("prediction", "predictions")), None)

    @abstractmethod
    def picture_of(self, folder: Path, path: str) -> Callable[[], dict[str, Picture]]:
        """A function that draws an input for the report.

        Args:
            folder: Where files of single rows are until the table is finished.
            path: Path of the input.
        """

    @abstractmethod
    def read_input(self, path: str) -> Any:
        """Read what the row of an input is computed from; called from several threads.

        Raises:
            InputError: The input can't be read, or doesn't fit the model.
        """

    @abstractmethod
    def rows(self, folder: Path, inputs: Mapping[str, Any]) -> Rows:
        """Compute the rows of a batch of inputs, without the columns of path and error.

        Args:
            folder: Where files of single rows go until the table is finished.
            inputs: Result of `read_input` by path; at least one.
        """

    @property
    @abstractmethod
    def columns(self) -> list[str]:
        """Names of the columns, the first that of the path."""

    @abstractmethod
    def job(self, paths: Sequence[str], out: str | Path) -> TableJob:
        """What is to be made of some inputs.

        Raises:
            OutputError: Its name doesn't end in .csv.
        """

    def files_of(
        self,
        out: Path,
        done: Sequence[str],
        paths: Sequence[str],
        folder: Path,
    ) -> dict[Path, Path]:
        """Files of single rows: under their final names, those in the folder."""
        return {}

    def _computed(self, paths: Sequence[str], folder: Path, pool: RayPool | None) -> Generator[Rows, None, None]:
        if pool is None:
            yield from self._rows_here(folder, paths)
            return
        size = self.rows_at_once
        batches = (paths[start : start + size] for start in range(0, len(paths), size))
        results: Generator[Any, None, None] = pool.map(partial(self._rows_from, folder, Path.cwd()), batches)
        with closing(results):
            yield from (rows for _, rows in results)

    def _rows_here(self, folder: Path, paths: Sequence[str]) -> Generator[Rows, None, None]:
        """Compute the rows of inputs batch by batch; the next batch is read meanwhile."""
        # Before several threads need it, as each would make one of its own.
        _ = self.check_input
        size, readers = self.rows_at_once, self.num_readers
        read = partial(self.attempted, self.read_input)
        with closing(load_ahead(paths, read, num_threads=readers, depth=2 * size + readers)) as inputs:
            named = zip(paths, inputs, strict=True)
            while batch := list(islice(named, size)):
                yield self._rows_of(folder, batch)

    def _rows_of(self, folder: Path, inputs: Sequence[tuple[str, Any]]) -> Rows:
        """Compute the rows of a batch, up to the first error if that ends the call."""
        found: dict[str, Any] = {}
        failed: dict[str, InputError] = {}
        for path, each in inputs:
            (failed if isinstance(each, InputError) else found)[path] = each
            if failed and self.options.on_error == "stop":
                break
        return {**(self._attempted_rows(folder, found) if found else {}), **failed}

    def attempted(self, compute: Callable[[str], Result], path: str) -> Result | InputError:
        """Compute something of an input, or give the reason why it can't be computed.

        Raises:
            Exception: What fails, if it is no fault of the input; or of an unknown kind, without `on_error="skip"`.
        """
        try:
            return compute(path)
        except Exception as error:
            return self._failure(path, error)

    def _attempted_rows(self, folder: Path, inputs: Mapping[str, Any]) -> Rows:
        """Rows of a batch; if it fails, of each of its inputs alone, so that one doesn't spoil those of others."""
        try:
            return self.rows(folder, inputs)
        except Exception as error:
            if len(inputs) == 1:
                return {path: self._failure(path, error) for path in inputs}
        return {
            path: row for each in inputs.items() for path, row in self._attempted_rows(folder, dict([each])).items()
        }

    def _failure(self, path: str, error: Exception) -> InputError:
        """The reason why an input has no row; raises what `attempted` doesn't take for one."""
        if isinstance(error, InputError):
            return error
        if isinstance(error, _FAULTS_OF_THE_RUN) or self.options.on_error == "stop":
            error.add_note(f"in the row of {path}")
            raise error
        return InputError(f"{path}: {type(error).__name__}: {reason_line(error)}")

    def _rows_from(self, folder: Path, start: Path, paths: Sequence[str]) -> Rows:
        """Compute the rows of inputs whose paths are relative to a folder, as workers stand in other ones."""
        places = {path: str(start / path) if (start / path).exists() else path for path in paths}
        batches = self._rows_here(folder, list(dict.fromkeys(places.values())))
        rows = {place: row for batch in batches for place, row in batch.items()}
        return {path: rows[place] for path, place in places.items() if place in rows}

    @property
    def num_readers(self) -> int:
        """Number of inputs that are read at the same time."""
        return self.options.num_readers or num_processors()

    @property
    def rows_at_once(self) -> int:
        """Inputs of a batch."""
        return self.options.batch_size

    def _noted(self, rows: Rows, log: RowLog) -> dict[str, str]:
        """Keep the rows of a batch; give the errors."""
        if found := {path: row for path, row in rows.items() if not isinstance(row, InputError)}:
            log.add(found)
        errors = {path: row for path, row in rows.items() if isinstance(row, InputError)}
        if errors and self.options.on_error == "stop":
            raise next(iter(errors.values()))
        return {path: str(error) for path, error in errors.items()}

    def _table(
        self, paths: Sequence[str], rows: Mapping[str, list[str]], failed: Mapping[str, str]
    ) -> tuple[list[str], Iterator[list[str]]]:
        header = [*self.columns, *(["error"] if failed else [])]
        empty = [""] * (len(self.columns) - 1)
        last = ([failed.get(path, "")] if failed else [] for path in paths)
        return header, ([path, *rows.get(path, empty), *end] for path, end in zip(paths, last, strict=True))
