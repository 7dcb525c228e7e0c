"""What a library raises on a damaged file is one line about that file."""

from pathlib import Path

import pytest

from perf_vit.errors import CheckpointError, InputError, parsing


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (ValueError("bad header\nsecond line"), "can't read a.bin as JSON: bad header; it may be damaged"),
        (EOFError(), "can't read a.bin as JSON: EOFError; it may be damaged"),
        (KeyError("x"), "can't read a.bin as JSON: KeyError: 'x'; it may be damaged"),
        (RecursionError("too deep"), "can't read a.bin as JSON: too deep; it may be damaged"),
        (ZeroDivisionError("by zero"), "can't read a.bin as JSON: ZeroDivisionError: by zero; it may be damaged"),
        (PermissionError(13, "Permission denied"), "can't read a.bin as JSON: Permission denied"),
    ],
)
def test_every_exception_becomes_one_line(raised: Exception, message: str) -> None:
    with pytest.raises(CheckpointError) as caught, parsing(Path("a.bin"), "JSON", CheckpointError):
        raise raised
    assert str(caught.value) == message
    assert caught.value.__cause__ is raised


def test_our_own_errors_pass_as_they_are() -> None:
    with pytest.raises(CheckpointError, match=r"^the tissue is missing$"), parsing("a.bin", "JSON", InputError):
        raise CheckpointError("the tissue is missing")


def test_interrupts_are_no_damage() -> None:
    with pytest.raises(KeyboardInterrupt), parsing("a.bin", "JSON"):
        raise KeyboardInterrupt
