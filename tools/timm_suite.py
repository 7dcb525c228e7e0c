"""timm's own model tests, run over the models registered here.

    pip download timm --no-deps --no-binary timm && tar xzf timm-*.tar.gz
    python tools/timm_suite.py timm-*/tests/test_models.py -k "not torchscript"

Words after the file are pytest's. The tests stay as timm wrote them; what they list by `timm.list_models` becomes the
models of this package, which count as transformers wherever timm's do. `torchscript` is the one thing that isn't
supported: `torch.jit.trace`, `torch.export` and `torch.compile` are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

import pytest
import timm

import perf_vit  # noqa: F401  registers the models

MODULES = ("linear_vit", "rope_vit", "hct")
NAMES = [name for module in MODULES for name in timm.list_models(module=module)]
VITS = "*_vit_*"
_list_models = timm.list_models


def list_models(filter: Any = "", module: Any = "", exclude_filters: Any = "", **options: Any) -> list[str]:  # noqa: A002
    """Ours among what timm's tests ask for; patterns that hold timm's ViTs hold ours too."""
    if options.get("pretrained") or (module and "vision_transformer" not in module):
        return []
    exclude = _with_ours(exclude_filters)
    names = _list_models(include_tags=options.get("include_tags"))
    names = [name for name in names if name.partition(".")[0] in NAMES]
    if filter:
        names = [name for name in names if any(fnmatch(name, pattern) for pattern in _with_ours(filter))]
    return [name for name in names if not any(fnmatch(name, pattern) for pattern in exclude)]


def _with_ours(patterns: str | Sequence[str]) -> list[str]:
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    return [*patterns, VITS] if "vit_*" in patterns else patterns


class OurModels:
    """Tests of ours are run, those of timm's own models left out."""

    def pytest_configure(self, config: pytest.Config) -> None:
        timm.list_models = list_models

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if _model_of(item) in NAMES]


def _model_of(item: pytest.Item) -> str:
    callspec = getattr(item, "callspec", None)
    return str(callspec.params.get("model_name", "")).partition(".")[0] if callspec else ""


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("expected the path of timm's tests/test_models.py, got none")
    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-W", "ignore", *sys.argv[1:]], plugins=[OurModels()]))
