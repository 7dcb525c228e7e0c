"""Bring the table of docs/models.md up to date with the registered models: python tools/model_table.py."""

from pathlib import Path

import timm
from torch import nn

from perf_vit import backbones
from perf_vit.layers import LinearizedAttention

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN = "<!-- The table is written by tools/model_table.py. -->\n"
END = "<!-- End of the table. -->\n"
HEADER = """\
| name | parameters (M) | embed dim | depth | heads | patch (px) | default size (px) |
|---|--:|--:|--:|--:|--:|--:|
"""


def registered_names() -> list[str]:
    """The package's models, in the order in which they are registered."""
    return [name for name in backbones.__all__ if timm.is_model(name)]


def table() -> str:
    """The table, Markdown, one row a model."""
    return HEADER + "".join(_row(name, timm.create_model(name, device="meta")) for name in registered_names())


def updated(page: str) -> str:
    """The page with the table that belongs there now."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def _row(name: str, model: nn.Module) -> str:
    heads = {module.num_heads for module in model.modules() if isinstance(module, LinearizedAttention)}
    is_vit = hasattr(model, "patch_embed")
    cells = [
        f"`{name}`",
        f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}",
        model.num_features,
        len(model.blocks) if is_vit else sum(len(stage) for stage in model.stages),
        "/".join(map(str, sorted(heads))),
        model.patch_embed.patch_size[0] if is_vit else "-",
        " x ".join(map(str, model.default_cfg["input_size"][1:])),
    ]
    return f"| {' | '.join(map(str, cells))} |\n"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
