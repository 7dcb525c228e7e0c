"""Pixel size of slides: what the file states, what fills in for it, and what replaces it."""

from __future__ import annotations

import math
from typing import Literal, Protocol, TypeAlias

from perf_vit.errors import InputError, warn_once

__all__ = ["LARGEST_MPP", "SMALLEST_MPP", "Scaled", "SlideMpp", "choose_mpp", "unknown_mpp"]

SMALLEST_MPP = 0.05
"""Micrometres per pixel below which a stated pixel size is wrong: a quarter of the diffraction limit."""

LARGEST_MPP = 20.0
"""Micrometres per pixel above which a stated pixel size is wrong: print resolutions up to 1200 dpi are coarser."""

SlideMpp: TypeAlias = float | tuple[float, float] | Literal["objective"]
"""Pixel size for files that state none: a number, (x, y), or "objective" to take it from the objective power."""

# A 40x scan has 0.25 um per pixel, a 20x scan 0.5; only by convention, so it is used on request only.
_MPP_AT_1X = 10.0

_SAME_SIZE = 0.01


class Scaled(Protocol):
    """What a reader knows about the pixel size of its file.

    Attributes:
        mpp_yx: Micrometres per pixel of level 0; None if the file states none.
        objective_power: Magnification of the objective; None if unknown.
    """

    mpp_yx: tuple[float, float] | None
    objective_power: float | None


def choose_mpp(
    path: str,
    reader: Scaled,
    slide_mpp: SlideMpp | None = None,
    slide_mpp_override: float | tuple[float, float] | None = None,
    *,
    warn: bool = True,
) -> tuple[float, float] | None:
    """Return the micrometres per pixel of a slide's level 0, (y, x); None if unknown.

    A plausible size in the file wins. `slide_mpp` fills in where there is none, `slide_mpp_override` replaces it.

    Args:
        path: Path of the slide, for messages.
        reader: Reader of the slide.
        slide_mpp: Pixel size for files that state none.
        slide_mpp_override: Pixel size, whatever the file states.
        warn: Whether to warn about an implausible size in the file.

    Raises:
        InputError: A given size isn't a number from 0.05 to 20.
    """
    replaced = None if slide_mpp_override is None else _checked(path, "slide_mpp_override", slide_mpp_override)
    by_objective = slide_mpp == "objective"
    given = None if slide_mpp is None or slide_mpp == "objective" else _checked(path, "slide_mpp", slide_mpp)
    fallback = _from_objective(reader) if by_objective else given
    stated = reader.mpp_yx
    if replaced is not None or stated is None:
        return replaced or fallback
    if not _is_plausible(stated):
        if fallback is None and warn:
            warn_once(f"scale of {path}", f"{_implausible(path, stated)}, so its pixel size is unknown; give slide_mpp")
        return fallback
    if given is not None and not _is_same(stated, given):
        warn_once(
            "slide_mpp that isn't used",
            f"{path} states {_shown(stated)} micrometres per pixel, which is used instead of slide_mpp="
            f"{_shown(given)}; slide_mpp_override replaces what files state",
        )
    return stated


def unknown_mpp(path: str, reader: Scaled, mpp: float, slide_mpp: SlideMpp | None = None) -> InputError:
    """Return the error for a slide of unknown pixel size that is to be read at `mpp`, with what to give."""
    stated = reader.mpp_yx
    problem = f"{path} doesn't state how large its pixels are" if stated is None else _implausible(path, stated)
    if slide_mpp == "objective":
        problem += ", and no objective power"
    guess = _from_objective(reader)
    hint = ""
    if guess is not None:
        hint = f', or slide_mpp="objective" for {_shown(guess)} from its {reader.objective_power:g}x objective'
    return InputError(
        f"{problem}, so it can't be read at mpp={mpp:g}; give the micrometres per pixel of level 0, such as "
        f"slide_mpp=0.25{hint}, or read a level"
    )


def _checked(path: str, name: str, given: object) -> tuple[float, float]:
    x, y = given if isinstance(given, tuple | list) and len(given) == 2 else (given, given)
    if not (isinstance(x, int | float) and isinstance(y, int | float) and _is_plausible((y, x))):
        choices = 'a number, (x, y) or "objective"' if name == "slide_mpp" else "a number or (x, y)"
        raise InputError(
            f"{name} of {path} must be {choices} with {SMALLEST_MPP:g} to {LARGEST_MPP:g} micrometres per pixel of "
            f"level 0, got {given!r}"
        )
    return float(y), float(x)


def _is_plausible(mpp_yx: tuple[float, float]) -> bool:
    return all(SMALLEST_MPP <= side <= LARGEST_MPP for side in mpp_yx)


def _is_same(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return all(abs(a / b - 1) <= _SAME_SIZE for a, b in zip(one, other, strict=True))


def _from_objective(reader: Scaled) -> tuple[float, float] | None:
    power = reader.objective_power
    if power is None or not math.isfinite(power) or power <= 0:
        return None
    side = _MPP_AT_1X / power
    return (side, side) if _is_plausible((side, side)) else None


def _implausible(path: str, mpp_yx: tuple[float, float]) -> str:
    return (
        f"{path} states {_shown(mpp_yx)} micrometres per pixel, which isn't the {SMALLEST_MPP:g} to {LARGEST_MPP:g} of "
        "a microscope"
    )


def _shown(mpp_yx: tuple[float, float]) -> str:
    y, x = mpp_yx
    return f"{x:.4g}" if x == y else f"{x:.4g} x {y:.4g}"
