"""The table of a fuzz run: kinds of files and mutations against verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fuzzing.cases import Result
from fuzzing.judge import VERDICTS

__all__ = ["markdown_table"]

_COLUMNS = ("kind", "mutation", "files", *VERDICTS, "slowest, s", "memory, MiB")


def markdown_table(results: Sequence[Result]) -> str:
    """One row a kind and mutation, one a kind, and the total."""
    rows = [_COLUMNS, tuple("---" if index < 2 else "---:" for index in range(len(_COLUMNS)))]
    for kind in sorted({result.kind for result in results}):
        of_kind = [result for result in results if result.kind == kind]
        names = sorted({result.mutation for result in of_kind})
        rows += [_row(kind, name, [result for result in of_kind if result.mutation == name]) for name in names]
        rows.append(_row(f"**{kind}**", "all", of_kind))
    rows.append(_row("**all**", "all", results))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _row(kind: str, mutation: str, results: Sequence[Result]) -> tuple[str, ...]:
    counts = Counter(result.verdict for result in results)
    slowest = max(result.seconds for result in results)
    largest = max(result.grown_mib for result in results)
    numbers = (str(counts[verdict]) for verdict in VERDICTS)
    return kind, mutation, str(len(results)), *numbers, f"{slowest:.1f}", f"{largest:.0f}"
