"""One large map whose rows are made all over a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from perf_vit.inference.map_job import MapJob
from perf_vit.inference.ray_pool import RayPool

__all__ = ["row_ranges", "rows_in_pool"]

# A task computes the row of windows above its first one again: a quarter more work at worst.
_MIN_WINDOW_ROWS = 4
# Tasks are not equally long: nodata is skipped.
_TASKS_PER_ACTOR = 4


def rows_in_pool(
    pool: RayPool,
    job: MapJob,
    write_rows: Callable[[Path, tuple[int, int]], None],
    *,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> Callable[[Path], None]:
    """What `make_map` takes to have rows written by a pool; all actors see the output's folder under its path.

    Args:
        pool: where the work is done.
        job: the map.
        write_rows: writes rows (first, first below) into a folder, with a `MapJob` of its own.
        on_rows: called with (rows done, rows in all), for a progress bar.
    """

    def write_all(folder: Path) -> None:
        total = job.source.height
        done = 0
        ranges = row_ranges(job.window_rows, total, pool.num_actors)
        for (start, stop), _ in pool.map(partial(write_rows, folder.absolute()), ranges):
            done += stop - start
            on_rows(done, total)

    return write_all


def row_ranges(window_rows: list[int], height: int, num_actors: int) -> list[tuple[int, int]]:
    """Cut a scene's rows where rows of windows begin, into some ranges for each actor.

    Args:
        window_rows: first rows of the rows of windows.
        height: rows of the scene.
        num_actors: that share them.

    Returns:
        (first row, first row below) of each range, which cover all rows once.
    """
    step = max(_MIN_WINDOW_ROWS, -(-len(window_rows) // (_TASKS_PER_ACTOR * num_actors)))
    starts = [0, *window_rows[step::step]]
    return list(zip(starts, [*starts[1:], height], strict=True))
