"""File handles that are reopened after forks, in other threads and after pickling."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

__all__ = ["PerThread", "Pool"]


class _Closable(Protocol):
    def close(self) -> None: ...


T = TypeVar("T", bound=_Closable)


class PerThread(Generic[T]):
    """Handle per thread and process, opened at first use.

    GDAL datasets may be used by one thread at a time only, and a forked child shares its parent's file offset, so
    handles must not be inherited.

    Args:
        open_handle: Function that opens a handle; picklable, such as a `functools.partial` of a module-level function.
    """

    def __init__(self, open_handle: Callable[[], T]) -> None:
        self._open_handle = open_handle
        self._local = threading.local()

    def get(self) -> T:
        """Return this thread's handle."""
        if getattr(self._local, "pid", None) != os.getpid():
            self._local.handle = self._open_handle()
            self._local.pid = os.getpid()
        handle: T = self._local.handle
        return handle

    def close(self) -> None:
        """Close this thread's handle, if any; `get` opens a new one."""
        if getattr(self._local, "pid", None) == os.getpid():
            self._local.handle.close()
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"open_handle": self._open_handle}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["open_handle"])  # type: ignore[misc]


class Pool(Generic[T]):
    """Bounded number of open handles; the least recently used one is closed for a new one.

    For a single thread: `PerThread` gives each thread its own pool.

    Args:
        open_handle: Function that opens the handle of an index.
        max_open: Maximum number of open handles.
    """

    def __init__(self, open_handle: Callable[[int], T], max_open: int) -> None:
        self._open_handle = open_handle
        self._max_open = max_open
        self._handles: OrderedDict[int, T] = OrderedDict()

    def get(self, index: int) -> T:
        """Return the handle of an index, opened if necessary."""
        if index in self._handles:
            self._handles.move_to_end(index)
            return self._handles[index]
        while len(self._handles) >= self._max_open:
            self._handles.popitem(last=False)[1].close()
        handle = self._handles[index] = self._open_handle(index)
        return handle

    def close(self) -> None:
        """Close all handles."""
        while self._handles:
            self._handles.popitem()[1].close()
