"""One large map whose rows are made all over a Ray cluster."""

from __future__ import annotations

__all__ = ["row_ranges"]

# A task computes the row of windows above its first one again: a quarter more work at worst.
_MIN_WINDOW_ROWS = 4
# Tasks are not equally long: nodata is skipped.
_TASKS_PER_ACTOR = 4


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
