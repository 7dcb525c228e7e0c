"""Lists of STAC items: which file of each item holds the pixels."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from perf_vit.errors import InputError, parsing

__all__ = ["is_item_list", "item_paths"]

_RASTER_TYPES = ("image/tiff", "image/vnd.stac.geotiff", "image/jp2", "application/x-hdf", "application/x-netcdf")
_OTHER_ROLES = {"thumbnail", "overview", "metadata"}


def is_item_list(path: str) -> bool:
    """Whether a file's name says that it may hold STAC items; `item_paths` looks inside."""
    return path.lower().endswith(".json") and os.path.isfile(path)


def item_paths(path: str, asset: str | None) -> list[str]:
    """The files of an item, a list of items or an ItemCollection, one an item.

    Args:
        path: of the JSON file.
        asset: its name in every item; None where an item has one data asset only.

    Raises:
        InputError: the file holds no items, or an item has no such asset, or several to choose from.
    """
    items = _items(path)
    with parsing(path, "STAC items"):
        return [_locate(_choose(item, path, asset)["href"], path) for item in items]


def _items(path: str) -> list[Mapping[str, Any]]:
    with parsing(path, "JSON"), open(path, "rb") as file:
        content = json.load(file)
    if isinstance(content, dict):
        content = content.get("features", [content])
    listed = content if isinstance(content, list) else []
    items: list[Mapping[str, Any]] = [item for item in listed if isinstance(item, dict) and "assets" in item]
    if not items or len(items) != len(listed):
        raise InputError(f"{path} must hold STAC items, each with assets: an ItemCollection, a list or one item")
    return items


def _choose(item: Mapping[str, Any], path: str, asset: str | None) -> Mapping[str, Any]:
    assets, name = item["assets"], item.get("id", "without id")
    if asset is not None:
        if asset in assets:
            return assets[asset]
        near = difflib.get_close_matches(asset, assets, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}" if near else ""
        raise InputError(f"item {name} of {path} has no asset {asset!r}{hint}; its assets are {', '.join(assets)}")
    data = [key for key, value in assets.items() if _is_data(value)]
    if len(data) != 1:
        found = f"several data assets ({', '.join(data)})" if data else f"no data asset among {', '.join(assets)}"
        raise InputError(f"item {name} of {path} has {found}; choose one with asset=")
    return assets[data[0]]


def _is_data(asset: Mapping[str, Any]) -> bool:
    roles = set(asset.get("roles") or ())
    if roles & _OTHER_ROLES:
        return False
    return "data" in roles or str(asset.get("type", "")).startswith(_RASTER_TYPES)


def _locate(href: str, path: str) -> str:
    """A link as a path: relative ones are relative to the JSON file."""
    local = href.removeprefix("file://")
    if ":" in local or local.startswith("/vsi"):
        return local
    here = os.path.join(os.path.dirname(path), local)
    # Links are URLs, in which "%20" is a space; many writers put plain paths there.
    return here if os.path.exists(here) else os.path.join(os.path.dirname(path), unquote(local))
