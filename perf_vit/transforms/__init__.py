"""What happens to pixels between a source and a model: the same at training and at prediction."""

from perf_vit.transforms.augment import Augmentation
from perf_vit.transforms.normalize import Normalizer

__all__ = ["Augmentation", "Normalizer"]
