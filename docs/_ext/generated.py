"""Parts of pages that are generated from the code: `<!-- generated: NAME -->` in a page is replaced by Markdown."""

import inspect
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

_MARK = re.compile(r"<!-- generated: (\w+) -->")


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = [list(header), *([str(cell) for cell in row] for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def first_line(item: Any) -> str:
    """The first sentence of a docstring."""
    text = inspect.getdoc(item) or ""
    return text.split("\n\n")[0].replace("\n", " ").strip()


def configuration() -> str:
    """Every key of every run: type, default, tasks and meaning."""
    from perf_vit.workflows.registry import config_schemas, task_keys

    schemas = config_schemas()
    keys = {task: {key.name: key for key in task_keys(task)} for task in schemas}
    names = list(dict.fromkeys(name for each in keys.values() for name in each))
    sections = list(dict.fromkeys(_section(name) for name in names))
    parts = []
    for section in sections:
        parts.append(f"## {section}\n")
        for name in (each for each in names if _section(each) == section):
            by_task = {task: each[name] for task, each in keys.items() if name in each}
            parts.append(_key(name, by_task, len(schemas)))
    return "\n".join(parts)


def _section(name: str) -> str:
    return f"`{name.partition('.')[0]}`" if "." in name else "The run"


def _key(name: str, by_task: Mapping[str, Any], num_tasks: int) -> str:
    """One key: an entry for each meaning that it has, with the defaults of the tasks."""
    lines = [f"(config-{name})=", f"### `{name}`\n"]
    for meaning in dict.fromkeys(key.meaning for key in by_task.values()):
        tasks = [task for task, key in by_task.items() if key.meaning == meaning]
        types = dict.fromkeys(by_task[task].type for task in tasks)
        shown = "all tasks" if len(tasks) == num_tasks else ", ".join(tasks)
        lines.append(f"{', '.join(types)}; {_defaults({task: by_task[task] for task in tasks})}; {shown}\n")
        lines.append(f": {_with_code(meaning)}\n")
    return "\n".join(lines)


def _defaults(by_task: Mapping[str, Any]) -> str:
    if all(key.default == task for task, key in by_task.items()):
        return "default: the task's name"
    groups: dict[str | None, list[str]] = {}
    for task, key in by_task.items():
        groups.setdefault(key.default, []).append(task)
    if list(groups) == [None]:
        return "required"
    shown = ["none" if default is None else f"`{default}`" for default in groups]
    if len(groups) > 1:
        shown = [f"{text} ({', '.join(tasks)})" for text, tasks in zip(shown, groups.values(), strict=True)]
    return f"default {', '.join(shown)}"


def _with_code(meaning: str) -> str:
    # Braces and brackets of examples are no Markdown.
    return re.sub(r"(?<!`)(\{[^{}`]+\}|\[[^\[\]`]+\])(?!`)", r"`\1`", meaning)


def commands() -> str:
    """Every command with its arguments and options."""
    import typer

    from perf_vit.cli.main import app

    parts = []
    for name, command in typer.main.get_command(app).commands.items():
        parts.append(f"## perf-vit {name}\n\n{inspect.cleandoc(command.help or '').split(chr(12))[0]}\n")
        rows = []
        for each in command.params:
            if getattr(each, "hidden", False) or each.name == "help":
                continue
            names = [*each.opts, *each.secondary_opts] if each.param_type_name == "option" else [each.name.upper()]
            rows.append((", ".join(f"`{one}`" for one in names), _default_of(each), each.help or ""))
        parts.append(table(("option", "default", "meaning"), rows) + "\n")
    return "\n".join(parts)


def _default_of(option: Any) -> str:
    if option.required:
        return "required"
    return "" if option.default in (None, False, (), []) or callable(option.default) else f"`{option.default}`"


def registries() -> str:
    """The names of every registry, and what they stand for."""
    from perf_vit.labels.objects import LABEL_FORMATS
    from perf_vit.layers import MIXERS
    from perf_vit.models.heads import DETECTION_HEADS, SEGMENTATION_HEADS
    from perf_vit.ops import KERNELS
    from perf_vit.sources import READERS
    from perf_vit.tiling import BLENDS
    from perf_vit.workflows.registry import TASKS

    parts = []
    for title, module, registry, decorator, use in (
        ("Mixers", "layers.MIXERS", MIXERS, "layers.register_mixer", "`mixer=` of `linearize` and of the backbones"),
        ("Kernels", "ops.KERNELS", KERNELS, "ops.register_kernel", "`kernel=` of the mixer `performer`"),
        (
            "Segmentation heads",
            "models.heads.SEGMENTATION_HEADS",
            SEGMENTATION_HEADS,
            "models.heads.register_segmentation_head",
            "`model.head` of segmentation",
        ),
        (
            "Detection heads",
            "models.heads.DETECTION_HEADS",
            DETECTION_HEADS,
            "models.heads.register_detection_head",
            "`model.head` of detection",
        ),
        ("Tasks", "workflows.registry.TASKS", TASKS, "workflows.registry.register_task", "`task` of a config"),
        (
            "Formats of object labels",
            "labels.objects.LABEL_FORMATS",
            LABEL_FORMATS,
            "labels.objects.register_label_format",
            "`data.train.label_format` and `--label-format`",
        ),
        (
            "Readers of slides",
            "sources.READERS",
            READERS,
            "sources.register_source",
            "Suffixes that are opened as slides",
        ),
        ("Blending weights", "tiling.BLENDS", BLENDS, "tiling.register_blend", "`--blend`"),
    ):
        # Names with the same description share a row, such as the suffixes of a reader.
        names: dict[str, list[str]] = {}
        for name, item in registry.items():
            names.setdefault(_described(item), []).append(f"`{name}`")
        rows = [(", ".join(each), text) for text, each in names.items()]
        parts.append(f"## {title}\n\n{use}. Registry `perf_vit.{module}`, decorator `perf_vit.{decorator}`.\n")
        parts.append(table(("name", "what it is"), rows) + "\n")
    return "\n".join(parts)


def _described(item: Any) -> str:
    """What a registered object is: from its docstring, or from what it holds."""
    if inspect.isclass(item) or inspect.isroutine(item):
        return first_line(item)
    if hasattr(item, "estimates_softmax"):
        kind = "estimates softmax attention" if item.estimates_softmax else "another attention than softmax"
        return f"Features per row of the projection: {item.features_per_row}; {kind}."
    if hasattr(item, "read"):
        return first_line(item.read)
    label = getattr(item, "label", "")
    return f"{label[:1].upper()}{label[1:]}." if label else first_line(item)


_OF_DEVELOPERS = {"dev", "docs", "integrations", "peers"}


def extras() -> str:
    """The optional dependencies of the package."""
    path = Path(__file__).parents[2] / "pyproject.toml"
    groups = tomllib.loads(path.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    rows = [
        (f"`{name}`", ", ".join(_package(each) for each in packages))
        for name, packages in groups.items()
        if name not in _OF_DEVELOPERS
    ]
    return table(("extra", "packages"), rows)


def _package(requirement: str) -> str:
    own = re.fullmatch(r"perf-vit\[(.*)\]", requirement)
    if own:
        return f"those of {', '.join(f'`{name}`' for name in own[1].split(','))}"
    return re.split(r"[\s<>=!~;]", requirement)[0]


GENERATED: dict[str, Callable[[], str]] = {
    each.__name__: each for each in (configuration, commands, registries, extras)
}


def fill(text: str) -> str:
    """A page with its generated parts."""
    return _MARK.sub(lambda found: GENERATED[found[1]](), text)


def plain_text(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Escape what reStructuredText would read in docstrings, which are plain text with `code`: |x|, *.tif, 2**n."""
    for number, line in enumerate(lines):
        # Napoleon escapes the names of arguments itself.
        if not re.match(r"\s*\*+\w+:", line):
            parts = re.split(r"(`[^`]*`)", line)
            lines[number] = "".join(
                part if part.startswith("`") else re.sub(r"[|*]", r"\\\g<0>", part) for part in parts
            )


def setup(app: Any) -> dict[str, bool]:
    """Replace the marks of pages before they are parsed."""

    def page(app: Any, docname: str, content: list[str]) -> None:
        if _MARK.search(content[0]):
            content[0] = fill(content[0])
            # Nothing tells which files of the package a part comes from.
            app.env.note_reread()

    app.connect("source-read", page)
    # Before Napoleon, which makes markup of sections.
    app.connect("autodoc-process-docstring", plain_text, priority=400)
    return {"parallel_read_safe": True}
