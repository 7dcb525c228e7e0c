"""The gate between networks, stored features, losses and scores: what isn't finite goes no further."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from perf_vit.errors import NotFiniteError

__all__ = ["check_finite", "finite_items", "finite_outputs"]

_CAUSES = (
    "the network overflows in 16 bits (use precision 32 or bf16), or its weights are damaged or diverged (use another "
    "checkpoint)"
)


def finite_items(values: Tensor | npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return which items of a batch [N, ...] have no value that is infinite or not a number, [N]."""
    if not isinstance(values, Tensor):
        if values.size and np.isfinite(values.min()) and np.isfinite(values.max()):
            # Without an array of marks.
            return np.ones(len(values), bool)
        found: npt.NDArray[np.bool_] = np.isfinite(values).reshape(len(values), -1).all(axis=1)
        return found
    return torch.isfinite(values.detach()).reshape(len(values), -1).all(dim=1).cpu().numpy()


def check_finite(
    values: Tensor | npt.NDArray[Any], what: str, item: Callable[[int], str], hint: str | None = None
) -> None:
    """Refuse values that are infinite or not a number.

    Args:
        values: Values of N items, [N, ...].
        what: What they are, a plural such as "features".
        item: Function that names an item by its index: a slide, an image, a window.
        hint: What to do about it; None for the usual causes in a network.

    Raises:
        NotFiniteError: Some are not; the message names the first item and says how many others there are.
    """
    if len(values) == 0:
        return
    wrong = np.flatnonzero(~finite_items(values))
    if len(wrong) == 0:
        return
    others = f", and those of {len(wrong) - 1} more of {len(values)}" if len(wrong) > 1 else ""
    raise NotFiniteError(
        f"{what} of {item(int(wrong[0]))} are not finite numbers (NaN or inf){others}; {hint or _CAUSES}"
    )


@contextmanager
def finite_outputs(modules: Iterable[nn.Module], item: str) -> Iterator[None]:
    """Refuse outputs of layers that are infinite or not a number, even where no score shows them.

    A detector drops objects whose score is no number as it drops those of a low score.

    Args:
        modules: Parts of a network, whose layers with weights are looked at in the `with` block.
        item: What the network looks at, for errors.

    Raises:
        NotFiniteError: Some are not finite.
    """
    finite: list[Tensor] = []

    def look(module: nn.Module, given: Any, found: Any) -> None:
        if isinstance(found, Tensor) and found.is_floating_point():
            finite.append(torch.isfinite(found).all())

    layers = (layer for part in modules for layer in part.modules() if layer._parameters and not layer._modules)
    handles = [layer.register_forward_hook(look) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if finite and not bool(torch.stack(finite).all()):
        raise NotFiniteError(f"features of {item} are not finite numbers (NaN or inf); {_CAUSES}")
