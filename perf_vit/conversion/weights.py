"""Weights from files, timm models created with them, and the arguments of `timm.create_model` that files may set."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from perf_vit.errors import CheckpointError, ConfigError, parsing, reason_line
from perf_vit.registry import load_extensions

__all__ = [
    "FILE_ARGUMENTS",
    "check_file_arguments",
    "create_with_weights",
    "create_without_classifier",
    "is_model",
    "pretrained_cfg_of_file",
    "read_weights",
    "stored_folder",
    "weights_file",
]


def is_model(name: str) -> bool:
    """Return whether timm has a model, of its own, of this package or of an installed extension."""
    load_extensions()
    return bool(timm.is_model(name))


_HUB, _FOLDER = ("hf-hub:", "hf_hub:"), ("local-dir:", "local_dir:")
ENHANCEMENT = "local_enhancement.safetensors"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def stored_folder(name: str) -> Path | None:
    """Return the folder with `config.json` and weights, in timm's hub format, that the name of a backbone stands for.

    Args:
        name: "local-dir:FOLDER" or a folder, or "hf-hub:OWNER/MODEL" with or without "@REVISION", whose files are
            fetched once and then kept in the cache of huggingface_hub; anything else is taken for a timm model.

    Returns:
        The folder; None for a timm model.

    Raises:
        ConfigError: There is no such folder, or the hub doesn't give the model.
    """
    if name.startswith(_HUB):
        return _fetched(name)
    if not name.startswith(_FOLDER):
        return Path(name) if not is_model(name) and Path(name).is_dir() else None
    folder = Path(name.partition(":")[2])
    if not folder.is_dir():
        raise ConfigError(f"model.backbone {name}: there is no folder {folder}; check the path")
    return folder


def _fetched(name: str) -> Path:
    model, _, revision = name.partition(":")[2].partition("@")
    problem: Exception | None = None
    for weights in _WEIGHTS:
        try:
            config = hf_hub_download(model, "config.json", revision=revision or None)
            hf_hub_download(model, weights, revision=revision or None)
            # Only conversions with a local enhancement have it.
            with suppress(HfHubHTTPError, OSError):
                hf_hub_download(model, ENHANCEMENT, revision=revision or None)
            return Path(config).parent
        # Without network, and without the file in the cache, there is an OSError.
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            problem = error
    assert problem is not None
    reason = reason_line(problem).partition(". ")[0]
    raise ConfigError(
        f"model.backbone {name} can't be fetched: {reason}; check name and network, or give a folder that holds "
        "config.json and model.safetensors, as local-dir:FOLDER"
    ) from problem


def weights_file(folder: str | Path) -> Path:
    """Return the file with the weights of a folder in timm's hub format."""
    return next((file for name in _WEIGHTS if (file := Path(folder, name)).is_file()), Path(folder, _WEIGHTS[0]))


_COMMON = """
    in_chans num_classes global_pool img_size features_only out_indices output_stride drop_rate drop_path_rate
    proj_drop_rate attn_drop_rate pos_drop_rate patch_drop_rate drop_block_rate norm_layer act_layer norm_eps
    weight_init
"""

_PLAIN_VITS = """
    patch_size embed_dim depth num_heads num_kv_heads head_dim mlp_ratio qkv_bias qkv_fused qk_norm proj_bias mlp_bias
    scale_attn_norm scale_attn_inner scale_mlp scale_mlp_norm init_values class_token reg_tokens num_reg_tokens
    no_embed_class pos_embed pos_embed_grid_size pre_norm embed_norm final_norm fc_norm use_fc_norm use_post_norm
    use_pre_transformer_norm use_post_transformer_norm pool_include_prefix dynamic_img_size dynamic_img_pad
    strict_img_size swiglu_mlp swiglu_align_to attn_type attn_pool_num_heads attn_pool_mlp_ratio use_abs_pos_emb
    use_rot_pos_emb use_rel_pos_bias use_shared_rel_pos_bias rope_type rope_temperature rope_theta rope_grid_offset
    rope_grid_indexing rope_rotate_half rope_shift_coords rope_jitter_coords rope_rescale_coords ref_feat_shape
    num_features intermediate_size merge_size distilled use_rel_pos use_abs_pos use_rope rel_pos_type window_size
    global_attn_indexes neck_chans
"""

_PYRAMIDS = """
    depths dims embed_dims widths width channels layers mlp_ratios sr_ratios conv_bias conv_mlp kernel_size kernel_sizes
    layer_scale_init_value layer_scale_init_values ls_init_value head_init_scale head_norm_first use_grn downsamples
    window_ratio always_partition patch_norm pretrained_window_sizes stem_type stem_width stem_size stem_chs
    stem_kernel_size stem_stride replace_stem_pool cardinality base_width groups avg_down zero_init_last
    block_reduce_first expand_ratio width_factor width_mult depth_mult se_ratio pad_type aa_layer token_mixers
"""

_OURS = "mixer attn_kwargs num_attn_stages"

FILE_ARGUMENTS = frozenset(" ".join((_COMMON, _PLAIN_VITS, _PYRAMIDS, _OURS)).split())
"""Arguments that a file may set: those that shape a network and load nothing.

Other arguments read weights (`checkpoint_path`, `pretrained`, `pretrained_cfg`, `pretrained_cfg_overlay`) or write them
(`cache_dir`) at any path, and a pickle there can run any code. The author of a checkpoint, a model folder or a config
must not control that.
"""

# Keys of `pretrained_cfg` except the sources of weights: a file comes with its own weights.
_OF_IMAGES = """
    tag input_size test_input_size min_input_size fixed_input_size interpolation crop_pct test_crop_pct crop_mode mean
    std num_classes label_names label_descriptions pool_size test_pool_size first_conv classifier license description
    origin_url paper_name paper_ids notes
"""

_PRETRAINED_CFG = frozenset(_OF_IMAGES.split())


def check_file_arguments(arguments: Any, where: str, error: type[ValueError] = ConfigError) -> dict[str, Any]:
    """Return arguments of `timm.create_model` read from a file, if all of them are allowed.

    Args:
        arguments: Names and plain values.
        where: Description of the source for the error message.
        error: Class of the error to raise.

    Raises:
        ValueError: An argument isn't allowed or its value isn't plain, of class `error`.
    """
    if not isinstance(arguments, Mapping):
        raise error(f"{where} must be names and values, got {type(arguments).__name__}")
    for name, value in arguments.items():
        if name not in FILE_ARGUMENTS:
            near = difflib.get_close_matches(str(name), FILE_ARGUMENTS, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else "build such a model in Python"
            raise error(f"{where} may hold arguments that shape a timm model, such as depth, got {name}; {hint}")
        if not _is_plain(value):
            raise error(f"{where}: {name} must be a number, a word, or a list or mapping of these, got {value!r:.80}")
    return dict(arguments)


def pretrained_cfg_of_file(values: Any) -> dict[str, Any]:
    """Return the entries of a file's `pretrained_cfg` on images and classes, without other sources of weights."""
    if not isinstance(values, Mapping):
        return {}
    return {name: value for name, value in values.items() if name in _PRETRAINED_CFG and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str | int) and _is_plain(each) for key, each in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


# Keys under which training scripts store the state dict.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")

# timm's own sources of weights are disabled: they may take precedence over the given state dict.
_NO_OTHER_SOURCE = {"source": None, "file": None, "url": None, "hf_hub_id": None, "custom_load": False}

_SIZE_MISMATCH = re.compile(r"size mismatch for ([^:]+): .*?Size\((\[[^]]*\])\).*?Size\((\[[^]]*\])\)")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from `.safetensors` or a file of `torch.save`, of which only tensors are loaded.

    The state dict may be nested under "state_dict" or "model", and its names may start with "module.".

    Returns:
        Mapping of name to tensor on the CPU; floating-point tensors as float32.

    Raises:
        CheckpointError: The file doesn't exist, can't be read or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no weights file {path}; check the path")
    content: Any
    with parsing(path, "weights", CheckpointError):
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    for name in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} must hold a state dict, names and tensors, got {type(content).__name__}")
    if not content:
        raise CheckpointError(f"{path} holds no tensors; download the file again")
    return {
        name.removeprefix("module."): value.float() if value.is_floating_point() else value
        for name, value in content.items()
    }


def create_without_classifier(name: str, weights: Mapping[str, Tensor], origin: str | Path, **kwargs: Any) -> nn.Module:
    """Create a timm model without classes, with the weights of one with any number of them.

    Args:
        name: Name of the model.
        weights: State dict.
        origin: Path of the weights, for error messages.
        **kwargs: Arguments of `timm.create_model`; num_classes is 0.

    Raises:
        CheckpointError: The weights have another architecture, or the model has more parameters than they.
    """
    kwargs = {**kwargs, "num_classes": 0}
    # With as many classes in the config of the weights, timm checks all names.
    return create_with_weights(name, _without_classifier(name, weights, kwargs), origin, {"num_classes": 0}, **kwargs)


def _without_classifier(name: str, weights: Mapping[str, Tensor], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights of a timm model without those of its classifier, which may have several layers."""
    cfg = timm.get_pretrained_cfg(name)
    classifier = () if cfg is None or cfg.classifier is None else cfg.classifier
    layers = [classifier] if isinstance(classifier, str) else classifier
    last, heads = (tuple(f"{each}." for each in names) for names in (layers, {path.split(".")[0] for path in layers}))
    left = {key: value for key, value in weights.items() if not key.startswith(last)}
    if not any(key.startswith(heads) for key in left):
        return left
    # A head without classes keeps some layers, such as norms.
    whole = {key: value for key, value in kwargs.items() if key not in ("features_only", "out_indices")}
    with torch.device("meta"):
        expected = timm.create_model(name, pretrained=False, **whole).state_dict().keys()
    return {key: value for key, value in left.items() if key in expected or not key.startswith(heads)}


def create_with_weights(
    name: str,
    weights: Mapping[str, Tensor],
    origin: str | Path,
    overlay: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Create a timm model with weights, converted by timm's filters: original names, other sizes, other bands.

    Args:
        name: Name of the model.
        weights: State dict.
        origin: Path of the weights, for error messages.
        overlay: Entries of the weights' `pretrained_cfg`; if its num_classes differs from the model's, timm skips the
            classifier and does not check the other names.
        **kwargs: Arguments of `timm.create_model`.

    Raises:
        CheckpointError: The weights have another architecture.
    """
    # A copy, because filters remove names from the dict.
    cfg = {**(overlay or {}), **_NO_OTHER_SOURCE, "state_dict": dict(weights)}
    try:
        model: Any = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=cfg, **kwargs)
    except (RuntimeError, KeyError, AttributeError, IndexError) as error:
        # Raises timm's error if the arguments are invalid, instead of blaming the weights.
        timm.create_model(name, pretrained=False, **kwargs)
        raise CheckpointError(f"{origin} doesn't fit {name}: {_mismatch(error)}; pass the name of its model") from error
    # Otherwise the weights stay in memory and in every saved config.
    (model if hasattr(model, "pretrained_cfg") else model.model).pretrained_cfg.pop("state_dict", None)
    made: nn.Module = model
    return made


def _mismatch(error: Exception) -> str:
    """Summarise the message of `load_state_dict` in one line: the first names of each kind and how many follow."""
    text = str(error)
    parts = []
    for kind in ("Missing", "Unexpected"):
        found = re.search(rf"{kind} key\(s\) in state_dict: (.*)", text)
        if found:
            names = re.findall(r'"([^"]+)"', found[1])
            parts.append(f"{kind.lower()} {_first_names(names)}")
    sizes = [f"{name} (expected {there}, got {came})" for name, came, there in _SIZE_MISMATCH.findall(text)]
    if sizes:
        parts.append(f"mis-shaped {_first_names(sizes)}")
    return "; ".join(parts) or f"{type(error).__name__} {text.splitlines()[0] if text else ''}".strip()


def _first_names(names: list[str], count: int = 2) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
