"""Peak of the anonymous memory of this process (RssAnon of Linux): pages of mapped files don't count."""

from __future__ import annotations

import threading
from pathlib import Path

__all__ = ["AnonymousPeak", "anonymous_mib"]


class AnonymousPeak:
    """Watches the anonymous memory in a thread from its making until `stop`.

    Args:
        seconds: Time between two looks.
    """

    def __init__(self, seconds: float = 0.01) -> None:
        self._before, self._peak, self._seconds = anonymous_mib(), 0.0, seconds
        self._is_done = threading.Event()
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()

    def stop(self) -> float:
        """Return the highest memory seen above that at the start, in MiB."""
        self._is_done.set()
        self._watcher.join()
        return self._peak - self._before

    def _watch(self) -> None:
        while not self._is_done.wait(self._seconds):
            self._peak = max(self._peak, anonymous_mib())


def anonymous_mib() -> float:
    """Return the anonymous memory of this process."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = [each for each in status.splitlines() if each.startswith("RssAnon:")]
    return int(line.split()[1]) / 1024
