"""Layers for timm models; importing this package registers the mixers."""

from perf_vit.layers.clustered_mixer import ClusteredMixer, ClusteredOptions
from perf_vit.layers.linearized_attention import LinearizedAttention
from perf_vit.layers.mixer import MIXERS, Mixer, MixerOptions, register_mixer
from perf_vit.layers.performer_mixer import PerformerMixer, PerformerOptions, current_draw, redraw_projections
from perf_vit.layers.softmax_mixer import SoftmaxMixer, SoftmaxOptions

__all__ = [
    "MIXERS",
    "ClusteredMixer",
    "ClusteredOptions",
    "LinearizedAttention",
    "Mixer",
    "MixerOptions",
    "PerformerMixer",
    "PerformerOptions",
    "SoftmaxMixer",
    "SoftmaxOptions",
    "current_draw",
    "redraw_projections",
    "register_mixer",
]
