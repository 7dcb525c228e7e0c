"""First configs, written from a user's own images and labels."""

from perf_vit.errors import extra

with extra("train", "init"):
    from perf_vit.workflows.first_config.write import FirstConfig, init

__all__ = ["FirstConfig", "init"]
