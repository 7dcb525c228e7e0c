"""Loading of YAML configs into dataclasses, which are defined next to the code that they configure."""

from perf_vit.errors import extra

with extra("geo", __name__):
    from perf_vit.config.loader import (
        Config,
        Overrides,
        check_values,
        config_value,
        dump_config,
        find_config,
        is_dumped,
        load_config,
        shipped_configs,
    )
    from perf_vit.config.yaml_text import load_yaml

__all__ = [
    "Config",
    "Overrides",
    "check_values",
    "config_value",
    "dump_config",
    "find_config",
    "is_dumped",
    "load_config",
    "load_yaml",
    "shipped_configs",
]
