"""Choice of the precision for a device: what `precision=auto` stands for."""

from __future__ import annotations

import torch

__all__ = ["fast_dtype", "training_precision"]


def fast_dtype(device: str | torch.device) -> torch.dtype:
    """Return the dtype of the fastest safe autocast of a device: bfloat16 if it has instructions for it, else float32.

    These are GPUs that multiply matrices of bfloat16, and CPUs with AVX-512 BF16, which all CPUs with AMX have. Other
    CPUs emulate bfloat16, slower than float32. float16, whose range needs scaled losses, is never chosen.

    Args:
        device: Device; one that is not there has no such instructions.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        # Of the current GPU: machines with GPUs of several generations are rare.
        is_fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # PyTorch has no public function for this before 2.10.
        is_fast = kind == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if is_fast else torch.float32


def training_precision(precision: str, accelerator: str) -> str:
    """Resolve the precision of a training run.

    Args:
        precision: Precision as Lightning names it, or "auto".
        accelerator: Lightning accelerator that the run uses.

    Returns:
        The precision as Lightning names it: for "auto", bf16-mixed or 32-true.
    """
    if precision != "auto":
        return precision
    device = {"gpu": "cuda", "auto": "cpu"}.get(accelerator, accelerator)
    if accelerator == "auto" and torch.cuda.is_available():
        device = "cuda"
    elif accelerator == "auto" and torch.backends.mps.is_available():
        device = "mps"
    is_known = device in ("cpu", "cuda")
    return "bf16-mixed" if is_known and fast_dtype(device) == torch.bfloat16 else "32-true"
