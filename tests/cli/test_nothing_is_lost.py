"""No command replaces a file of the user: an input never, any other file only with `--overwrite`."""

import os
import re
import shutil
from pathlib import Path

import pytest
from command_line import call
from jobs_that_write import (
    JOBS,
    Job,
    convert,
    evaluate_numbers,
    predict_classes,
    predict_map_of_vrt,
    predict_objects,
    predict_slide_classes,
    record_of,
)
from kept_files import MINE, put, refused, tree


def names(output: Path) -> set[str]:
    """What a refusal may call an output: of a run, the file or folder in the run folder, or that itself."""
    return {str(each) for each in (output, *output.parents[: 2 if "run" in output.parts else 1])}


@pytest.fixture(scope="module", params=JOBS, ids=lambda make: make.__name__)
def job(request, tmp_path_factory) -> Job:
    """A command whose folder `out` is made anew for each test."""
    root = tmp_path_factory.mktemp("job")
    return request.param(root)


@pytest.fixture
def out(job) -> Path:
    """The folder of all outputs, empty."""
    folder = next(path for path in job.outputs[0].parents if path.name == "out")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def assert_the_same_command_changes_no_file(job, out, capsys) -> None:
    before = tree(out.parent)
    capsys.readouterr()
    code = call(job.args)
    captured = capsys.readouterr()
    after = tree(out.parent)
    # The report of many inputs is written again, as a page too.
    reports = {str(output.relative_to(out.parent)) for output in job.outputs if output.stem == "report"}
    assert {name for name in after if after[name] != before.get(name)} <= reports
    assert set(after) == set(before)
    if job.args[0] == "predict":
        assert code == 0
        assert "there already" in captured.out or reports
    else:
        assert code == 2
        assert "--overwrite" in captured.err


def assert_outputs_are_all_that_changed(job, out, before: dict[str, str]) -> None:
    after = tree(out.parent)
    written = {str(out.parent / name) for name in after if after[name] not in (before.get(name), "folder")}
    assert written == set(map(str, job.outputs))
    # Nothing else is left, such as a folder of unfinished files.
    paths = {path for output in job.outputs for path in (output, *output.parents) if path.is_relative_to(out)}
    assert after.keys() == before.keys() | {str(path.relative_to(out.parent)) for path in paths}


def test_a_command_writes_the_outputs_of_this_list_once_and_replaces_them_on_demand(job, out, capsys) -> None:
    if job.is_slow:
        pytest.skip("run to its end by tests of its own")
    if job.overwrite:
        for output in job.outputs:
            put(output)
    put(out / "notes.txt")
    before = tree(out.parent)
    assert call([*job.args, "--overwrite"] if job.overwrite else job.args) == 0
    assert_outputs_are_all_that_changed(job, out, before)
    assert all(output.read_bytes() != MINE for output in job.outputs)
    assert_the_same_command_changes_no_file(job, out, capsys)


# One of each command and task, those that take the least time.
FIRST_RUNS = (predict_map_of_vrt, predict_objects, predict_classes, predict_slide_classes, evaluate_numbers, convert)


@pytest.mark.parametrize(
    "job",
    [pytest.param(make, marks=() if make in FIRST_RUNS else pytest.mark.slow, id=make.__name__) for make in JOBS],
    indirect=True,
)
def test_a_first_run_into_an_empty_folder_needs_no_option(job, out) -> None:
    if job.is_slow or not job.overwrite:
        pytest.skip("run to its end by tests of its own, or without the option by the test above")
    before = tree(out.parent)
    assert call(job.args) == 0
    assert_outputs_are_all_that_changed(job, out, before)


KINDS = ("file", "link", "link to nothing")
# Each pair of an output and what stands in its place is a command; the fast suite has each output and each thing.
pairs = pytest.mark.parametrize("pairs", ["in turn", pytest.param("all", marks=pytest.mark.slow)])


def chosen(pairs: str, number: int, all_of_them: list) -> list:
    """What the output of a number meets."""
    return all_of_them if pairs == "all" or not all_of_them else [all_of_them[number % len(all_of_them)]]


@pairs
def test_a_file_that_exists_is_not_replaced(job, out, capsys, pairs) -> None:
    for number, output in enumerate(job.outputs):
        for kind in chosen(pairs, number, KINDS):
            if kind == "file":
                put(output)
            else:
                put(out / "elsewhere") if kind == "link" else None
                output.parent.mkdir(parents=True, exist_ok=True)
                output.symlink_to(out / "elsewhere")
            assert names(output) & set(re.findall(r"[^ ,;]+", refused(job.args, out.parent, capsys)))
            shutil.rmtree(out)
            out.mkdir()


@pairs
def test_an_input_is_not_replaced_even_on_demand(job, out, capsys, pairs) -> None:
    extra = ["--overwrite"] if job.overwrite else []
    by_symlink = False
    for number in range(max(len(job.outputs), len(job.inputs))):
        output = job.outputs[number % len(job.outputs)]
        for given in chosen(pairs, number, job.inputs):
            output.parent.mkdir(parents=True, exist_ok=True)
            # Links of both kinds in turn.
            by_symlink = not by_symlink
            if by_symlink:
                output.symlink_to(given)
            else:
                os.link(given, output)
            line = refused([*job.args, *extra], out.parent, capsys)
            assert names(output) & set(re.findall(r"[^ ,;]+", line))
            assert not job.overwrite or "would replace " in line
            shutil.rmtree(out)
            out.mkdir()


@pairs
def test_an_unfinished_output_of_somebody_else_is_never_touched(job, out, capsys, pairs) -> None:
    predicted = [output for output in job.outputs if output.suffix == ".tif"]
    predicted = predicted or [output for output in job.outputs if record_of(output) in job.outputs]
    for number, output in enumerate(predicted if job.args[0] == "predict" else []):
        for content in chosen(pairs, number, ["notes.txt", "rows_1.tif", ""]):
            put(
                output.with_name(f"{output.name}.partial") / content
                if content
                else output.with_name(f"{output.name}.partial")
            )
            for extra in ([], ["--overwrite"]):
                assert "was not made by perf_vit" in refused([*job.args, *extra], out.parent, capsys)
            shutil.rmtree(out)
            out.mkdir()
