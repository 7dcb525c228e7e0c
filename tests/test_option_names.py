"""An option has one name: on the command line, in Python, in configs, and wherever it is passed on."""

import ast
import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
from typer.main import get_command

import perf_vit
from perf_vit.cli.main import app
from perf_vit.data import SegmentationDataConfig
from perf_vit.inference import StripMaker, predict_strips
from perf_vit.inference.options import SegmentationPredictOptions, WindowedPredictOptions
from perf_vit.types import InputOptions
from perf_vit.workflows.convert import ConvertOptions
from perf_vit.workflows.predict import InputsOptions
from perf_vit.workflows.registry import TASKS

PACKAGE = Path(perf_vit.__file__).parent
# What holds the options of a call, or a part of a config.
HOLDER = re.compile(r"(.*\.)?(augment|config|optim|options|region|shared|split|trainer)|config\.data")
# Options that become another thing: an argument of a library, or of a function that isn't about the option alone.
OTHER_NAMES = {
    "tasks/distillation.py": {"lr=block_lr"},
    "tasks/memory.py": {"decay=ema_decay"},
    "tasks/trainer.py": {"decay=ema_decay", "patience=early_stop_epochs"},
    "workflows/convert.py": {"layers=layer_indices"},
    "workflows/distill.py": {"steps_per_epoch=val_every_steps"},
    "workflows/slide_classification.py": {"batch_size=embed_batch_size"},
}


def names_of(kind: type) -> set[str]:
    return {each.name for each in fields(kind)}


def flags(command: str) -> set[str]:
    """Names of the parameters of a command."""
    return {str(each.name) for each in get_command(app).commands[command].params} - {"help"}


def renamed(source: str) -> set[str]:
    """Keyword arguments whose value is an option of another name, as "argument=option"."""
    found = set()
    for call in ast.walk(ast.parse(source)):
        for keyword in call.keywords if isinstance(call, ast.Call) else ():
            value = keyword.value
            is_renamed = isinstance(value, ast.Attribute) and keyword.arg not in (None, value.attr)
            if is_renamed and HOLDER.fullmatch(ast.unparse(value.value)):
                found.add(f"{keyword.arg}={value.attr}")
    return found


def test_an_option_is_passed_on_under_its_name() -> None:
    found = {path.relative_to(PACKAGE).as_posix(): renamed(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert {path: names for path, names in found.items() if names} == OTHER_NAMES


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("f(size=self.options.window_size)", {"size=window_size"}),
        ("f(window_size=options.window_size)", set()),
        ("f(size=other.window_size, **config.augment)", set()),
    ],
)
def test_renaming_is_recognised(source: str, expected: set[str]) -> None:
    assert renamed(source) == expected


def test_flags_of_predict_are_the_options_in_python() -> None:
    python = names_of(InputsOptions).union(*(names_of(task.predict_options) for task in TASKS.values()))
    # A plan is another call in Python.
    assert flags("predict") - {"checkpoint", "inputs", "output", "more_inputs", "plan"} == python


def test_flags_of_evaluate_are_the_options_in_python() -> None:
    python = set[str]().union(*(names_of(task.evaluate_options) for task in TASKS.values()))
    assert flags("evaluate") - {"checkpoint", "image", "labels"} == python


def test_flags_of_convert_are_the_options_in_python() -> None:
    assert flags("convert") - {"source", "out"} == names_of(ConvertOptions)


@pytest.mark.parametrize("name", TASKS)
def test_options_that_evaluation_shares_with_prediction_have_its_names(name: str) -> None:
    evaluating, predicting = names_of(TASKS[name].evaluate_options), names_of(TASKS[name].predict_options)
    assert {"batch_size", "device", "precision"} <= evaluating & predicting
    about_labels = {"all_touched", "json", "label_format", "names", "region"}
    assert evaluating - predicting <= about_labels


def test_options_of_an_input_are_those_of_open() -> None:
    opening = set(inspect.signature(perf_vit.open).parameters)
    assert names_of(InputOptions) - opening == {"resolution_unit"}
    assert {"crs", "mpp", "resolution", "slide_mpp", "tissue"} <= names_of(WindowedPredictOptions) & opening
    assert {"bands", "mpp", "nodata", "resolution", "slide_mpp", "tissue"} <= names_of(SegmentationDataConfig) & opening


def test_options_of_windows_are_those_of_the_engine() -> None:
    engine = set(inspect.signature(predict_strips).parameters)
    engine |= set(inspect.signature(StripMaker).parameters)
    used = {"batch_size", "blend", "device", "flips", "num_readers", "overlap", "window_size"}
    assert used <= names_of(SegmentationPredictOptions) & engine
