"""Diagonal state-space models as convolutions over the rows and columns of a grid (S4D)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["DiagonalStates", "at_least_float", "convolve_both_ways", "convolve_grid"]


class DiagonalStates(nn.Module):
    """Diagonal state-space models of one input and output each, two for each channel: forwards and backwards.

    x'(t) = A x(t) + B u(t), y(t) = Re C x(t), with A = -exp(log_decay) + i frequency and B = 1, held at steps of
    exp(log_step): S4D of Gu et al. 2022, "On the Parameterization and Initialization of Diagonal State Space Models",
    equation 2 and section 4, with the initial values S4D-Lin (equation 9).

    Args:
        channels: Number of channels, C.
        num_states: Number of complex states, N; each stands for a conjugate pair.
        device: Device of the parameters.

    Attributes:
        log_step: Logarithm of the step, [2, C].
        log_decay: Logarithm of the negative real part of A, [2, C, N].
        frequency: Imaginary part of A, [2, C, N].
        weight: Real and imaginary part of C, [2, C, N, 2].
    """

    def __init__(self, channels: int, num_states: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.log_step = nn.Parameter(torch.empty(2, channels, device=device))
        self.log_decay = nn.Parameter(torch.empty(2, channels, num_states, device=device))
        self.frequency = nn.Parameter(torch.empty(2, channels, num_states, device=device))
        self.weight = nn.Parameter(torch.empty(2, channels, num_states, 2, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the initial values: memories of about 2 to 200 tokens, and kernels of unit variance at most."""
        num_states = self.frequency.shape[-1]
        nn.init.uniform_(self.log_step, math.log(0.005), math.log(0.5))
        nn.init.constant_(self.log_decay, math.log(0.5))
        with torch.no_grad():
            self.frequency.copy_(math.pi * torch.arange(num_states, device=self.frequency.device))
        nn.init.normal_(self.weight, std=num_states**-0.5)

    def kernel(self, length: int) -> Tensor:
        """Return the impulse responses at steps 0 .. length - 1, [2, C, length], in float32 at least.

        With a zero-order hold, it is 2 Re sum_n C_n (exp(step A_n) - 1) / A_n exp(t step A_n).
        """
        log_step, log_decay, frequency, weight = (
            at_least_float(x) for x in (self.log_step, self.log_decay, self.frequency, self.weight)
        )
        rate = torch.complex(-log_decay.exp(), frequency)
        per_step = rate * log_step.exp()[..., None]
        # Models in the layout channels_last, as detectors are, store pairs apart.
        gain = torch.view_as_complex(weight.contiguous()) * (per_step.exp() - 1) / rate
        times = torch.arange(length, device=rate.device, dtype=log_step.dtype)
        return 2 * torch.einsum("dcn,dcnt->dct", gain, (per_step[..., None] * times).exp()).real


def at_least_float(x: Tensor) -> Tensor:
    """Return a tensor in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def convolve_both_ways(u: Tensor, kernel: Tensor) -> Tensor:
    """Convolve the last axis with a kernel for the past and one for the future.

    y_i = sum_{j <= i} k_0[i - j] u_j + sum_{j > i} k_1[j - i - 1] u_j.

    Args:
        u: Input, [B, C, n, L], float32 or float64.
        kernel: Both kernels, [2, C, L].

    Returns:
        Output, [B, C, n, L], at the cost of FFTs, O(L log L).
    """
    length = u.shape[-1]
    ahead, back = kernel
    # A circle of 2 L places: lag 0 .. L - 1, one that is never used, then lag -(L - 1) .. -1.
    circle = torch.cat([ahead, F.pad(back[:, : length - 1].flip(-1), (1, 0))], dim=-1)
    spectrum = torch.fft.rfft(circle, n=2 * length)[None, :, None]
    return torch.fft.irfft(torch.fft.rfft(u, n=2 * length) * spectrum, n=2 * length)[..., :length]


def convolve_grid(u: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Convolve along each row and then along each column, so that every token reaches the whole grid.

    This is the outer product of the kernels of both axes (Nguyen et al. 2022, S4ND, section 3.1).

    Args:
        u: Input, [B, C, rows, columns].
        rows: Kernels along a row, [2, C, columns].
        columns: Kernels along a column, [2, C, rows].
    """
    along = convolve_both_ways(at_least_float(u), rows)
    return convolve_both_ways(along.mT, columns).mT
