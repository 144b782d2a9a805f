"""The cutoff of a row without a sort, for the kernel in triton.py.

D(c), the mass below c, grows with c, and top-p's cutoff is the largest c whose D(c) is at most what may be dropped.
The row stays in registers; a round costs two multiply-adds for each entry. log(D / (M - D)) is nearly linear in the
bits of c, so a secant on it needs some four rounds. Sums are float32 and every decision carries a bound on their error;
a row on which the bound does not decide (under 1 % of bfloat16 rows) is settled by float64 sums. So the kept set does
not depend on the order of any sum, on the batch or on the device, wherever the row's float64 sum is exact.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

# What decides the cutoff.
COUNT_ONLY = tl.constexpr(0)  # nothing is dropped
TOP_P = tl.constexpr(1)
TOP_K = tl.constexpr(2)
MAX_P = tl.constexpr(3)
THRESHOLD = tl.constexpr(4)
MASK = tl.constexpr(5)  # a mask is given

INF_BITS = tl.constexpr(0x7F800000)
_OCTAVE = tl.constexpr(8388608.0)  # float32 bits between x and 2 x
# float32 bits moved to float64's places are |x| * 2**-896 exactly, subnormals and zero included
_UNSCALE = tl.constexpr(2.0**896)


@triton.jit
def as_float(bits):
    """Return the float32 values with these bits."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def as_bits(value):
    """Return the bits of float32 values."""
    return value.to(tl.int32, bitcast=True)


@triton.jit
def widen(raw):
    """Return the values in float32, subnormals included (the interpreter's own cast loses those of bfloat16)."""
    if raw.dtype == tl.bfloat16:
        wide = as_float(raw.to(tl.int16, bitcast=True).to(tl.int32) << 16)
    else:
        wide = raw.to(tl.float32)
    return wide


@triton.jit
def load(x_ptr, x_step, place, width):
    """Return a row's entries in float32, zeros beyond its end."""
    return widen(tl.load(x_ptr + place * x_step, mask=place < width, other=0.0))


@triton.jit
def _mass(magnitude, power, scale, POWER: tl.constexpr):
    """Return |x|**power in float64: |x| itself as |x| * 2**-896, else of |x| scaled by a power of two."""
    if POWER == 1:
        mass = (as_bits(magnitude).to(tl.int64) << 29).to(tl.float64, bitcast=True)
    else:
        mass = magnitude.to(tl.float64) * scale
        if POWER == 2:
            mass = mass * mass
        else:
            mass = tl.exp2(tl.log2(mass) * power)
    return mass


@triton.jit
def _weight(magnitude, power, scale, KIND: tl.constexpr, POWER: tl.constexpr):
    """Return what the search weighs entries by, float32: one each for top-k, else the mass."""
    if KIND == TOP_K:
        weight = tl.full(magnitude.shape, 1.0, tl.float32)
    elif POWER == 1:
        weight = magnitude
    else:
        weight = tl.exp2(tl.log2(magnitude * scale) * power.to(tl.float32))
    return weight


@triton.jit
def below(magnitude, cut, STEP: tl.constexpr):
    """Return 1.0 where a magnitude is below a cutoff, else 0.0.

    For 16-bit types a saturating multiply-add does it, twice as fast as a compare and a select: halfway between the
    cutoff and its lower neighbour the line crosses zero, and it is steep enough to be out of 0..1 at both. Cutoffs
    below 2**-80 blur, which the bound on the search's sums covers.
    """
    if STEP == 1:
        return tl.where(magnitude < cut, 1.0, 0.0)
    exponent = tl.maximum(as_bits(cut) & INF_BITS, 0x17800000)
    steep = as_float(0x7F000000 - exponent) * (4.0 * 8388608.0 / STEP)
    middle = as_float(as_bits(cut) - STEP // 2)
    return tl.minimum(tl.maximum(middle * steep - magnitude * steep, 0.0), 1.0)  # one instruction: fma.sat


@triton.jit
def dropped_weight(x_ptr, x_step, magnitude, cut, width, power, scale, KIND: tl.constexpr, POWER: tl.constexpr,
             STEP: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    """Return the weight of what lies below a cutoff."""
    if TILES == 1:
        return tl.sum(_weight(magnitude, power, scale, KIND, POWER) * below(magnitude, cut, STEP))
    else:
        sums = tl.zeros([TILE], tl.float32)
        for tile in range(TILES):
            part = tl.abs(load(x_ptr, x_step, tile * TILE + tl.arange(0, TILE), width))
            sums += _weight(part, power, scale, KIND, POWER) * below(part, cut, STEP)
        return tl.sum(sums)


@triton.jit
def _logit(dropped, total):
    """Return log2 of dropped : kept in float32 bits, straight between powers of two; it only guides the search."""
    dropped = tl.minimum(tl.maximum(dropped, total * 1e-9), total * 0.9999999)
    return (as_bits(dropped) - as_bits(total - dropped)).to(tl.float32)


@triton.jit
def _divide(x, y, HOST: tl.constexpr):
    if HOST:
        return x / y
    return libdevice.fast_dividef(x, y)


@triton.jit
def search(x_ptr, x_step, magnitude, total, allowed, first, usable, width, power, scale, KIND: tl.constexpr,
            POWER: tl.constexpr, STEP: tl.constexpr, HOST: tl.constexpr, TILE: tl.constexpr,
            TILES: tl.constexpr):  # fmt: skip
    """Bracket the cutoff: at `low` no more than allowed is dropped, at `high` more.

    Ends when they are neighbours among the values of the dtype, or when one entry at most lies between.
    """
    goal = _logit(allowed, total)
    low, high = tl.full((), 0, tl.int32), tl.full((), INF_BITS, tl.int32)
    dropped_low, dropped_high = total * 0.0, total
    logit_low, logit_high = goal, goal
    before, logit_before = tl.full((), 0, tl.int32), goal
    rounds, slow = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    probe = tl.minimum(tl.maximum(first & -STEP, STEP), INF_BITS - STEP)
    open_ = usable
    while open_:
        dropped = dropped_weight(
            x_ptr, x_step, magnitude, as_float(probe), width, power, scale, KIND, POWER, STEP, TILE, TILES
        )
        logit = _logit(dropped, total)
        fits, gap = dropped <= allowed, high - low
        low, high = tl.where(fits, probe, low), tl.where(fits, high, probe)
        dropped_low, dropped_high = tl.where(fits, dropped, dropped_low), tl.where(fits, dropped_high, dropped)
        logit_low, logit_high = tl.where(fits, logit, logit_low), tl.where(fits, logit_high, logit)
        known = (low > 0) & (high < INF_BITS)
        # both sides known: interpolate, or halve where that is slow
        slow = tl.where((high - low) * 2 > gap, slow + 1, 0)
        halve = ((slow >= 2) & known) | (rounds > 12)
        share = _divide(goal - logit_low, tl.maximum(logit_high - logit_low, 1.0), HOST)
        share = tl.where(halve, 0.5, tl.minimum(tl.maximum(share, 0.0), 1.0))
        inside = low + (share * (high - low).to(tl.float32)).to(tl.int32)
        slow = tl.where(halve, 0, slow)
        # else follow the slope seen last, a little too far
        run, rise = (probe - before).to(tl.float32), logit - logit_before
        flat = tl.minimum(tl.maximum(_divide(run, tl.where(rise == 0.0, 1.0, rise), HOST), 0.16), 1.4)
        flat = tl.where(rounds == 0, 0.5, flat)
        move = tl.minimum(tl.maximum((goal - logit) * flat * 1.15, -4.0 * _OCTAVE), 4.0 * _OCTAVE)
        outside = probe + move.to(tl.int32) + tl.where(fits, STEP, -STEP)
        before, logit_before = probe, logit
        rounds += 1
        probe = tl.where(known | halve, inside, outside) & -STEP
        probe = tl.minimum(tl.maximum(probe, low + STEP), high - STEP)
        open_ = high - low > STEP
        if KIND == TOP_K:
            open_ = open_ & (dropped_high - dropped_low >= 2.0)
        elif (POWER == 1) & (STEP < 65536):
            open_ = open_ & (dropped_high - dropped_low + 4e-5 * dropped_high >= 2.0 * as_float(low))
    return low, high, dropped_low, dropped_high


@triton.jit
def _kept_mass(x_ptr, x_step, cut, width, power, scale, POWER: tl.constexpr, PARTS: tl.constexpr):
    """Return the mass of what reaches a cutoff, float64, reading the row again."""
    sums = tl.zeros([1024], tl.float64)
    for part in range(PARTS):
        magnitude = tl.abs(load(x_ptr, x_step, part * 1024 + tl.arange(0, 1024), width))
        sums += tl.where(magnitude >= cut, _mass(magnitude, power, scale, POWER), 0.0)
    return tl.sum(sums) * _UNSCALE if POWER == 1 else tl.sum(sums)


@triton.jit
def exact(x_ptr, x_step, low, high, strength, width, power, scale, POWER: tl.constexpr,
           STEP: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """Return the largest cutoff that keeps the asked share of the mass, by float64 sums, from a likely bracket."""
    goal = _kept_mass(x_ptr, x_step, 0.0, width, power, scale, POWER, PARTS) * strength
    kept_low = _kept_mass(x_ptr, x_step, as_float(low), width, power, scale, POWER, PARTS)
    kept_high = _kept_mass(x_ptr, x_step, as_float(high), width, power, scale, POWER, PARTS)
    too_high, too_low = kept_low < goal, (kept_high >= goal) & (high < INF_BITS)
    open_ = too_high | too_low
    if POWER == 1:  # else a bracket with one entry inside is not told from one with two
        open_ = open_ | (kept_low - kept_high >= 2.0 * as_float(low).to(tl.float64))
    else:
        open_ = open_ | (high - low > STEP)
    from_, to = low, high
    low = tl.where(too_low, to, tl.where(too_high, 0, from_))
    high = tl.where(too_high, from_, tl.where(too_low, INF_BITS, to))
    open_ = open_ & (high - low > STEP)
    while open_:
        probe = low + ((high - low) >> 1 & -STEP)
        fits = _kept_mass(x_ptr, x_step, as_float(probe), width, power, scale, POWER, PARTS) >= goal
        low, high = tl.where(fits, probe, low), tl.where(fits, high, probe)
        open_ = high - low > STEP
    return low


@triton.jit
def largest(x_ptr, x_step, width, PARTS: tl.constexpr):
    """Return the bits of the row's largest magnitude; an infinity or a NaN is above all others."""
    tops = tl.zeros([1024], tl.int32)
    for part in range(PARTS):
        tops = tl.maximum(tops, as_bits(tl.abs(load(x_ptr, x_step, part * 1024 + tl.arange(0, 1024), width))))
    return tl.max(tops)
