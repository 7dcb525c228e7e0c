"""Layers for timm models; importing this package registers the mixers."""

from perf_vit.layers.clustered_mixer import ClusteredMixer, ClusteredOptions
from perf_vit.layers.linearized_attention import LinearizedAttention
from perf_vit.layers.linformer_mixer import LinformerMixer, LinformerOptions
from perf_vit.layers.mixer import MIXERS, Mixer, MixerOptions, register_mixer
from perf_vit.layers.performer_mixer import PerformerMixer, PerformerOptions, current_draw, redraw_projections
from perf_vit.layers.reformer_mixer import ReformerMixer, ReformerOptions
from perf_vit.layers.softmax_mixer import SoftmaxMixer, SoftmaxOptions
from perf_vit.layers.state_space_mixers import H3Mixer, H3Options, S4Mixer, S4Options
from perf_vit.layers.window_mixers import RegistersMixer, RegistersOptions, WindowedMixer, WindowedOptions

__all__ = [
    "MIXERS",
    "ClusteredMixer",
    "ClusteredOptions",
    "H3Mixer",
    "H3Options",
    "LinearizedAttention",
    "LinformerMixer",
    "LinformerOptions",
    "Mixer",
    "MixerOptions",
    "PerformerMixer",
    "PerformerOptions",
    "ReformerMixer",
    "ReformerOptions",
    "RegistersMixer",
    "RegistersOptions",
    "S4Mixer",
    "S4Options",
    "SoftmaxMixer",
    "SoftmaxOptions",
    "WindowedMixer",
    "WindowedOptions",
    "current_draw",
    "redraw_projections",
    "register_mixer",
]
