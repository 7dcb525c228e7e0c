"""What tests of files that must be kept share."""

import hashlib
import os
from pathlib import Path

from command_line import call

MINE = b"a file of the user"


def tree(root: Path) -> dict[str, str]:
    """Every file, folder and link below a folder, with a hash of its content."""
    found = {}
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


def refused(args: list, root: Path, capsys) -> str:
    """Run a command that must be refused and change nothing below a folder; its one line."""
    before = tree(root)
    capsys.readouterr()
    assert call(args) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("Error: ")
    assert tree(root) == before
    return lines[0]


def put(path: Path, content: bytes = MINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
