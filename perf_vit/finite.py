"""The gate between networks, stored features, losses and scores: what isn't finite goes no further."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from perf_vit.errors import NotFiniteError

__all__ = ["check_finite", "finite_items"]


def finite_items(values: Tensor | npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return which items of a batch [N, ...] have no value that is infinite or not a number, [N]."""
    if not isinstance(values, Tensor):
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
    usual = (
        "the network overflows in 16 bits (use precision 32 or bf16), or its weights are damaged or diverged (use "
        "another checkpoint)"
    )
    raise NotFiniteError(
        f"{what} of {item(int(wrong[0]))} are not finite numbers (NaN or inf){others}; {hint or usual}"
    )
