"""Attention on eight-bit codes in Triton itself: a program folds the keys of a block of queries.

Products of queries and keys are sums of int8 codes in int32. Weights e^(s - m), at most 1, meet values in the values' 16 bits, or rounded to int8 at the scale 1 / 127 or
to e4m3 at 1 / 448; their sum is that of the weights before rounding. Exponents are those of 2.
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def fold(total, summed, largest, q, q_scale, keys, key_scales, values, value_scales, row, start, end, length, length_padded,
         KEY_HEADS: tl.constexpr, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, VALUE_SIZE: tl.constexpr, VALUE_BLOCK: tl.constexpr,
         COLUMNS: tl.constexpr, KEY_SHARE: tl.constexpr, VALUE_SHARE: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr):
    """``(total, summed, largest)`` after the blocks of keys from ``start`` to ``end``: the weighed values, the weights, and the largest score of each row."""
    h, c, column = tl.arange(0, SIZE_BLOCK), tl.arange(0, VALUE_BLOCK), tl.arange(0, COLUMNS)
    dtype = values.dtype.element_ty
    for block in range(start, end):
        at = block * COLUMNS + column
        places = keys + at[:, None].to(tl.int64) * (KEY_HEADS * SIZE) + h[None, :]
        if MASKED:
            k = tl.load(places, mask=(at < length)[:, None] & (h < SIZE)[None, :], other=0)
        elif SIZE < SIZE_BLOCK:
            k = tl.load(places, mask=(h < SIZE)[None, :], other=0)
        else:
            k = tl.load(places)
        s = tl.dot(q, tl.trans(k)).to(tl.float32)
        if KEY_SHARE == 1:
            s *= tl.load(key_scales + at * KEY_HEADS, mask=at < length, other=0)[None, :]
            scale = q_scale
        else:
            scale = q_scale * tl.load(key_scales + block * COLUMNS // KEY_SHARE * KEY_HEADS)
        if MASKED:
            seen = (at < length)[None, :]
            if CAUSAL:
                seen = seen & (row[:, None] >= at[None, :])
            s = tl.where(seen, s, float("-inf"))
        most = tl.maximum(largest, tl.max(s, 1) * scale)
        if MASKED:
            shift = tl.where(most == float("-inf"), 0, most)
        else:
            shift = most
        p = tl.exp2(s * scale[:, None] - shift[:, None])
        kept = tl.exp2(largest - shift)
        summed = summed * kept + tl.sum(p, 1)
        total = total * kept[:, None]
        largest = most
        if dtype == tl.int8 or dtype == tl.float8e4nv:  # [VALUE_SIZE, length_padded]: the matrix units take eight-bit operands along what is summed over
            places = values + c[:, None].to(tl.int64) * length_padded + at[None, :]
            if MASKED or VALUE_SIZE < VALUE_BLOCK:
                v = tl.load(places, mask=(at < length)[None, :] & (c < VALUE_SIZE)[:, None], other=0.0)
            else:
                v = tl.load(places)
            if dtype == tl.int8:
                found = tl.dot((p * 127 + 0.5).to(tl.int8), tl.trans(v)).to(tl.float32)
            else:
                found = tl.dot((p * 448).to(dtype), tl.trans(v))
            if VALUE_SHARE > 0:
                found *= tl.load(value_scales + block * COLUMNS // VALUE_SHARE * (KEY_HEADS * VALUE_SIZE) + c, mask=c < VALUE_SIZE, other=0)[None, :]
            total += found
        else:
            places = values + at[:, None].to(tl.int64) * (KEY_HEADS * VALUE_SIZE) + c[None, :]
            if MASKED:
                v = tl.load(places, mask=(at < length)[:, None] & (c < VALUE_SIZE)[None, :], other=0)
            elif VALUE_SIZE < VALUE_BLOCK:
                v = tl.load(places, mask=(c < VALUE_SIZE)[None, :], other=0)
            else:
                v = tl.load(places)
            total = tl.dot(p.to(dtype), v, total)
    return total, summed, largest


@triton.jit
def quantised_forward(query, query_scales, key, key_scales, value, value_scales, lengths, queries, keys, keys_padded,
                      out, residual,
                      HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, SIZE: tl.constexpr, SIZE_BLOCK: tl.constexpr, VALUE_SIZE: tl.constexpr, VALUE_BLOCK: tl.constexpr,
                      ROWS: tl.constexpr, COLUMNS: tl.constexpr, QUERY_SHARE: tl.constexpr, KEY_SHARE: tl.constexpr, VALUE_SHARE: tl.constexpr,
                      CAUSAL: tl.constexpr, LENGTHS: tl.constexpr, RESIDUAL: tl.constexpr):
    """A program for each block of ``ROWS`` queries of a head.

    query [B, queries, HEADS, SIZE] and key [B, keys, KEY_HEADS, SIZE] in int8; their scales [B, tokens / SHARE, heads], SHARE 1 or a multiple of the block's tokens,
    that of the query with the scores' and log2 e in it. value [B, keys, KEY_HEADS, VALUE_SIZE], or in eight bits [B, KEY_HEADS, VALUE_SIZE, keys_padded] with
    scales [B, keys / VALUE_SHARE, KEY_HEADS, VALUE_SIZE] (SHARE 0: all keys'). lengths [B], how many keys count. out [B, queries, HEADS, VALUE_SIZE], residual
    [B, HEADS, queries] the rows' log-normalisers.
    """
    blocks = tl.cdiv(queries, ROWS)
    block, place = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    if CAUSAL:
        block = blocks - 1 - block  # the longest first
    head, batch = place % HEADS, (place // HEADS).to(tl.int64)
    key_head = head // (HEADS // KEY_HEADS)
    row, h, c = block * ROWS + tl.arange(0, ROWS), tl.arange(0, SIZE_BLOCK), tl.arange(0, VALUE_BLOCK)
    there = row < queries

    q = tl.load(query + ((batch * queries + row[:, None]) * HEADS + head) * SIZE + h[None, :], mask=there[:, None] & (h < SIZE)[None, :], other=0)
    if QUERY_SHARE == 1:
        q_scale = tl.load(query_scales + (batch * queries + row) * HEADS + head, mask=there, other=1)
    else:
        q_scale = tl.full([ROWS], 1, tl.float32) * tl.load(query_scales + (batch * tl.cdiv(queries, QUERY_SHARE) + block * ROWS // QUERY_SHARE) * HEADS + head)
    length = keys
    if LENGTHS:
        length = tl.minimum(tl.load(lengths + batch), keys)
    key_scales += batch * tl.cdiv(keys, KEY_SHARE) * KEY_HEADS + key_head
    value_blocks = 1 if VALUE_SHARE == 0 else tl.cdiv(keys, VALUE_SHARE)
    value_scales += (batch * value_blocks * KEY_HEADS + key_head) * VALUE_SIZE
    key += (batch * keys * KEY_HEADS + key_head) * SIZE
    dtype = value.dtype.element_ty
    if dtype == tl.int8 or dtype == tl.float8e4nv:
        value += (batch * KEY_HEADS + key_head) * VALUE_SIZE * keys_padded
    else:
        value += (batch * keys * KEY_HEADS + key_head) * VALUE_SIZE

    total = tl.zeros([ROWS, VALUE_BLOCK], tl.float32)
    summed = tl.zeros([ROWS], tl.float32)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    full, end = length // COLUMNS, tl.cdiv(length, COLUMNS)
    if CAUSAL:
        full = tl.minimum(full, block * ROWS // COLUMNS)
        end = tl.minimum(end, tl.cdiv((block + 1) * ROWS, COLUMNS))
    total, summed, largest = fold(total, summed, largest, q, q_scale, key, key_scales, value, value_scales, row, 0, full, length, keys_padded,
                                  KEY_HEADS, SIZE, SIZE_BLOCK, VALUE_SIZE, VALUE_BLOCK, COLUMNS, KEY_SHARE, VALUE_SHARE, CAUSAL, False)
    total, summed, largest = fold(total, summed, largest, q, q_scale, key, key_scales, value, value_scales, row, full, end, length, keys_padded,
                                  KEY_HEADS, SIZE, SIZE_BLOCK, VALUE_SIZE, VALUE_BLOCK, COLUMNS, KEY_SHARE, VALUE_SHARE, CAUSAL, True)
    some = summed > 0
    found = total * tl.where(some, 1 / tl.where(some, summed, 1), 0)[:, None]
    if dtype == tl.int8:
        found *= 1 / 127
    elif dtype == tl.float8e4nv:
        found *= 1 / 448
    if VALUE_SHARE == 0:
        found *= tl.load(value_scales + c, mask=c < VALUE_SIZE, other=0)[None, :]
    places = out + ((batch * queries + row[:, None]) * HEADS + head) * VALUE_SIZE + c[None, :]
    tl.store(places, found.to(out.dtype.element_ty), mask=there[:, None] & (c < VALUE_SIZE)[None, :])
    if RESIDUAL:
        log = tl.where(some, (largest + tl.log2(tl.where(some, summed, 1))) * LN2, float("-inf"))
        tl.store(residual + (batch * HEADS + head) * queries + row, log, mask=there)
