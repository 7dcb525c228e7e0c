"""Loading of YAML configs into dataclasses, which are defined next to the code that they configure."""

from perf_vit.errors import extra

with extra("geo", __name__):
    from perf_vit.config.loader import (
        Config,
        Overrides,
        as_overrides,
        config_value,
        dump_config,
        find_config,
        given_keys,
        is_dumped,
        load_config,
        shipped_configs,
    )
    from perf_vit.config.reference import ConfigKey, config_keys, field_meanings, json_schema
    from perf_vit.config.values import build_config, check_values
    from perf_vit.config.yaml_text import load_yaml

__all__ = [
    "Config",
    "ConfigKey",
    "Overrides",
    "as_overrides",
    "build_config",
    "check_values",
    "config_keys",
    "config_value",
    "dump_config",
    "field_meanings",
    "find_config",
    "given_keys",
    "is_dumped",
    "json_schema",
    "load_config",
    "load_yaml",
    "shipped_configs",
]
