"""The reference of config keys and the JSON schema for editors."""

import dataclasses
import typing
from typing import Any

import jsonschema
import pytest
import yaml

from perf_vit.config import config_keys, field_meanings, find_config, shipped_configs
from perf_vit.workflows.registry import config_schema, config_schemas

SCHEMAS = config_schemas()


@pytest.mark.parametrize("task", SCHEMAS)
def test_every_key_has_a_type_and_a_meaning(task: str) -> None:
    keys = config_keys(SCHEMAS[task])
    assert len({key.name for key in keys}) == len(keys)
    assert [key.name for key in keys if not key.meaning.endswith(".") or not key.type] == []
    assert {key.group for key in keys} >= {"run", "data", "model", "optim", "trainer"}


def test_keys_are_those_of_the_nested_dataclasses() -> None:
    keys = {key.name: key for key in config_keys(SCHEMAS["segmentation"])}
    assert keys["data.tile_px"].default == "512"
    assert keys["data.tile_px"].type == "whole number"
    assert keys["data.classes"].default is None
    assert keys["data.train.image"].default is None
    assert keys["data.augment.flips"].default == "true"
    assert keys["model.lora"].default == "null"
    assert keys["model.lora.rank"].group == "model"
    assert "optim.loss.dice" in keys
    assert "data.augment" not in keys
    assert {key.partition(".")[0] for key in keys} == {
        each.name for each in dataclasses.fields(SCHEMAS["segmentation"])
    }


def test_a_subclass_describes_a_field_of_its_base_anew() -> None:
    run: Any = SCHEMAS["detection"]
    model = typing.get_type_hints(run)["model"]
    assert "SimpleFPN" in field_meanings(model)["backbone"]
    assert "frozen" in field_meanings(model)["lora"]


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configs_are_valid_in_editors(name: str) -> None:
    content = yaml.safe_load(find_config(name).read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator(config_schema())
    assert [error.message for error in validator.iter_errors(content)] == []


@pytest.mark.parametrize(
    ("content", "path"),
    [
        ({"data": {"tile_pix": 3}}, "tile_pix"),
        ({"data": {"tile_px": "big"}}, "big"),
        ({"task": "detection", "data": {"multilabel": True}}, "multilabel"),
        ({"optim": {"loss": "dise"}}, "dise"),
        ({"data": {"sampler": "even"}}, "even"),
        ({"task": "segmentaton"}, "segmentaton"),
        ({"optim": {"schedule": "cosin"}}, "cosin"),
    ],
)
def test_mistakes_are_found_in_editors(content: dict, path: str) -> None:
    with pytest.raises(jsonschema.ValidationError) as error:
        jsonschema.validate(content, config_schema())
    assert path in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        {
            "optim": {"loss": "dice", "lr": "${base}"},
            "data": {"classes": "building", "bands": 1, "train": {"image": "???"}},
        },
        {"trainer": {"devices": [0]}, "model": {"lora": True, "head_kwargs": {"norm": "group"}}},
        {"extends": "detection/trees", "data": {"val_share": 0.1}},
        {"task": "distillation", "model": {"student": None}},
    ],
)
def test_what_loads_is_valid_in_editors(content: dict) -> None:
    jsonschema.validate(content, config_schema())
    jsonschema.Draft202012Validator.check_schema(config_schema())
