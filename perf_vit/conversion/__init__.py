"""Conversion of pretrained softmax ViTs to linear attention."""

from perf_vit.conversion.budget import choose_layer_options, measure_crossover
from perf_vit.conversion.fidelity import attention_errors, token_cosines
from perf_vit.conversion.linearize import linearize
from perf_vit.conversion.save import load_converted, load_softmax, save_converted

__all__ = [
    "attention_errors",
    "choose_layer_options",
    "linearize",
    "load_converted",
    "load_softmax",
    "measure_crossover",
    "save_converted",
    "token_cosines",
]
