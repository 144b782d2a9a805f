"""What makes a row inside the kernel in triton.py, with the bits of the modules that it stands in for."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from dllm_sparsity.sparsity.kernels.triton_search import widen

# What the rows are made of.
ROWS = tl.constexpr(0)
SILU_MUL = tl.constexpr(1)  # silu(x) * other
GELU_TANH_MUL = tl.constexpr(2)  # gelu(x), its tanh form, * other
RMS_NORM = tl.constexpr(3)  # weight * (x * rsqrt(other + eps)), other the row's mean square
GELU_MUL = tl.constexpr(4)  # gelu(x) * other


@triton.jit
def _expf(x, HOST: tl.constexpr):
    if HOST:
        return tl.exp(x)
    return libdevice.exp(x)


@triton.jit
def _tanhf(x, HOST: tl.constexpr):
    if HOST:
        return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0
    return libdevice.tanh(x)


@triton.jit
def _erff(x, HOST: tl.constexpr):
    if HOST:
        return tl.math.erf(x)
    return libdevice.erf(x)


@triton.jit
def _round(x, KIND: tl.constexpr):
    return widen(x.to(KIND))


@triton.jit
def load_raw(x_ptr, x_step, place, width):
    """Return a row's entries as they are stored, zeros beyond its end."""
    return tl.load(x_ptr + place * x_step, mask=place < width, other=0.0)


@triton.jit
def produce(
    out_ptr, first, second, mean_square, eps, place, width, PRODUCER: tl.constexpr, HOST: tl.constexpr
):  # fmt: skip
    """Store a part of the row that a fused producer makes, rounded where the unfused module rounds."""
    KIND: tl.constexpr = out_ptr.dtype.element_ty
    x, y = widen(first), widen(second)
    if PRODUCER == SILU_MUL:
        made = _round(tl.div_rn(x, 1.0 + _expf(-x, HOST)), KIND) * y
    elif PRODUCER == GELU_TANH_MUL:
        inner = 0.7978845608028654 * (x + 0.044715 * (x * x * x))
        made = _round(0.5 * x * (1.0 + _tanhf(inner, HOST)), KIND) * y
    elif PRODUCER == GELU_MUL:
        made = _round(x * 0.5 * (1.0 + _erff(x * 0.7071067811865476, HOST)), KIND) * y
    else:
        made = y * _round(x * tl.rsqrt(mean_square + eps), KIND)
    tl.store(out_ptr + place, made.to(KIND), mask=place < width)
