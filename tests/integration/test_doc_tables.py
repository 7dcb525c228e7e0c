"""What the pages say of configs and options is so: keys and options exist, and have the defaults of the tables."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
import yaml

from perf_vit.cli.main import app
from perf_vit.workflows.run_config import (
    ClassificationRun,
    DetectionRun,
    DistillationRun,
    RegressionRun,
    SegmentationRun,
    SlideClassificationRun,
)

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)]
TASKS = (SegmentationRun, DetectionRun, ClassificationRun, RegressionRun, SlideClassificationRun)
OF_PAGE = {
    "segmentation.md": (SegmentationRun,),
    "detection.md": (DetectionRun,),
    "oriented.md": (DetectionRun,),
    "classification.md": (ClassificationRun, RegressionRun),
    "slide_classification.md": (SlideClassificationRun,),
    "distillation.md": (DistillationRun,),
}
SECTIONS = {"data", "model", "optim", "trainer", "teacher", "student", "pair"}
MISSING = object()


def fields_of(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of a schema and their defaults; what an open mapping holds is not checked."""
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        default = field.default
        if default is dataclasses.MISSING:
            default = MISSING if field.default_factory is dataclasses.MISSING else field.default_factory()
        yield prefix + field.name, default
        for kind in (hints[field.name], *get_args(hints[field.name])):
            if dataclasses.is_dataclass(kind):
                yield from fields_of(kind, f"{prefix}{field.name}.")
            if any(dataclasses.is_dataclass(each) for each in get_args(kind)):
                yield from fields_of(get_args(kind)[0], f"{prefix}{field.name}.")


def open_mappings(schema: type) -> set[str]:
    return {key for key, default in fields_of(schema) if isinstance(default, dict)}


def keys_in(text: str) -> set[str]:
    """Config keys in code: `data.tile_px`, `'model.lora={rank: 8}'`, data.sampler=balanced in commands."""
    code = re.findall(r"`([^`\n]+)`", text) + re.findall(r"^(?: {4}|\$ ).*$", text, re.MULTILINE)
    code += [
        line for block in re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL) for line in block.split("\n")
    ]
    found = set()
    for piece in code:
        for key in re.findall(r"(?<![\w./-])((?:data|model|optim|trainer)\.[a-z_]+(?:\.[a-z_]+)*)(?![\w(])", piece):
            found.add(key)
    return found


def tables_in(text: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Header and rows of each table."""
    for block in re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE):
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.strip().split("\n")]
        yield rows[0], rows[2:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_exist(page: Path) -> None:
    schemas = OF_PAGE.get(page.name, (*TASKS, DistillationRun))
    if page.name in OF_PAGE:
        schemas = (*schemas, *TASKS, DistillationRun) if page.name == "distillation.md" else schemas
    known = {key for schema in schemas for key, _ in fields_of(schema)}
    opened = {key for schema in schemas for key in open_mappings(schema)}
    unknown = {
        key
        for key in keys_in(page.read_text(encoding="utf-8"))
        if key not in known and not any(key.startswith(f"{mapping}.") for mapping in opened)
    }
    # Python attributes and file names that look like keys.
    assert not {
        key for key in unknown if not key.startswith("model.spec.") and not key.endswith((".safetensors", ".yaml"))
    }


def stated(cell: str) -> Any:
    """A default as a table states it: the first code or number; MISSING where it is words."""
    if cell in {"none", "measured", "the file's own"}:
        return None
    code = re.match(r"`([^`]*)`", cell)
    number = re.match(r"-?[\d,]*\.?\d+(?:e-?\d+)?(?![\d.])", cell)
    if code is None and number is None:
        return MISSING
    return yaml.safe_load(code[1]) if code else float(number[0].replace(",", ""))


def plain(default: Any) -> Any:
    if dataclasses.is_dataclass(default):
        return MISSING
    return list(default) if isinstance(default, tuple) else default


def stated_defaults() -> list:
    cases = []
    for page in PAGES:
        for header, rows in tables_in(page.read_text(encoding="utf-8")):
            if "default" not in header:
                continue
            for row in rows:
                cell = row[header.index("default")]
                values = [cell] if "`, `" not in row[0] else [part.strip() for part in cell.split(",")]
                names = re.findall(r"`([^`]+)`", row[0])
                values = values if len(values) == len(names) else [cell] * len(names)
                cases += [
                    pytest.param(page.name, n, v, id=f"{page.stem}-{n}") for n, v in zip(names, values, strict=True)
                ]
    return cases


@pytest.mark.parametrize(("page", "name", "cell"), stated_defaults())
def test_defaults_are_those_of_the_tables(page: str, name: str, cell: str) -> None:
    value = stated(cell)
    if value is MISSING:
        pytest.skip("said in words")
    if name.startswith("--"):
        defaults = [option_default(command, name) for command in commands() if has_option(command, name)]
        assert defaults, f"no command has {name}"
        assert any(value == each or str(each) == cell.strip("`") for each in defaults)
        return
    if name.partition(".")[0] not in SECTIONS | {"seed"}:
        pytest.skip("no key of a config")
    schemas = OF_PAGE.get(page, TASKS)
    found = [plain(dict(fields_of(schema)).get(name, MISSING)) for schema in schemas]
    assert any(each is not MISSING for each in found)
    several = " for " in cell
    for each in found:
        # None of an option, and a mapping left empty, are both nothing.
        assert several or each is MISSING or each == value or not (each or value), (name, each, value)


def commands() -> list:
    return list(typer.main.get_command(app).commands.values())


def has_option(command: Any, name: str) -> bool:
    return any(name in (*each.opts, *each.secondary_opts) for each in command.params)


def option_default(command: Any, name: str) -> Any:
    (option,) = [each for each in command.params if name in (*each.opts, *each.secondary_opts)]
    return option.default


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_exist(page: Path) -> None:
    known = {name for command in commands() for each in command.params for name in (*each.opts, *each.secondary_opts)}
    text = page.read_text(encoding="utf-8")
    code = re.findall(r"`([^`\n]+)`", text)
    code += [line for line in text.split("\n") if "perf-vit " in line]
    used = {name for piece in code for name in re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", piece)}
    # Of other programs, and of the scripts under tools/ and datasets/.
    own = re.findall(r"^.*(?:python|tools/|datasets/|pip |pytest|torchrun).*$", text, re.MULTILINE)
    scripts = {name for line in own for name in re.findall(r"(--[a-z][a-z-]+)", line)}
    for script in [*ROOT.glob("tools/**/*.py"), *ROOT.glob("datasets/*/*.py")]:
        source = script.read_text(encoding="utf-8")
        scripts |= set(re.findall(r"\"(--[a-z][a-z-]+)\"", source))
        scripts |= {f"--{name.replace('_', '-')}" for name in re.findall(r"^\s+(\w+): Annotated", source, re.MULTILINE)}
    assert used - known - scripts - {"--help", "--version", "--logdir", "--install-completion"} == set()
