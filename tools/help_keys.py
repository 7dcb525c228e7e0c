"""Write the names of config keys that `perf-vit train --help` and `distill --help` list: python tools/help_keys.py."""

import json
from pathlib import Path

from perf_vit.workflows.registry import config_schemas, task_keys

FILE = Path(__file__).parents[1] / "perf_vit" / "cli" / "help_keys.json"


def text() -> str:
    """The file that belongs there now: for each command the keys of each section, JSON."""
    tasks = [task for task in config_schemas() if task != "distillation"]
    return json.dumps({"train": _sections(tasks), "distill": _sections(["distillation"])}, indent=1) + "\n"


def _sections(tasks: list[str]) -> dict[str, list[str]]:
    """Keys by section; a star follows those that some of the tasks lack."""
    tasks_of: dict[str, dict[str, list[str]]] = {}
    for task in tasks:
        for key in task_keys(task):
            tasks_of.setdefault(key.group, {}).setdefault(key.name, []).append(task)
    return {
        section: [name if len(having) == len(tasks) else f"{name}*" for name, having in names.items()]
        for section, names in tasks_of.items()
    }


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
