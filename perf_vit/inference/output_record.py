"""What outputs were made of, in a hidden file next to them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from perf_vit._version import __version__
from perf_vit.io import beside, fingerprint, write_json
from perf_vit.text import to_json

__all__ = ["OutputRecord"]

_KEYS = frozenset({"perf_vit_version", "identity", "num_damaged", "outputs"})


class OutputRecord:
    """The file `.NAME.perf_vit.json` next to an output.

    Args:
        out: Main output; names of further ones are relative to its folder.
    """

    def __init__(self, out: Path) -> None:
        self._folder = out.parent
        self.path = beside(out, ".", ".perf_vit.json")

    def read(self) -> dict[str, Any] | None:
        """Its content, None where there is none."""
        try:
            content = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) and content.keys() >= _KEYS else None

    def is_foreign(self) -> bool:
        """Whether another file has its name."""
        return os.path.lexists(self.path) and (self.path.is_symlink() or self.read() is None)

    def write(self, identity: Mapping[str, Any], files: Mapping[Path, Path], num_damaged: int) -> None:
        """Write it, all or nothing.

        Args:
            identity: Plain values that decide the outputs.
            files: Output to the file that holds its content now.
            num_damaged: Parts of the inputs that were skipped.

        Raises:
            OutputError: Nothing can be written there.
        """
        outputs = {self._name(out): fingerprint([file]) for out, file in files.items()}
        content = {"perf_vit_version": __version__, "identity": dict(identity), "num_damaged": num_damaged}
        write_json(self.path, {**content, "outputs": outputs})

    def is_complete(self, found: Iterable[Path], content: Mapping[str, Any]) -> bool:
        """Whether all recorded outputs are among some files."""
        return {self._name(path) for path in found} >= content["outputs"].keys()

    def holds(self, path: Path, content: Mapping[str, Any]) -> bool:
        """Whether a file that exists is the one that was recorded."""
        recorded = content["outputs"].get(self._name(path))
        return path.is_file() and not path.is_symlink() and recorded == fingerprint([path])

    @staticmethod
    def plain(identity: Mapping[str, Any]) -> Any:
        """An identity as it is read from a file."""
        return json.loads(to_json(identity))

    def _name(self, path: Path) -> str:
        return Path(os.path.relpath(path, self._folder)).as_posix()
