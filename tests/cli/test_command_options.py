"""The options of the commands are those of the Python calls, with their names and defaults."""

from dataclasses import MISSING, fields

import pytest
import typer
from typer.main import get_command

from perf_vit.cli.main import app
from perf_vit.workflows.convert import ConvertOptions
from perf_vit.workflows.predict import InputsOptions
from perf_vit.workflows.registry import TASKS

CALLS = {
    "predict": (
        [InputsOptions, *(task.predict_options for task in TASKS.values())],
        # A plan is printed, by a call of its own.
        {"checkpoint", "inputs", "more_inputs", "output", "plan"},
    ),
    "evaluate": ([task.evaluate_options for task in TASKS.values()], {"checkpoint", "image", "labels"}),
    "convert": ([ConvertOptions], {"source", "out"}),
}


def parameters(command: str) -> dict[str, object]:
    group = get_command(app)
    context = typer.Context(group)
    return {
        parameter.name: parameter.default
        for parameter in group.get_command(context, command).params
        if parameter.name != "help"
    }


@pytest.mark.parametrize("command", CALLS)
def test_a_command_has_all_options_of_its_call(command) -> None:
    options, arguments = CALLS[command]
    known = {each.name: each.default for kind in options for each in fields(kind)}
    given = parameters(command)
    assert set(given) - arguments == set(known)
    for name, default in known.items():
        assert default is not MISSING
        # Outputs of the command line come with what people look at.
        if command != "predict" or name not in {"quicklook", "report", "style"}:
            assert given[name] in (default, None if default == () else default), name
