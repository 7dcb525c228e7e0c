"""The Python blocks of a documentation page, to be run as a reader would."""

import re
from pathlib import Path
from typing import Any

_DOCS = Path(__file__).parents[2] / "docs"


def examples(page: str, heading: str) -> list[str]:
    """The Python blocks under `## heading` of docs/`page`, in their order."""
    sections = re.split(r"^## ", (_DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    (section,) = [section for section in sections if section.startswith(f"{heading}\n")]
    return re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)


def run(blocks: list[str]) -> dict[str, Any]:
    """Execute blocks one after the other and return the names they leave behind."""
    names: dict[str, Any] = {"__name__": "example"}
    for block in blocks:
        exec(compile(block, "example", "exec"), names)
    return names
