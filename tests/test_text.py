import json

import numpy as np
import pytest
from nasty_names import NASTY_NAMES, UNSEEN_NAMES

from perf_vit.text import number_text, printable, to_json, without_nan


@pytest.mark.parametrize("name", [*NASTY_NAMES, "👩‍🌾", "non\xa0breaking"])
def test_visible_text_stays_as_it_is(name) -> None:
    assert printable(name) == name


@pytest.mark.parametrize(("name", "shown"), UNSEEN_NAMES.items())
def test_unseen_characters_are_escaped(name, shown) -> None:
    assert printable(name) == shown


def test_bytes_of_a_file_name_that_is_not_utf8_are_escaped() -> None:
    name = b"caf\xe9.tif".decode(errors="surrogateescape")
    assert printable(name) == r"caf\udce9.tif"
    assert printable(name).encode()


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize("name", [*NASTY_NAMES, *UNSEEN_NAMES, "caf\udce9.tif", "\x7f"])
def test_json_holds_names_exactly_as_keys_and_values(name, ascii_only) -> None:
    text = to_json({name: [name]}, ascii_only=ascii_only)
    assert json.loads(text.encode("ascii" if ascii_only else "utf-8")) == {name: [name]}


def test_json_has_null_for_what_is_no_number() -> None:
    value = {"a": float("nan"), "b": [(float("inf"), 1.5)], "c": {"d": -float("inf")}}
    assert without_nan(value) == {"a": None, "b": [[None, 1.5]], "c": {"d": None}}
    text = to_json(value)
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == without_nan(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (255, "255"),
        (-9999.0, "-9999"),
        (16_777_215.0, "16777215"),
        (float(np.finfo(np.float32).min), "-3.4028234663852886e+38"),
        (float("nan"), "nan"),
        (1 / 254, "0.003937007874015748"),
    ],
)
def test_numbers_keep_all_their_digits(value: float, text: str) -> None:
    assert number_text(value) == text
    assert float(text) == value or value != value
