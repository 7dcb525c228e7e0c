"""First configs, written from a user's own images and labels."""

from perf_vit.workflows.first_config.write import FirstConfig, init

__all__ = ["FirstConfig", "init"]
