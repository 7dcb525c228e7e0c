"""What a library raises on a damaged file is one line about that file."""

import importlib
import pickle
from pathlib import Path

import pytest
import torch

from perf_vit.cli import main
from perf_vit.errors import (
    CheckpointError,
    InputError,
    MissingPackageError,
    PerfVitError,
    extra,
    is_out_of_memory,
    parsing,
)


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


def test_a_missing_package_is_one_line_with_the_extra_s_pip_line() -> None:
    with pytest.raises(MissingPackageError) as caught, extra("geo", "prediction"):
        importlib.import_module("no_such_package.part")
    line = 'prediction needs no_such_package, which isn\'t installed; pip install "perf-vit[geo]"'
    assert str(caught.value) == line
    assert isinstance(caught.value, PerfVitError)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.name, copy.problem) == (line, "no_such_package", caught.value.problem)


def test_a_package_that_is_too_old_or_broken_is_named_with_the_reason() -> None:
    with pytest.raises(MissingPackageError) as caught, extra("geo", "prediction"):
        raise ImportError("libgdal.so: no such file", name="rasterio._base")
    assert str(caught.value) == (
        "prediction needs rasterio, which can't be imported (ImportError: libgdal.so: no such file); "
        'pip install "perf-vit[geo]"'
    )


def test_of_nested_extras_the_outermost_is_named() -> None:
    with pytest.raises(MissingPackageError) as caught, extra("train", "training"), extra("geo", "perf_vit.sources"):
        importlib.import_module("no_such_package")
    assert str(caught.value) == (
        'training needs no_such_package, which isn\'t installed; pip install "perf-vit[train]"'
    )


def test_our_own_import_errors_are_not_missing_packages() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'perf_vit\.nothing'"), extra("geo", "prediction"):
        importlib.import_module("perf_vit.nothing")
    with pytest.raises(ImportError, match=r"^circular$"), extra("geo", "prediction"):
        raise ImportError("circular")


def test_too_little_memory_is_known_on_all_devices() -> None:
    with pytest.raises(RuntimeError) as of_cpu:
        torch.empty(1 << 60, dtype=torch.uint8)
    for error in (of_cpu.value, torch.OutOfMemoryError("CUDA out of memory."), MemoryError()):
        assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("CUDA error: misaligned address"))


def test_commands_say_in_one_line_that_memory_is_too_small(monkeypatch, capsys) -> None:
    def run(error: Exception) -> None:
        def call(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(main, "_group", lambda: call)
        main.run([])

    with pytest.raises(SystemExit, match="2"):
        run(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the documentation."))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: MemoryError: CUDA out of memory. Tried to allocate 2 GiB; ")
    assert "--batch-size" in line
    with pytest.raises(RuntimeError, match="misaligned"):
        run(RuntimeError("CUDA error: misaligned address"))
