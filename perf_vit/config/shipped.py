"""Where the shipped configs lie: the checkout's `configs/` folder, or the copy inside an installed wheel."""

import difflib
from pathlib import Path

from perf_vit.errors import ConfigError

__all__ = ["find_config", "shipped_configs"]

_PACKAGE = Path(__file__).resolve().parent.parent


def _folder() -> Path:
    installed = _PACKAGE / "_configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def shipped_configs() -> list[str]:
    """Names of the shipped configs, as `find_config` takes them: "configs/segmentation/buildings.yaml"."""
    folder = _folder()
    return sorted(f"configs/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.yaml"))


def find_config(name: str | Path) -> Path:
    """Resolve a config's path: a file of the user's first, then a shipped one of that name.

    Args:
        name: a path, or a shipped name with or without the leading "configs/".

    Raises:
        ConfigError: neither exists; the message names the nearest shipped config.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = _folder() / path.as_posix().removeprefix("configs/")
    if shipped.is_file():
        return shipped
    near = difflib.get_close_matches(str(name), shipped_configs(), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"shipped: {', '.join(shipped_configs())}"
    raise ConfigError(f"no config file {name}; {hint}")
