"""Links between pages and Markdown files of the repository outside docs/, which the site shows as pages of its own.

In the repository, `[training](docs/training.md)` in CHANGELOG.md and `[tasks](../CONTRIBUTING.md#add-a-task)` in a page
are right. The site includes these files in pages, so the same links must point at the pages.
"""

import re
from pathlib import Path
from typing import Any

# File of the repository and the page that includes it.
PAGES = {
    "CONTRIBUTING.md": "/contributing.md",
    "CHANGELOG.md": "/changelog.md",
    "README.md": "/index.md",
    "datasets/README.md": "/public_data.md",
}
_FILE_NAME = re.compile(r"\[(?:docs/)?[\w-]+\.md\]\((?!\w+:)")
_TARGET = re.compile(r"(?<=\]\()([^)\s#:]+\.md)(?=[#)])")


def link_to_page(target: str, folder: Path, root: Path) -> str:
    """The target of a link in a Markdown file of a folder: that of the site where the file lies outside docs/.

    Args:
        target: Relative path.
        folder: Folder of the file that has the link.
        root: Root of the repository.
    """
    if target.startswith("/"):
        return target
    path = (folder / target).resolve()
    if not path.is_relative_to(root):
        return target
    name = path.relative_to(root).as_posix()
    card = re.fullmatch(r"datasets/(\w+)/README\.md", name)
    if card:
        return f"/public_data/{card[1]}.md"
    return PAGES.get(name, name.removeprefix("docs") if name.startswith("docs/") else target)


def rewrite(text: str, folder: Path, root: Path) -> str:
    """The text of a Markdown file with the links of the site; links named after a file show the heading instead."""
    text = _FILE_NAME.sub("[](", text)
    return _TARGET.sub(lambda found: link_to_page(found[1], folder, root), text)


def setup(app: Any) -> dict[str, bool]:
    """Rewrite the links of each page and of each included file."""
    docs = Path(app.srcdir).resolve()

    def page(app: Any, docname: str, content: list[str]) -> None:
        content[0] = rewrite(content[0], (docs / docname).parent, docs.parent)

    def included(app: Any, path: Path, docname: str, content: list[str]) -> None:
        content[0] = rewrite(content[0], (docs / path).resolve().parent, docs.parent)

    app.connect("source-read", page)
    app.connect("include-read", included)
    return {"parallel_read_safe": True}
