"""Loading of YAML configs onto dataclass schemas. The schemas live beside the code that they configure."""

from perf_vit.config.loader import config_value, dump_config, load_config
from perf_vit.config.shipped import find_config, shipped_configs

__all__ = ["config_value", "dump_config", "find_config", "load_config", "shipped_configs"]
