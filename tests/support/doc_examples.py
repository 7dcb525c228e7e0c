"""The Python blocks of a documentation page, to be run as a reader would."""

import re
from pathlib import Path
from typing import Any

_DOCS = Path(__file__).parents[2] / "docs"


def examples(page: str, heading: str | None = None) -> list[str]:
    """The Python blocks under `## heading` of docs/`page`, or all of them, in their order."""
    text = (_DOCS / page).read_text(encoding="utf-8")
    if heading is not None:
        sections = re.split(r"^## ", text, flags=re.MULTILINE)
        (text,) = [section for section in sections if section.startswith(f"{heading}\n")]
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def cells(tutorial: str) -> list[str]:
    """The code cells of docs/tutorials/`tutorial`, in their order."""
    text = (_DOCS / "tutorials" / tutorial).read_text(encoding="utf-8")
    found = re.findall(r"^```\{code-cell\}[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [re.sub(r"\A(:\w+:.*\n)+", "", each) for each in found]


def run(blocks: list[str]) -> dict[str, Any]:
    """Execute blocks one after the other and return the names they leave behind."""
    names: dict[str, Any] = {"__name__": "example"}
    for block in blocks:
        exec(compile(block, "example", "exec"), names)
    return names
