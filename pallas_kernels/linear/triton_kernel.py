"""The recurrent engine's forward kernel in Triton itself: a program carries some columns of a head's state along a slab of the sequence, in registers.

It computes what the forward program of :mod:`pallas_kernels.linear.gpu` does and is handed the same arrays. What the language offers beyond Pallas is used in three
places. Queries that share a state are rows of one product. The decays of a head between all pairs of tokens are differences of running sums, which are kept in two
numbers: multiples of 1/512, of which differences are exact, and a small rest; so they too cost no more than rounding. The decays of channels are added up by
products with zeros and ones in two numbers of 11 bits.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
STRONGEST = tl.constexpr(-128.0)  # of the log-decays that are told apart: from -104 on the exponential is 0


@triton.jit
def load(at, inside, whole: tl.constexpr):
    """What is read at pointers; 0 where it is not ``inside``, unless it all is."""
    if whole:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=inside, other=0)
    return x


@triton.jit
def exp(x):
    """e^x in two instructions."""
    return tl.exp2(x * LOG2E)


@triton.jit
def forget(state, lost):
    """As :func:`pallas_kernels.linear_tile.forget`: just below a factor of 1 the loss is computed, by its series, and subtracted."""
    loss = 1 + lost * (1 / 9)
    loss = 1 + lost * (1 / 8) * loss
    loss = 1 + lost * (1 / 7) * loss
    loss = 1 + lost * (1 / 6) * loss
    loss = 1 + lost * (1 / 5) * loss
    loss = 1 + lost * (1 / 4) * loss
    loss = 1 + lost * (1 / 3) * loss
    loss = lost * (1 + lost * (1 / 2) * loss)
    return tl.where(lost > -0.5, state + loss * state, exp(lost) * state)


@triton.jit
def running_sums(log_decay):
    """The sums up to each token: in 64 bits, and as a multiple of 1/512 and a rest."""
    sums = tl.cumsum(log_decay, 0)
    coarse = tl.floor(sums * 512) * (1 / 512)
    return sums, coarse.to(tl.float32), (sums - coarse).to(tl.float32)


@triton.jit
def add_up(which, coarse, fine):
    """The sums of log-decays [C, H], in two parts, over the tokens that ``which`` [R, C] says."""
    which = which.to(tl.float16)
    return tl.dot(which, coarse) + tl.dot(which, fine) * (1 / 2048)


@triton.jit
def spread(rows, x, together: tl.constexpr):
    """Rows [R, H] times what each of ``together`` of them has in common, ``x`` [R / together, H]."""
    if together == 1:
        found = rows * x
    else:
        found = (rows.reshape([x.shape[0], together, x.shape[1]]) * x[:, None, :]).reshape(rows.shape)
    return found


@triton.jit
def across(token, half: tl.constexpr):
    """Which tokens lie between each and the middle of its block of ``2 half`` tokens, itself among them where it comes later."""
    row, column = token[:, None], token[None, :]
    late = (row & half) != 0
    return ((row ^ column) < half) & ((late & (column <= row)) | ((row & half == 0) & (column > row)))


@triton.jit
def linear_forward(query, key, value, log_decay, memory, normalizer, length, chunks,
                   out, denominators, last_memory, last_normalizer,
                   STATES: tl.constexpr, KEY_HEADS: tl.constexpr, GROUPS: tl.constexpr, TOGETHER: tl.constexpr, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr,
                   VALUE_SIZE: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr, DECAY: tl.constexpr,
                   NORMALIZE: tl.constexpr, SCALE: tl.constexpr, FLOOR: tl.constexpr, READ: tl.constexpr, PRECISION: tl.constexpr):
    """A program for each (block of columns, state, batch element) and slab of ``chunks`` chunks.

    query [B, length, STATES GROUPS, SIZE], key [B, length, KEY_HEADS, SIZE], value [B, length, KEY_HEADS, VALUE_SIZE]; log_decay [B, length, STATES] with DECAY 1,
    [B, length, STATES, SIZE] with 2. memory [B, STATES, slabs, SIZE_BLOCK, BLOCKS COLUMNS] and normalizer [B, STATES, slabs, 1, SIZE_BLOCK] arrive at slabs, and
    the last ones leave them. Without READ there are no queries, and states are all that is written. TOGETHER queries of a state are read at a time.
    """
    place, slab = tl.program_id(0), tl.program_id(1)
    block, state = place % BLOCKS, place // BLOCKS % STATES
    batch = (place // (BLOCKS * STATES)).to(tl.int64)
    token, h, columns = tl.arange(0, CHUNK), tl.arange(0, SIZE_BLOCK), block * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, CHUNK * TOGETHER) // TOGETHER
    group = tl.arange(0, CHUNK * TOGETHER) % TOGETHER
    within, inside = (h < SIZE)[None, :], (columns < VALUE_SIZE)[None, :]
    WHOLE: tl.constexpr = SIZE == SIZE_BLOCK
    ALL: tl.constexpr = VALUE_SIZE % COLUMNS == 0
    dtype = query.dtype.element_ty

    here = (batch * STATES + state) * tl.num_programs(1) + slab
    matrix = h[:, None] * (BLOCKS * COLUMNS) + columns[None, :]
    kept = tl.load(memory + here * (SIZE_BLOCK * BLOCKS * COLUMNS) + matrix)
    if NORMALIZE:
        summed = tl.load(normalizer + here * SIZE_BLOCK + h)

    first = batch * length + slab * chunks * CHUNK
    head = state // (STATES // KEY_HEADS)
    keys = key + (first * KEY_HEADS + head) * SIZE
    values = value + (first * KEY_HEADS + head) * VALUE_SIZE
    queries = query + (first * STATES + state) * (GROUPS * SIZE)
    outs = out + (first * STATES + state) * (GROUPS * VALUE_SIZE)
    divisors = denominators + (batch * STATES + state) * GROUPS * length + slab * chunks * CHUNK
    if DECAY == 1:
        decays = log_decay + first * STATES + state
    else:
        decays = log_decay + (first * STATES + state) * SIZE

    for _ in range(chunks):
        k = load(keys + token[:, None] * (KEY_HEADS * SIZE) + h[None, :], within, WHOLE).to(dtype)
        v = load(values + token[:, None] * (KEY_HEADS * VALUE_SIZE) + columns[None, :], inside, ALL).to(dtype)
        if DECAY == 1:
            g = tl.maximum(tl.load(decays + token * STATES), STRONGEST).to(tl.float64)
            sums, coarse, fine = running_sums(g)
            total = tl.sum(g, 0)
            later = exp((total - sums).to(tl.float32))
            lost = total.to(tl.float32)
            if TOGETHER == 1:
                row_sums, row_coarse, row_fine = sums, coarse, fine
            else:
                g = tl.load(decays + row * STATES, mask=group == 0, other=0)
                row_sums, row_coarse, row_fine = running_sums(tl.maximum(g, STRONGEST).to(tl.float64))
            since = exp(row_sums.to(tl.float32))
            between = exp((row_coarse[:, None] - coarse[None, :]) + (row_fine[:, None] - fine[None, :]))
        elif DECAY == 2:
            g = tl.maximum(load(decays + token[:, None] * (STATES * SIZE) + h[None, :], within, WHOLE), STRONGEST)
            coarse = g.to(tl.float16)
            fine = ((g - coarse.to(tl.float32)) * 2048).to(tl.float16)
            lost = tl.sum(g, 0)
            later = exp(add_up(token[None, :] > token[:, None], coarse, fine))
            since = exp(add_up(token[None, :] <= token[:, None], coarse, fine))

        if READ:
            for start in range(0, GROUPS, TOGETHER):
                n = start + group
                there = (n < GROUPS)[:, None]
                FULL: tl.constexpr = GROUPS % TOGETHER == 0
                q = load(queries + row[:, None] * (STATES * GROUPS * SIZE) + n[:, None] * SIZE + h[None, :], within & there, WHOLE and FULL)
                scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                if DECAY == 1:
                    scores *= between
                elif DECAY == 2:
                    for level in tl.static_range(LEVELS):
                        if level == 0:
                            near = exp(tl.where((token & 1 != 0)[:, None], g, 0))
                        else:
                            near = exp(add_up(across(token, 1 << level), coarse, fine))
                        apart = tl.dot(spread(q, near, TOGETHER).to(dtype), tl.trans((k * near).to(dtype)), input_precision=PRECISION)
                        scores = tl.where((row[:, None] ^ token[None, :]) >= (1 << level), apart, scores)
                scores = tl.where(row[:, None] >= token[None, :], scores, 0)
                if DECAY == 2:
                    q = spread(q, since, TOGETHER)
                found = tl.dot(q.to(dtype), kept.to(dtype), input_precision=PRECISION)
                if DECAY == 1:
                    found *= since[:, None]
                found = tl.dot(scores.to(dtype), v, found, input_precision=PRECISION)
                if NORMALIZE:
                    divisor = tl.sum(q * summed[None, :], 1)
                    if DECAY == 1:
                        divisor *= since
                    divisor += tl.sum(scores, 1)
                    if FLOOR is None:
                        factor = tl.where(divisor != 0, 1 / tl.where(divisor != 0, divisor, 1), 0)
                    else:
                        factor = SCALE / tl.maximum(tl.abs(divisor * SCALE), FLOOR)
                    found *= factor[:, None]
                    if block == 0:
                        tl.store(divisors + n * length + row, divisor, mask=n < GROUPS)
                else:
                    found *= SCALE
                places = outs + row[:, None] * (STATES * GROUPS * VALUE_SIZE) + n[:, None] * VALUE_SIZE + columns[None, :]
                if FULL and ALL:
                    tl.store(places, found.to(dtype))
                else:
                    tl.store(places, found.to(dtype), mask=inside & there)

        if DECAY == 1:
            kept = forget(kept, lost)
            v = (v * later[:, None]).to(dtype)
        elif DECAY == 2:
            kept = forget(kept, lost[:, None])
            k = (k * later).to(dtype)
        kept = tl.dot(tl.trans(k), v, kept, input_precision=PRECISION)
        if NORMALIZE:
            if DECAY > 0:
                summed = forget(summed, lost)
            if DECAY == 1:
                summed += tl.sum(k * later[:, None], 0)
            else:
                summed += tl.sum(k.to(tl.float32), 0)

        keys += CHUNK * KEY_HEADS * SIZE
        values += CHUNK * KEY_HEADS * VALUE_SIZE
        queries += CHUNK * STATES * GROUPS * SIZE
        outs += CHUNK * STATES * GROUPS * VALUE_SIZE
        divisors += CHUNK
        if DECAY == 1:
            decays += CHUNK * STATES
        elif DECAY == 2:
            decays += CHUNK * STATES * SIZE

    tl.store(last_memory + here * (SIZE_BLOCK * BLOCKS * COLUMNS) + matrix, kept)
    if NORMALIZE:
        if block == 0:
            tl.store(last_normalizer + here * SIZE_BLOCK + h, summed)
