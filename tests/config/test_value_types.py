"""Values from files are held against the types of dataclasses."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from perf_vit.config import check_values
from perf_vit.errors import ConfigError


@dataclass
class Inner:
    mean: tuple[float, ...] = (1.0, 2)


@dataclass
class Values:
    classes: list[str] = field(default_factory=lambda: ["ship"])
    tile_px: int = 32
    mpp: float | None = None
    pair: tuple[int, str] = (1, "a")
    kind: Literal["box", "mask"] = "box"
    flips: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    anything: dict[str, Any] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"mpp": 3},
        {"mpp": math.nan},
        {"classes": []},
        {"classes": ("ship", "car")},
        {"inner": Inner([1.0])},
        {"anything": {"a": [None, {}]}},
        {"maybe": Inner(())},
        {"counts": {"a": 2**70}},
    ],
)
def test_values_that_fit_pass(change: dict) -> None:
    check_values(Values(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ["ship", ["car"]]}, "data.classes must be a list of names as in [a, b], got ['ship', ['car']]"),
        ({"classes": "ship"}, "data.classes must be a list of names as in [a, b], got 'ship'"),
        ({"classes": None}, "data.classes must be a list of names as in [a, b], got null"),
        ({"tile_px": 32.5}, "data.tile_px must be a whole number, got 32.5"),
        ({"tile_px": True}, "data.tile_px must be a whole number, got true"),
        ({"mpp": "1"}, "data.mpp must be a number or null, got '1'"),
        ({"mpp": [1]}, "data.mpp must be a number or null, got [1]"),
        ({"pair": (1, "a", 2)}, "data.pair must be 2 values as in [1, a], got [1, 'a', 2]"),
        ({"pair": (1, 2)}, "data.pair must be 2 values as in [1, a], got [1, 2]"),
        ({"kind": "rbox"}, "data.kind must be one of box, mask, got 'rbox'; did you mean 'box'?"),
        ({"flips": 1}, "data.flips must be true or false, got 1"),
        ({"counts": {"a": "b"}}, "data.counts must be a mapping as in {name: value}, got {a: 'b'}"),
        ({"counts": [1]}, "data.counts must be a mapping as in {name: value}, got [1]"),
        ({"inner": Inner(((1.0,),))}, "data.inner.mean must be a list of numbers as in [0.5, 1], got [[1.0]]"),
        ({"inner": None}, "data.inner must be a mapping as in {mean: ...}, got null"),
    ],
)
def test_the_first_value_of_another_type_is_named(change: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_values(Values(**change), "data.")
    assert str(error.value) == message
