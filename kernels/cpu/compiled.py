"""SPLA of single query tokens on a CPU, compiled by numba: score, select, attend, subtract and combine in one loop
over tokens and kv heads (docs/design.md, 1 to 4).

A decode step of a layer is a few hundred microseconds of arithmetic, of which a chain of tensor operations would spend
most on calls and copies. Here every selected key and value is read once, from the page where it lies; with two levels
every key of the candidates, whose logits choose among them and are then those of the selected, or their sketches in the
place of the keys that are not selected.

The cache arrives as a flat array whose dtype stands for what it holds: uint16 for bfloat16, int16 for float16, float32
for itself; where statistics are stored in bytes, it comes as uint8, too. All arithmetic is float32. Built-in selectors
and residuals without a feature map are compiled; `kernels/cpu/attention.py` leaves everything else to
`VectorisedAttention`.
"""

import math

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core.extending import overload
from numba.extending import intrinsic

from ...algorithm.selectors import (
    Cumulant2Selector,
    KMeans2RemSelector,
    MeanSelector,
    QuestSelector,
    RemSelector,
    Taylor2Selector,
)
from ...algorithm.sketch import CHUNK
from ...algorithm.statistics_format import COUNT, E4M3, E5M2
from ..layout import STAMP_WORDS

SELECTORS = (MeanSelector, Taylor2Selector, Cumulant2Selector, RemSelector, QuestSelector, KMeans2RemSelector)
"""The selectors that are compiled; `attend` knows them by their place here."""

_MEAN, _TAYLOR2, _CUMULANT2, _REM, _QUEST, _KM2_REM = range(len(SELECTORS))

FORMATS = (E4M3, E5M2, COUNT)
"""Formats of statistics in bytes; `attend` knows them by their place here."""

_E4M3, _E5M2, _COUNT = range(len(FORMATS))

# Sums may be reordered, so that they vectorise; infinities and NaN keep their meaning.
_FAST = {"reassoc", "contract", "nsz", "arcp"}

_LOG2E = np.float32(1.44269504)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)


@intrinsic
def _float_of_bits(typingctx, bits):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def _bits_of_float(typingctx, value):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


def _number(element):
    raise NotImplementedError("only in compiled code")


@overload(_number, inline="always")
def _number_overload(element):
    """An element of a cache as float32; its type says which dtype it is of."""
    if element == types.uint16:

        def bfloat16(element):
            return _float_of_bits(np.uint32(element) << np.uint32(16))

        return bfloat16
    if element == types.int16:

        def float16(element):
            bits = np.uint32(np.uint16(element))
            # The exponent is rebiased by a product, which makes normal numbers of subnormal ones, too.
            size = _float_of_bits((bits & np.uint32(0x7FFF)) << np.uint32(13)) * np.float32(2.0**112)
            if (bits & np.uint32(0x7C00)) == np.uint32(0x7C00):
                size = _float_of_bits(((bits & np.uint32(0x7FFF)) << np.uint32(13)) | np.uint32(0x7F800000))
            return -size if bits & np.uint32(0x8000) else size

        return float16
    return lambda element: element


@njit(fastmath=_FAST, error_model="numpy")
def _exp(x):
    """`exp(x)` for `x <= 0` to float32 rounding, in operations that vectorise; 0 far below."""
    x = max(x, np.float32(-87.0))
    n = np.floor(x * _LOG2E + np.float32(0.5))
    r = x - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    y = np.float32(1.9875691500e-4)
    y = y * r + np.float32(1.3981999507e-3)
    y = y * r + np.float32(8.3334519073e-3)
    y = y * r + np.float32(4.1665795894e-2)
    y = y * r + np.float32(1.6666665459e-1)
    y = y * r + np.float32(5.0000001201e-1)
    y = y * (r * r) + r + np.float32(1.0)
    return y * _float_of_bits(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23))


@njit(fastmath=_FAST, error_model="numpy")
def load_elements(cache, start, out):
    """Copy `len(out)` elements of a cache to float32."""
    elements = cache[start : start + out.shape[0]]  # an index that may be negative would keep it from vectorising
    for i in range(out.shape[0]):
        out[i] = _number(elements[i])


def _byte_loader(mantissa_bits, rebias):
    """A function that writes finite floats of a byte each `[n]` as float32 into `out [n]`, which adds `rebias` to their
    exponents. NaN, of keys that are NaN, come as some number."""
    # Constants of the compiled code: as arguments they would make it three times as slow.
    shift, normal, sign, size_bits = np.uint32(23 - mantissa_bits), np.uint32(1 << 23), np.uint8(0x80), np.uint8(0x7F)
    bias, least = np.uint32(rebias << 23), np.uint32(rebias + 1 << 23)  # least: the smallest normal number

    @njit(fastmath=_FAST, error_model="numpy")
    def load(stored, out):
        for i in range(out.shape[0]):
            bits = np.uint32(stored[i] & size_bits) << shift
            size = _float_of_bits(bits + bias)
            if bits < normal:  # not by a product with a subnormal float32, which can take a hundred cycles
                size = _float_of_bits(bits + least) - _float_of_bits(least)
            out[i] = -size if stored[i] & sign else size

    return load


load_e4m3, load_e5m2 = _byte_loader(3, 120), _byte_loader(2, 112)


def _load_statistics(stored, start, formats, out):
    raise NotImplementedError("only in compiled code")


@overload(_load_statistics)
def _load_statistics_overload(stored, start, formats, out):
    """Statistics of a block, which begin at element `start`, as float32 into `out`: elements of the cache, or bytes of
    some `formats`; see `attend`."""
    if stored.dtype != types.uint8:
        return lambda stored, start, formats, out: load_elements(stored, start, out)

    def of_bytes(stored, start, formats, out):
        at = 0
        for i in range(formats.shape[0]):
            kind, size = formats[i]
            elements, numbers = stored[start + at : start + at + size], out[at : at + size]
            if kind == _E4M3:
                load_e4m3(elements, numbers)
            elif kind == _E5M2:
                load_e5m2(elements, numbers)
            else:
                for e in range(size):
                    numbers[e] = np.float32(elements[e])
            at += size

    return of_bytes


@njit(fastmath=_FAST, error_model="numpy")
def _dot(a, b):
    total = np.float32(0)
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@njit(fastmath=_FAST, error_model="numpy")
def _logsumexp(x):
    """Log of the sum of exponentials of a vector; -inf where it is empty."""
    peak = np.float32(-np.inf)
    for i in range(x.shape[0]):
        peak = max(peak, x[i])
    if peak == -np.inf:
        return peak
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += _exp(x[i] - peak)
    return peak + np.float32(math.log(total))


@njit(fastmath=_FAST, error_model="numpy")
def _add_logs(a, b):
    """Log of `exp(a) + exp(b)`, of which `a` is finite; `a` bit for bit where `b` is -inf."""
    high = max(a, b)
    return high if b == -np.inf else high + np.float32(math.log1p(_exp(min(a, b) - high)))


@njit(fastmath=_FAST, error_model="numpy")
def _second_order(selector, s2, log_count):
    """What a selector adds to `log count + q . mu` for the variance `s2` of the logits."""
    if selector == _TAYLOR2:
        return np.float32(math.log1p(np.float32(0.5) * s2))
    if selector == _CUMULANT2 or s2 < np.float32(2) * log_count:
        return np.float32(0.5) * s2
    return np.float32(math.sqrt(s2 * (np.float32(2) * log_count))) - log_count


@njit(fastmath=_FAST, error_model="numpy")
def _score(selector, q, q2, stored, formats, pages, page_step, start, area, block_size, score, linear, variance):
    """Score the blocks of complete pages for the heads of a group.

    Args:
        selector: Place in `SELECTORS`.
        q: `[group, head_size]`, scaled.
        q2: The squares of `q`.
        stored: Flat cache as the elements or bytes that statistics are stored in.
        formats: Of bytes; see `attend`.
        pages: `[num_pages]` page ids.
        page_step: Elements of `stored` from page to page.
        start: First element of this kv head's statistics in page 0.
        area: `(blocks a page, elements from one block's statistics to the next)`.
        block_size: Tokens a selection block.
        score: Output `[group, blocks]`.
        linear: Output `[clusters, group, blocks]`, `log count + q . mu`: all that the mass needs, with `variance`.
        variance: Output `[clusters, group, blocks]`, `q^T Sigma q`.
    """
    group, d = q.shape
    per_page, stride = area
    log_block = np.float32(math.log(block_size))
    statistics = np.empty(stride, np.float32)
    zeros = np.zeros(d, np.float32)
    for i in range(score.shape[1]):
        at = start + pages[i // per_page] * page_step + i % per_page * stride
        _load_statistics(stored, at, formats, statistics)
        if selector == _QUEST:
            low, high = statistics[:d], statistics[d:]
            for h in range(group):
                total = np.float32(0)
                for e in range(d):
                    total += max(q[h, e], np.float32(0)) * high[e] + min(q[h, e], np.float32(0)) * low[e]
                score[h, i] = total
            continue
        for c in range(linear.shape[0]):
            mean = statistics[2 * c * d : (2 * c + 1) * d]
            log_count = log_block
            if selector == _KM2_REM:
                count = statistics[4 * d + c]
                log_count = np.float32(math.log(count)) if count > 0 else np.float32(-np.inf)
            spread = statistics[(2 * c + 1) * d : (2 * c + 2) * d] if selector != _MEAN else zeros
            for h in range(group):
                of_mean = of_spread = np.float32(0)
                for e in range(d):
                    of_mean += q[h, e] * mean[e]
                    of_spread += q2[h, e] * spread[e]
                linear[c, h, i] = log_count + of_mean
                variance[c, h, i] = of_spread
                one = linear[c, h, i] + _second_order(selector, of_spread, max(log_count, np.float32(0)))
                if c == 0:
                    score[h, i] = one
                else:  # log-add-exp of the clusters, one of which is never empty
                    high = max(one, score[h, i])
                    low = min(one, score[h, i])
                    score[h, i] = high + np.float32(math.log1p(_exp(low - high)))


@njit(fastmath=_FAST, error_model="numpy")
def _share(score, sinks, shared):
    """Scores of a group `[group, blocks]` shared in the log domain, into `shared [blocks]`; `sinks [group]`, or -inf,
    take part in the heads' sums. Returns the mass of all blocks, which is 1 a head less what sinks take."""
    group, blocks = score.shape
    mass = np.float32(0)
    for h in range(group):
        of_blocks = _logsumexp(score[h])
        total = _add_logs(of_blocks, sinks[h])
        mass += _exp(of_blocks - total)
        for i in range(blocks):
            score[h, i] -= total
    for i in range(blocks):
        shared[i] = score[0, i]
        for h in range(1, group):
            high = max(shared[i], score[h, i])
            shared[i] = high + np.float32(math.log1p(_exp(min(shared[i], score[h, i]) - high)))
    return mass


@njit(fastmath=_FAST, error_model="numpy")
def _select(shared, forced, num_free, mass_wanted, chosen):
    """Choose further blocks by falling score, ties by rising index, until budget or mass is reached.

    What is wanted is the lowest score above which there is still room. The bits of floats are in the floats' order, so
    that it is found bit by bit.

    Args:
        shared: `[blocks]` from `_share`.
        forced: `[blocks]` bool.
        num_free: Blocks to choose.
        mass_wanted: Mass at which to stop; infinite where the budget alone counts.
        chosen: Output `[blocks]` bool, the forced ones included.
    """
    blocks = shared.shape[0]
    ranks = np.empty(blocks, np.uint32)  # in the order of the scores, 0 for a forced block
    mass = np.empty(blocks, np.float32)
    forced_mass = np.float32(0)
    for i in range(blocks):
        chosen[i] = forced[i]
        bits = _bits_of_float(shared[i])
        ranks[i] = ~bits if bits >> np.uint32(31) else bits | np.uint32(0x80000000)
        mass[i] = np.float32(math.exp(shared[i])) if mass_wanted < np.inf else np.float32(0)
        if forced[i]:
            forced_mass += mass[i]
            ranks[i] = 0
    if num_free <= 0 or forced_mass >= mass_wanted:
        return
    least = np.uint32(0xFFFFFFFF)
    count, covered = 0, forced_mass
    for bit in range(31, -1, -1):
        attempt = least ^ (np.uint32(1) << np.uint32(bit))
        n, m = 0, forced_mass
        for i in range(blocks):
            above = ranks[i] > attempt
            n += above
            m += mass[i] if above else np.float32(0)
        if n < num_free and m < mass_wanted:
            least, count, covered = attempt, n, m
    for i in range(blocks):
        if ranks[i] > least:
            chosen[i] = True
    for i in range(blocks):
        if ranks[i] == least and not forced[i] and count < num_free and covered < mass_wanted:
            chosen[i] = True
            count += 1
            covered += mass[i]


@njit(fastmath=_FAST, error_model="numpy")
def _log_mass(linear, variance, rest):
    """Log mass of the rest, of which there are the shares `rest [blocks]` of blocks, from `linear` and `variance`
    `[clusters, blocks]` of one head: `rest exp(linear) (1 + variance / 2)` summed."""
    clusters, blocks = linear.shape
    peak = np.float32(-np.inf)
    for c in range(clusters):
        for i in range(blocks):
            if rest[i] > 0:
                peak = max(peak, linear[c, i])
    if peak == -np.inf:
        return peak
    total = np.float32(0)
    for c in range(clusters):
        for i in range(blocks):
            if rest[i] > 0 and linear[c, i] > -np.inf:
                total += rest[i] * _exp(linear[c, i] - peak) * (np.float32(1) + np.float32(0.5) * variance[c, i])
    return peak + np.float32(math.log(total))


@njit(fastmath=_FAST, error_model="numpy")
def _four_logits(q, keys, some, logits, token):
    """`q . k` of the first `some` of `keys [4, >= head_size]`, into `logits [group, tokens]` from `token` on."""
    group, d = q.shape
    for h in range(group):
        s0 = s1 = s2 = s3 = np.float32(0)  # four sums at a time, none of which waits for another
        for e in range(d):
            x = q[h, e]
            s0 += x * keys[0, e]
            s1 += x * keys[1, e]
            s2 += x * keys[2, e]
            s3 += x * keys[3, e]
        logits[h, token] = s0
        if some > 1:
            logits[h, token + 1] = s1
        if some > 2:
            logits[h, token + 2] = s2
        if some > 3:
            logits[h, token + 3] = s3


@njit(fastmath=_FAST, error_model="numpy")
def _logits(q, cache, starts, lengths, row_step, logits):
    """`q . k` of the tokens of some blocks, side by side in `logits [group, tokens]`."""
    keys = np.zeros((4, q.shape[1]), np.float32)
    token = 0
    for i in range(starts.shape[0]):
        for first in range(0, lengths[i], 4):
            some = min(4, lengths[i] - first)
            for t in range(some):
                load_elements(cache, starts[i] + (first + t) * row_step, keys[t])
            _four_logits(q, keys, some, logits, token)
            token += some


@njit(fastmath=_FAST, error_model="numpy")
def _sketched_logits(q, codes, halves, sketch, stored, formats, pages, page_step, start, area, ids, block, logits):
    """`q . k` of the tokens of some blocks by their sketches, side by side in `logits [group, tokens]`.

    Args:
        q: `[group, head_size]`, scaled.
        codes: As in `attend`.
        halves: As in `attend`.
        sketch: `(byte of page 0 at which that of this kv head begins, from there to the scales, from page to page)`.
        stored: As in `_score`, like the next five.
        formats: Of bytes.
        pages: Page ids.
        page_step: From page to page.
        start: Of this kv head's statistics in page 0.
        area: Of a block's statistics.
        ids: `[blocks]`, by their number in the sequence.
        block: Tokens of each, a multiple of 4.
        logits: Output.
    """
    d = q.shape[1]
    chunks = (d + CHUNK - 1) // CHUNK
    begin, scales_behind, from_page = sketch
    per_page, stride = area
    mean = np.zeros(chunks * CHUNK, np.float32)
    keys, scales = np.empty((4, chunks * CHUNK), np.float32), np.empty(block * chunks, np.float32)
    for i in range(ids.shape[0]):
        page, of_page = np.int64(pages[ids[i] // per_page]), ids[i] % per_page
        # The mean comes first in the statistics, in its own format.
        _load_statistics(stored, start + page * page_step + of_page * stride, formats[:1], mean[:d])
        first_chunk, at = of_page * block * chunks, begin + page * from_page
        load_elements(halves, (at + scales_behind) // 2 + first_chunk, scales)
        at += first_chunk * (CHUNK // 2)
        for first in range(0, block, 4):
            for t in range(4):
                for c in range(chunks):
                    n = (first + t) * chunks + c
                    of_chunk, scale = codes[at + n * (CHUNK // 2) : at + (n + 1) * (CHUNK // 2)], scales[n]
                    key, centre = keys[t, c * CHUNK : (c + 1) * CHUNK], mean[c * CHUNK : (c + 1) * CHUNK]
                    for e in range(CHUNK // 2):
                        low, high = np.int32(of_chunk[e] & 15) - 8, np.int32(of_chunk[e] >> 4) - 8
                        key[2 * e] = np.float32(low) * scale + centre[2 * e]
                        key[2 * e + 1] = np.float32(high) * scale + centre[2 * e + 1]
            _four_logits(q, keys, 4, logits, i * block + first)


@njit(fastmath=_FAST, error_model="numpy")
def _sum_values(weights, token, cache, starts, lengths, d, row_step, out):
    """`weights [n, tokens]` from `token` on times the values of the tokens of some blocks, added to the first `n` of
    `out [>= n, head_size]`."""
    v = np.zeros((8, d), np.float32)
    for i in range(starts.shape[0]):
        for first in range(0, lengths[i], 8):
            some = min(8, lengths[i] - first)
            for t in range(some):
                load_elements(cache, starts[i] + (first + t) * row_step + d, v[t])
            for h in range(weights.shape[0]):
                total, w = out[h], weights[h, token : token + some]
                if some == 8:  # the sums are loaded and stored once for eight values
                    w0, w1, w2, w3, w4, w5, w6, w7 = w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7]
                    for e in range(d):
                        total[e] += (
                            w0 * v[0, e] + w1 * v[1, e] + w2 * v[2, e] + w3 * v[3, e]
                            + w4 * v[4, e] + w5 * v[5, e] + w6 * v[6, e] + w7 * v[7, e]
                        )  # fmt: skip
                else:
                    for t in range(some):
                        for e in range(d):
                            total[e] += w[t] * v[t, e]
            token += some


@njit(fastmath=_FAST, error_model="numpy")
def _copy(x, out):
    """Copy a vector; returns its sum."""
    total = np.float32(0)
    for i in range(x.shape[0]):
        out[i] = x[i]
        total += x[i]
    return total


@njit(fastmath=_FAST, error_model="numpy")
def _exponentiate(x, sink):
    """Make `exp(x - peak)` of a vector, `peak` the largest of its elements and `sink`; returns the peak and the sum,
    that of the sink, which may be -inf, included."""
    peak = np.float32(-np.inf)
    for i in range(x.shape[0]):
        peak = max(peak, x[i])
    peak = max(peak, sink)
    total = _exp(sink - peak) if sink > -np.inf else np.float32(0)
    for i in range(x.shape[0]):
        x[i] = _exp(x[i] - peak)
        total += x[i]
    return peak, total


@njit(fastmath=_FAST, error_model="numpy")
def _choose_fine(logits, fine, sinks, forced, num_free, share_wanted):
    """The fine blocks of candidates to attend to.

    Args:
        logits: `[group, tokens]` of whole candidates, side by side.
        fine: Tokens a fine block.
        sinks: As in `_share`.
        forced: `[tokens // fine]` bool.
        num_free: As in `_select`.
        share_wanted: Share of the mass at which to stop; infinite where the budget alone counts.

    Returns:
        `[tokens // fine]` bool, the forced ones included.
    """
    group, num_fine = logits.shape[0], forced.shape[0]
    score = np.empty((group, num_fine), np.float32)
    for h in range(group):
        for i in range(num_fine):
            score[h, i] = _logsumexp(logits[h, i * fine : (i + 1) * fine])
    shared, chosen = np.empty(num_fine, np.float32), np.empty(num_fine, np.bool_)
    mass = _share(score, sinks, shared)
    _select(shared, forced, num_free, share_wanted * mass if share_wanted < np.inf else np.inf, chosen)
    return chosen


@njit(fastmath=_FAST, error_model="numpy")
def _attend_one(
    token,
    kv_head,
    query,
    scale,
    cache,
    steps,
    stored,
    area,
    formats,
    codes,
    halves,
    sketch,
    positions,
    rows,
    table,
    sizes,
    rule,
    share_wanted,
    state,
    state_steps,
    state_starts,
    residual_scale,
    log_gain,
    sinks,
    output,
    num_read,
):
    """One query token of one kv head; the other arguments as in `attend`."""
    heads, d = query.shape[1:]
    page_size, block, fine = sizes
    selector, budget, whole, candidates, first_blocks, last_blocks = rule
    page_step, head_step, row_step = steps
    state_step, together = state_steps
    group = heads // num_read.shape[1]
    per_page = page_size // block
    position = positions[token]
    pages = table[rows[token]]
    current = position // block
    num_complete = position // page_size * per_page
    q, q2 = np.empty((group, d), np.float32), np.empty((group, d), np.float32)
    for h in range(group):
        for e in range(d):
            q[h, e] = query[token, kv_head * group + h, e] * np.float32(scale)
            q2[h, e] = q[h, e] * q[h, e]
    of_sinks = sinks[kv_head * group : (kv_head + 1) * group]
    no_sinks = np.full(group, np.float32(-np.inf))  # what has no mass of blocks has none that sinks could be added to
    sparse = current + 1 > whole
    tail = sparse and state_starts.shape[1] > 0
    two_levels = sparse and candidates > 0
    least = candidates if two_levels else whole  # blocks that statistics choose: to attend to, or to choose among
    clusters = 2 if selector == _KM2_REM else 1
    num_scored = num_complete if current + 1 > least or tail else 0
    linear = np.empty((clusters, group, num_scored), np.float32)
    variance = np.empty((clusters, group, num_scored), np.float32)

    chosen = np.ones(num_complete, np.bool_)
    forced = np.empty(num_complete, np.bool_)
    num_forced = 0
    for i in range(num_complete):
        forced[i] = i < first_blocks or i > current - last_blocks
        num_forced += forced[i]
    if num_scored > 0:
        score = np.empty((group, num_complete), np.float32)
        first, from_page, from_head, stride = area
        start, each = first + kv_head * from_head, (per_page, stride)
        _score(selector, q, q2, stored, formats, pages, from_page, start, each, block, score, linear, variance)
        if current + 1 > least:
            shared = np.empty(num_complete, np.float32)
            mass = _share(score, of_sinks if selector != _QUEST else no_sinks, shared)
            free = least - (current + 1 - num_complete) - num_forced
            by_mass = share_wanted < np.inf and not two_levels
            _select(shared, forced, free, share_wanted * mass if by_mass else np.inf, chosen)

    num_chosen = 0
    for i in range(num_complete):
        num_chosen += chosen[i]
    num_blocks = num_chosen + current + 1 - num_complete
    num_read[token, kv_head] = num_blocks if candidates == 0 else position // fine + 1
    ids = np.empty(num_blocks, np.int64)
    starts = np.empty(num_blocks, np.int64)
    lengths = np.full(num_blocks, block)
    lengths[-1] = position % block + 1
    n = 0
    for i in range(current + 1):
        if i >= num_complete or chosen[i]:
            page = np.int64(pages[i // per_page])
            ids[n] = i
            starts[n] = page * page_step + kv_head * head_step + i % per_page * block * row_step
            n += 1
    num_tokens = (num_blocks - 1) * block + lengths[-1]
    complete_tokens = num_chosen * block

    # The group's softmax; then, for what the state has to lose, the logits themselves and ones.
    num_weights = 2 * group + 1 if tail else group
    rest = np.full(num_complete, block)  # tokens of each block that are not attended to
    if two_levels:
        begin, scales_behind, sketch_page, sketch_head = sketch
        sketched = begin > 0
        logits = np.empty((group, complete_tokens if sketched else num_tokens), np.float32)
        if sketched:
            of_head = (begin + kv_head * sketch_head, scales_behind, sketch_page)
            first, from_page, from_head, stride = area
            _sketched_logits(
                q, codes, halves, of_head, stored, formats, pages, from_page, first + kv_head * from_head,
                (per_page, stride), ids[:num_chosen], block, logits,
            )  # fmt: skip
        else:
            _logits(q, cache, starts, lengths, row_step, logits)
        per_block = block // fine
        forced_fine = np.empty(num_chosen * per_block, np.bool_)
        for i in range(forced_fine.shape[0]):
            forced_fine[i] = forced[ids[i // per_block]]
        in_current_page = position // fine + 1 - num_complete * per_block
        free = budget * per_block - in_current_page - num_forced * per_block
        chosen_fine = _choose_fine(logits[:, :complete_tokens], fine, of_sinks, forced_fine, free, share_wanted)
        num_fine = 0
        for i in range(chosen_fine.shape[0]):
            num_fine += chosen_fine[i]
        num_read[token, kv_head] = num_fine + in_current_page
        num_current = num_blocks - num_chosen
        current_tokens = num_tokens - complete_tokens
        weights = np.empty((num_weights, num_fine * fine + current_tokens), np.float32)
        fine_starts = np.empty(num_fine + num_current, np.int64)
        fine_lengths = np.full(num_fine + num_current, fine)
        n = 0
        for i in range(chosen_fine.shape[0]):
            if chosen_fine[i]:
                of = i // per_block
                fine_starts[n] = starts[of] + i % per_block * fine * row_step
                rest[ids[of]] -= fine
                if not sketched:
                    for h in range(group):
                        for t in range(fine):
                            weights[h, n * fine + t] = logits[h, i * fine + t]
                n += 1
        for i in range(num_current):
            fine_starts[n + i], fine_lengths[n + i] = starts[num_chosen + i], lengths[num_chosen + i]
        if sketched:
            _logits(q, cache, fine_starts, fine_lengths, row_step, weights)
        else:
            for h in range(group):
                for t in range(current_tokens):
                    weights[h, n * fine + t] = logits[h, complete_tokens + t]
        starts, lengths, num_chosen, complete_tokens = fine_starts, fine_lengths, num_fine, num_fine * fine
    else:
        weights = np.empty((num_weights, num_tokens), np.float32)
        _logits(q, cache, starts, lengths, row_step, weights)
        for i in range(num_complete):
            if chosen[i]:
                rest[i] = 0

    log_mass = np.empty(group, np.float32)
    if tail:
        share_of_block = np.empty(num_complete, np.float32)
        for i in range(num_complete):
            share_of_block[i] = np.float32(rest[i]) / np.float32(block)
        for h in range(group):
            log_mass[h] = _log_mass(linear[:, h], variance[:, h], share_of_block)
    lse = np.empty(group, np.float32)
    total = np.empty(group, np.float32)
    read_qk = np.zeros(group, np.float32)
    for h in range(group):
        if tail:
            read_qk[h] = _copy(weights[h, :complete_tokens], weights[group + h, :complete_tokens])
        peak, total[h] = _exponentiate(weights[h], of_sinks[h])
        lse[h] = peak + np.float32(math.log(total[h]))
    if tail:
        for t in range(complete_tokens):
            weights[2 * group, t] = 1
    # Blocks of complete pages come first, those of the current page last; only the former are in the state.
    sums = np.zeros((weights.shape[0], d), np.float32)
    _sum_values(weights, 0, cache, starts[:num_chosen], lengths, d, row_step, sums)
    _sum_values(weights[:group], complete_tokens, cache, starts[num_chosen:], lengths[num_chosen:], d, row_step, sums)

    num_rest = num_complete * block - complete_tokens
    body = np.empty((d + 2 if tail else 0, d), np.float32)
    for r in range(body.shape[0]):
        start = state_starts[token, r // together] + kv_head * state_step + r % together * d
        load_elements(state, start, body[r])
    qkv = np.empty(d, np.float32)
    first = kv_head * group
    for h in range(group):
        for e in range(d):
            sums[h, e] /= total[h]
        if not tail or num_rest == 0:
            continue
        part = np.float32(1) / np.float32(num_rest)
        qk = (_dot(q[h], body[d + 1]) - read_qk[h]) * part
        for e in range(d):
            qkv[e] = 0
        for r in range(d):
            for e in range(d):
                qkv[e] += q[h, r] * body[r, e]
        gain = log_mass[h] + log_gain[first + h] - lse[h]
        share = np.float32(1) / (np.float32(1) + np.float32(math.exp(-gain)))
        if share > 0:
            for e in range(d):
                mean = (body[d, e] - sums[2 * group, e]) * part
                covariance = (qkv[e] - sums[group + h, e]) * part - qk * mean
                rest = mean + np.float32(residual_scale) * covariance
                sums[h, e] += share * (rest - sums[h, e])
    for h in range(group):
        for e in range(d):
            output[token, first + h, e] = sums[h, e]


@njit(parallel=True, fastmath=_FAST, error_model="numpy", cache=True)
def attend(
    query,
    scale,
    cache,
    steps,
    stored,
    area,
    formats,
    codes,
    halves,
    sketch,
    positions,
    rows,
    table,
    sizes,
    rule,
    share_wanted,
    state,
    state_steps,
    state_starts,
    residual_scale,
    log_gain,
    sinks,
    output,
    num_read,
):
    """Attention of query tokens over paged memory.

    Arguments stand side by side, and not in named tuples, because numba takes 8 microseconds of a call to look into
    these (13 instead of 5; numba 0.65, an AMD EPYC), and none with a tuple in it where a loop is parallel.

    Args:
        query: `[tokens, heads, head_size]` float32, unscaled.
        scale: Softmax scale.
        cache: Flat cache.
        steps: Elements from page to page, kv head to kv head, row to row.
        stored: The flat cache once more, as uint8 where statistics are stored in bytes.
        area: Where statistics are, in elements of `stored`: `(those of page 0, kv head 0, steps from page to page, kv
            head to kv head, block to block)`.
        formats: Of statistics in bytes, `[parts, 2]` int64, for consecutive parts the place in `FORMATS` and elements;
            not read where `stored` is the cache.
        codes: The flat cache as uint8; like `halves` read only where there is a sketch of keys.
        halves: The flat cache as int16.
        sketch: Where it is, in bytes: `(that of page 0, kv head 0, or 0 where there is none, from there to the scales,
            steps from page to page and kv head to kv head)`.
        positions: `[tokens]` int64.
        rows: `[tokens]` int64, rows of `table`.
        table: `[rows, pages]` int, page ids.
        sizes: `(page size, selection block, fine block)`; the last is not read where there is one level.
        rule: `(selector, budget in selection blocks, likewise those of a row up to which all are attended to,
            candidates or 0 for one level, first blocks, last blocks)`.
        share_wanted: Share of the mass at which selection stops; infinite where the budget alone counts.
        state: Flat float32 array with the bodies of the regression residual's states.
        state_steps: Elements from kv head to kv head, and body rows that stand together in a block.
        state_starts: `[tokens, blocks]` int64, where the first body row of the first kv head is, for every block of a
            token's state; not read for tokens that attend to everything. `[tokens, 0]` without a residual.
        residual_scale: Factor on the covariance.
        log_gain: `[heads]` float32, log of the weight of the tail.
        sinks: `[heads]` float32, logits that have no value; -inf where there are none.
        output: Output `[tokens, heads, head_size]` float32.
        num_read: Output `[tokens, kv_heads]` int32, blocks attended to: fine ones with two levels.
    """
    kv_heads = num_read.shape[1]
    for request in prange(query.shape[0] * kv_heads):
        _attend_one(
            request // kv_heads,
            request % kv_heads,
            query,
            scale,
            cache,
            steps,
            stored,
            area,
            formats,
            codes,
            halves,
            sketch,
            positions,
            rows,
            table,
            sizes,
            rule,
            share_wanted,
            state,
            state_steps,
            state_starts,
            residual_scale,
            log_gain,
            sinks,
            output,
            num_read,
        )


@njit(error_model="numpy", cache=True)
def store(key, value, cache, steps, slots, page_size):
    """Write keys and values into their slots.

    Args:
        key: `[tokens, kv_heads, head_size]`, elements of the cache.
        value: `[tokens, kv_heads, head_size]`.
        cache: Flat cache.
        steps: As in `attend`.
        slots: `[>= tokens]` int64, `page * page_size + offset`, negative for padding.
        page_size: Tokens a page.
    """
    page_step, head_step, row_step = steps
    tokens, kv_heads, d = key.shape
    for token in range(tokens):
        if slots[token] < 0:
            continue
        start = slots[token] // page_size * page_step + slots[token] % page_size * row_step
        for g in range(kv_heads):
            row = cache[start + g * head_step : start + g * head_step + 2 * d]
            for e in range(d):
                row[e] = key[token, g, e]
                row[d + e] = value[token, g, e]


@njit(error_model="numpy", cache=True)
def find_stale(cache, steps, stamp, last_pages, state, state_steps, blocks, expected, stale):
    """Which states do not cover just what is wanted (docs/design.md, 6).

    Args:
        cache: Flat cache, as int32.
        steps: int32 words from page to page and from kv head to kv head.
        stamp: Word at which the stamp of page 0, kv head 0, begins.
        last_pages: `[rows]` int64, the last pages to be covered.
        state: Flat state cache, as int32.
        state_steps: Words from block to block and from kv head to kv head.
        blocks: `[rows, K]` int, state blocks.
        expected: `[rows, K, kv_heads, words]` int32, headers with nothing in place of the stamp.
        stale: Output `[rows]` bool.
    """
    rows, num_blocks, kv_heads, words = expected.shape
    for row in range(rows):
        same = True
        for k in range(num_blocks):
            for g in range(kv_heads):
                header = np.int64(blocks[row, k]) * state_steps[0] + g * state_steps[1]
                at = last_pages[row] * steps[0] + g * steps[1] + stamp
                for i in range(words):
                    word = expected[row, k, g, i]
                    if 2 <= i < 2 + STAMP_WORDS:
                        word = cache[at + i - 2]
                    same = same and state[header + i] == word
        stale[row] = not same
