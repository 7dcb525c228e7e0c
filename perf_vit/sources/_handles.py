"""File handles that survive forks, threads and pickling by being opened anew on the other side."""

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
    """A handle for each thread of each process, opened at its first use there.

    GDAL datasets may be used by one thread at a time, and a forked child shares its parent's file offset; so neither
    may inherit a handle.

    Args:
        open_handle: opens one; picklable, such as a `functools.partial` of a module's function.
    """

    def __init__(self, open_handle: Callable[[], T]) -> None:
        self._open_handle = open_handle
        self._local = threading.local()

    def get(self) -> T:
        """This thread's handle."""
        if getattr(self._local, "pid", None) != os.getpid():
            self._local.handle = self._open_handle()
            self._local.pid = os.getpid()
        handle: T = self._local.handle
        return handle

    def close(self) -> None:
        """Close this thread's handle, if it has one; `get` opens another."""
        if getattr(self._local, "pid", None) == os.getpid():
            self._local.handle.close()
        self._local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {"open_handle": self._open_handle}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["open_handle"])  # type: ignore[misc]


class Pool(Generic[T]):
    """A bounded number of open handles; the one not used for longest is closed for a new one.

    For one thread only: `PerThread` gives each thread a pool of its own.

    Args:
        open_handle: opens the handle of an index.
        max_open: handles open at a time.
    """

    def __init__(self, open_handle: Callable[[int], T], max_open: int) -> None:
        self._open_handle = open_handle
        self._max_open = max_open
        self._handles: OrderedDict[int, T] = OrderedDict()

    def get(self, index: int) -> T:
        """The handle of an index, opened if it isn't."""
        if index in self._handles:
            self._handles.move_to_end(index)
            return self._handles[index]
        while len(self._handles) >= self._max_open:
            self._handles.popitem(last=False)[1].close()
        handle = self._handles[index] = self._open_handle(index)
        return handle

    def close(self) -> None:
        """Close every handle."""
        while self._handles:
            self._handles.popitem()[1].close()
