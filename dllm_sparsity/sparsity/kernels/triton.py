"""One pass over each row on the GPU: find the cutoff, apply it, count, pack the kept set, compare it with earlier ones.

No `from __future__ import annotations` here: Triton reads the annotations of scalar arguments.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from dllm_sparsity.sparsity.frame import TokenState
from dllm_sparsity.sparsity.kernels.naive import JACCARD_UNITS
from dllm_sparsity.sparsity.kernels.triton_produce import RMS_NORM, ROWS, load_raw, produce
from dllm_sparsity.sparsity.kernels.triton_search import (
    COUNT_ONLY,
    INF_BITS,
    MASK,
    MAX_P,
    THRESHOLD,
    TOP_K,
    TOP_P,
    as_bits,
    as_float,
    dropped_weight,
    exact,
    largest,
    load,
    search,
    widen,
)

_PAD = tl.constexpr(int(TokenState.PAD))
_JACCARD_UNITS = tl.constexpr(JACCARD_UNITS)


@triton.jit
def _narrow(wide, KIND: tl.constexpr):
    """Undo `widen`."""
    if KIND == tl.bfloat16:
        raw = (as_bits(wide) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        raw = wide.to(KIND)
    return raw


@triton.jit
def _load_again(x_ptr, x_step, place, width):
    """Load for the last time; another cache hint keeps the compiler from holding the first load's registers."""
    return widen(tl.load(x_ptr + place * x_step, mask=place < width, other=0.0, eviction_policy="evict_first"))


@triton.jit
def _popcount(word, HOST: tl.constexpr):
    """Count the bits of 32-bit words."""
    if HOST:
        many = word.to(tl.uint32, bitcast=True)
        many = many - ((many >> 1) & 0x55555555)
        many = (many & 0x33333333) + ((many >> 2) & 0x33333333)
        many = (many + (many >> 4)) & 0x0F0F0F0F
        return ((many & 255) + ((many >> 8) & 255) + ((many >> 16) & 255) + (many >> 24)).to(tl.int32, bitcast=True)
    return libdevice.popc(word)


@triton.jit
def _pack(keep, place, THREADS: tl.constexpr, TILE: tl.constexpr):
    """Return the kept set of a tile in 32-bit words, in the order in which a thread holds its entries.

    Sixteen bits at a time are summed in float32, which holds them exactly, at twice the speed of integers.
    """
    words: tl.constexpr = TILE // (32 * THREADS)
    place_of_bit = (place & 7) + 8 * ((place // (8 * THREADS)) & 1)
    worth = keep * as_float((127 + place_of_bit) << 23)
    octets = tl.sum(tl.reshape(worth, [words, 2, 2, THREADS, 8]), axis=4)
    halves = tl.sum(octets, axis=2).to(tl.int32)
    high = tl.arange(0, 2)[None, :, None]
    return tl.trans(tl.sum(halves << (16 * high), axis=1))


@triton.jit
def _jaccard(inter, union):
    """Return the Jaccard value in fixed point, rounded down; two empty sets are equal."""
    share = tl.div_rn(inter.to(tl.float32), tl.maximum(union, 1).to(tl.float32))
    return (tl.where(union > 0, share, 1.0) * _JACCARD_UNITS).to(tl.int32)


@triton.jit
def _compared(values, lane, at: tl.constexpr, kept, inter, before):
    """Put the five counts of one earlier kept set in their places."""
    union = kept + before - inter
    values = tl.where(lane == at, 1, values)
    values = tl.where(lane == at + 1, inter, values)
    values = tl.where(lane == at + 2, union, values)
    values = tl.where(lane == at + 3, before, values)
    return tl.where(lane == at + 4, _jaccard(inter, union), values)


@triton.jit
def sparsify_kernel(
    x_ptr, other_ptr, weight_ptr, out_ptr, mask_ptr, index_ptr, state_ptr, table_ptr, compare_ptr,
    previous_ptr, first_ptr, mass_ptr,
    x_stride, x_step, other_stride, mask_stride, width, strength: "fp64", power: "fp64", guess: "fp32", eps: "fp32",
    KIND: tl.constexpr, POWER: tl.constexpr, PRODUCER: tl.constexpr, STEP: tl.constexpr,
    COUNT: tl.constexpr, COLUMNS: tl.constexpr, OVERLAP: tl.constexpr, MASS: tl.constexpr, HOST: tl.constexpr,
    THREADS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Sparsify and count one row a program; `launch` in fused.py gives the arguments."""
    strength = tl.full((), 0.0, tl.float64) + strength  # the interpreter passes plain numbers
    power = tl.full((), 0.0, tl.float64) + power
    guess = tl.full((), 0.0, tl.float32) + guess
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    x_ptr += row * x_stride
    out_ptr += row * width
    place = tl.arange(0, TILE)
    PARTS: tl.constexpr = TILES * (TILE // 1024)
    WORDS: tl.constexpr = TILE // (32 * THREADS)
    compare = tl.full((), 0, tl.int32)
    idle = compare
    word = tl.arange(0, THREADS)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    if OVERLAP:
        compare = tl.load(compare_ptr)
        idle = (tl.load(state_ptr + row) == _PAD).to(tl.int32)
        previous_ptr += row * (TILES * TILE // 32)
        first_ptr += row * (TILES * TILE // 32)
        previous = tl.load(previous_ptr + word, mask=compare + word * 0 == 2, other=0)
        first = tl.load(first_ptr + word, mask=compare + word * 0 == 2, other=0)
    if COUNT:
        line = tl.load(index_ptr + row) * COLUMNS
    if PRODUCER != ROWS:
        second_ptr = weight_ptr
        mean_square = 0.0
        if PRODUCER == RMS_NORM:
            mean_square = tl.load(other_ptr + row)
        else:
            second_ptr = other_ptr + row * other_stride
        for half in tl.static_range(2):  # to hold fewer registers; a store lets no later load pass
            spot = half * (TILE // 2) + tl.arange(0, TILE // 4)
            after = spot + TILE // 4
            x0, y0 = load_raw(x_ptr, x_step, spot, width), load_raw(second_ptr, 1, spot, width)
            x1, y1 = load_raw(x_ptr, x_step, after, width), load_raw(second_ptr, 1, after, width)
            produce(out_ptr, x0, y0, mean_square, eps, spot, width, PRODUCER, HOST)
            produce(out_ptr, x1, y1, mean_square, eps, after, width, PRODUCER, HOST)
        tl.debug_barrier()  # read back below; it is in a cache
        x_ptr, x_step = out_ptr, 1
    magnitude = tl.full((), 0.0, tl.float32)
    if TILES == 1:
        magnitude = tl.abs(load(x_ptr, x_step, place, width))
        total = tl.sum(magnitude)
    else:
        sums = tl.zeros([TILE], tl.float32)
        for tile in range(TILES):
            sums += tl.abs(load(x_ptr, x_step, tile * TILE + place, width))
        total = tl.sum(sums)
    cut = tl.full((), 0, tl.int32)
    bad = tl.full((), 0, tl.int32)
    if KIND == MAX_P:
        if TILES == 1:
            top = tl.max(as_bits(magnitude))
        else:
            top = largest(x_ptr, x_step, width, PARTS)
        cut = as_bits(strength.to(tl.float32) * as_float(top))
    elif KIND == THRESHOLD:
        cut = as_bits(strength.to(tl.float32))
    elif (KIND == TOP_P) | (KIND == TOP_K):
        scale = tl.full((), 1.0, tl.float32)
        start = as_bits(total / width * guess)
        usable = (total > 1e-12) & (total < 1e36)
        amount = total
        if POWER != 1:
            if TILES == 1:
                top = tl.max(as_bits(magnitude))
            else:
                top = largest(x_ptr, x_step, width, PARTS)
            scale = as_float(tl.minimum(tl.maximum(0x7F000000 - (top & INF_BITS), 0x00800000), 0x7E800000))
            amount = dropped_weight(
                x_ptr,
                x_step,
                magnitude,
                as_float(tl.full((), INF_BITS, tl.int32)),
                width,
                power,
                scale,
                KIND,
                POWER,
                1,
                TILE,
                TILES,
            )
        if KIND == TOP_K:
            amount = tl.full((), TILE * TILES, tl.float32)
            allowed = amount - strength.to(tl.float32)
        else:
            allowed = (amount.to(tl.float64) * (1.0 - strength)).to(tl.float32)
        cut, high, dropped_low, dropped_high = search(
            x_ptr, x_step, magnitude, amount, allowed, start, usable, width, power, scale, KIND, POWER, STEP, HOST,
            TILE, TILES,
        )  # fmt: skip
        if KIND == TOP_P:
            # each sum is a tree no deeper than 256 additions, so it is off by less than 2**-16 of itself
            sure = (dropped_low == 0.0) | (dropped_low * (1.0 + 4e-5) <= allowed * (1.0 - 4e-5))
            sure = sure & ((high == INF_BITS) | (dropped_high * (1.0 - 4e-5) > allowed * (1.0 + 4e-5)))
            sure = sure & usable & (strength > 0.001) & (strength < 0.99999) & (POWER == 1)
        else:
            sure = usable
        if sure == False:
            top = largest(x_ptr, x_step, width, PARTS)
            if (top == 0) | (top >= INF_BITS):
                cut = top * 0
            elif KIND == TOP_K:
                cut, high, dropped_low, dropped_high = search(
                    x_ptr, x_step, magnitude, amount, allowed, top, top > 0, width, power, scale, KIND, POWER, 1, HOST,
                    TILE, TILES,
                )  # fmt: skip
            else:
                wide_scale = scale.to(tl.float64)
                cut = exact(x_ptr, x_step, cut, high, strength, width, power, wide_scale, POWER, STEP, PARTS)
            cut = tl.minimum(cut, top)
    if (total < float("inf")) == False:
        bad = (largest(x_ptr, x_step, width, PARTS) >= INF_BITS).to(tl.int32)
    # a zero stays a zero and is not counted as kept; a row with a NaN is kept whole
    cut = tl.where(bad > 0, 1, tl.maximum(cut, 1))
    kept_mass = tl.full((), 0.0, tl.float32)
    kept = tl.full((), 0, tl.int32)
    kept_before = tl.full((), 0, tl.int64)
    kept_first = tl.full((), 0, tl.int64)
    for tile in range(TILES):
        here = tile * TILE + place
        value = _load_again(x_ptr, x_step, here, width)
        keep = tl.where(tl.abs(value) < as_float(cut), 0.0, 1.0)  # numbers: multiply-adds are twice as fast as selects
        if KIND == MASK:
            chosen = tl.load(mask_ptr + row * mask_stride + here, mask=here < width, other=0)
            keep = tl.where((chosen != 0) | (bad > 0), keep, 0.0)
        if (KIND != COUNT_ONLY) | (PRODUCER != ROWS):
            tl.store(out_ptr + here, _narrow(value * keep, dtype), mask=here < width)
        if MASS:
            kept_mass += tl.sum(keep * tl.abs(value))
        if OVERLAP:
            now = _pack(keep, place, THREADS, TILE)
            at = tile * (TILE // 32) + word
            if TILES == 1:
                then, then_first = previous, first
            else:
                then = tl.load(previous_ptr + at, mask=compare + at * 0 == 2, other=0)
                then_first = tl.load(first_ptr + at, mask=compare + at * 0 == 2, other=0)
            # three counts of 20 bits in one sum
            kept_before += tl.sum(
                _popcount(now, HOST).to(tl.int64)
                + (_popcount(now & then, HOST).to(tl.int64) << 20)
                + (_popcount(then, HOST).to(tl.int64) << 40)
            )
            kept_first += tl.sum(
                (_popcount(now & then_first, HOST).to(tl.int64) << 20)
                + (_popcount(then_first, HOST).to(tl.int64) << 40)
            )
            remember = (compare == 1) | ((compare == 2) & (idle == 0))
            tl.store(previous_ptr + at, now, mask=remember & (at >= 0))
            tl.store(first_ptr + at, now, mask=(compare == 1) & (at >= 0))
        elif COUNT:
            kept += tl.sum(keep).to(tl.int32)
    if MASS:
        tl.store(mass_ptr + row, kept_mass)
    if COUNT:
        if OVERLAP:
            kept = (kept_before & 0xFFFFF).to(tl.int32)
        lane = tl.arange(0, 16)
        values = tl.where(lane == 0, bad, tl.where(lane == 1, 1, tl.where(lane == 2, kept, width)))
        counted = 4
        if OVERLAP:
            inter, before = (kept_before >> 20 & 0xFFFFF).to(tl.int32), (kept_before >> 40).to(tl.int32)
            values = _compared(values, lane, 4, kept, inter, before)
            inter, before = (kept_first >> 20 & 0xFFFFF).to(tl.int32), (kept_first >> 40).to(tl.int32)
            values = _compared(values, lane, 9, kept, inter, before)
            counted = tl.where(compare == 2, 14, 4)
        tl.atomic_add(
            table_ptr + line + lane, values.to(tl.int64), mask=(lane < counted) & (values != 0), sem="relaxed"
        )
