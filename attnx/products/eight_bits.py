"""Products of operands rounded to eight bits, each with a scale that its neighbours share.

::

    a b^T ~ (codes_a codes_b^T) scale_a scale_b^T,        x ~ codes scale,        scale = max |x| / 127  (int8) or  max |x| / 448  (e4m3)

Products of int8 codes are summed in int32, hence exact, and run at twice the rate of 16 bits on the matrix units of TPUs (from v5e on) and NVIDIA GPUs. Those of 8-bit
floating-point codes are evaluated in bfloat16, which holds them all: their accuracy, not their speed.

Zhang et al.: "SageAttention: Accurate 8-Bit Attention for Plug-and-play Inference Acceleration" (2024, arXiv 2410.02367).
"""

import dataclasses

import jax.numpy as jnp
from jax import lax

from attnx.core.checks import check_block_sizes, check_choice
from pallas_kernels.parts import Softmax
from pallas_kernels.products import Products, Rounded, accumulator_dtype, multiply
from pallas_kernels.quantised import formats

SHARES = ("block", "token")
VALUES = ("int8", "float8", "float16", "float16 sums")
_AXES = {"scores": ("query", "key", "channel"), "dp": ("query", "key", "channel"), "values": ("query", "channel", "key"),
         "dq": ("query", "channel", "key"), "dv": ("key", "channel", "query"), "dk": ("key", "channel", "query")}  # rows, columns, what is summed over


@dataclasses.dataclass(frozen=True)
class Format:
    """How an operand is rounded; this one leaves it as it is. ``scaled``: whether a scale is shared along the axis that is summed over."""

    scaled = False

    def encode(self, x, axis: int, block: int):
        """``(codes, scale)``: the scale a number, or broadcasting against ``x`` and constant along ``axis``, the one summed over; ``block``: of the other."""
        return x, None


@dataclasses.dataclass(frozen=True)
class Scaled(Format):
    """Codes of ``dtype`` (see :mod:`pallas_kernels.quantised.formats`), a scale for each row ('token') or for a block of rows ('block')."""

    dtype: str
    share: str
    scaled = True

    def encode(self, x, axis, block):
        largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True)
        largest = formats.block_maximum(largest, 1 - axis, block) if self.share == "block" else largest
        return formats.encode(x, largest, self.dtype)


@dataclasses.dataclass(frozen=True)
class UpToOne(Format):
    """Codes in int8 of numbers from 0 to 1, at the scale 1 / 127."""

    def encode(self, x, axis, block):
        return formats.to_int8(x, 1 / formats.LEVELS), 1 / formats.LEVELS


@dataclasses.dataclass(frozen=True)
class Cast(Format):
    """Rounded to a floating-point dtype."""

    dtype: str

    def encode(self, x, axis, block):
        return x.astype(self.dtype), None


@dataclasses.dataclass(frozen=True)
class Quantised(Rounded):
    """Products of operands in the formats that are named; the others are exact. See :func:`int8`.

    Attributes:
      formats: ``(name, format of the first operand, format of the second)`` for each product that is rounded, operands in the order of :mod:`pallas_kernels.products`.
      halved: products whose sums over a block are rounded to float16, before the blocks are added in float32.
      block_sizes: (queries, keys), powers of two: rows that share a scale, and the length of sums at one scale.
    """

    formats: tuple[tuple[str, Format, Format], ...]
    halved: tuple[str, ...] = ()
    block_sizes: tuple[int, int] = (128, 64)

    @property
    def blocks(self):
        shared = any(isinstance(x, Scaled) and x.share == "block" for _, *pair in self.formats for x in pair)
        return self.block_sizes if shared or self.cut else (1, 1)

    @property
    def cut(self):
        return any(self._pieces(name) for name, *_ in self.formats)

    @property
    def dtypes(self):
        given = [x.dtype for _, *pair in self.formats for x in pair if isinstance(x, (Scaled, Cast))]
        return frozenset([*given, *(["float16"] if self.halved else [])])

    def check(self, parts):
        bounded = any(isinstance(x, UpToOne) for _, *pair in self.formats for x in pair)
        if bounded and (parts.dropout_rate or not isinstance(parts.weights, Softmax)):
            raise NotImplementedError("products: int8 weights at a fixed scale are at most 1, as those of softmax without dropout are in a fold; "
                                      f"got weights={type(parts.weights).__name__} and dropout_rate={parts.dropout_rate}")

    def _pieces(self, name: str) -> bool:
        """Whether sums over tokens are cut into blocks."""
        pair = next(pair for mine, *pair in self.formats if mine == name)
        return _AXES[name][2] != "channel" and (name in self.halved or any(x.scaled for x in pair))

    def product(self, name, a, b, contract, *, transposed=False):
        pair = next((pair for mine, *pair in self.formats if mine == name), None)
        if pair is None:
            return multiply(a, b, contract)
        rows, columns, summed = _AXES[name]
        if transposed and summed == "channel":
            rows, columns, pair = columns, rows, pair[::-1]
        sizes = {"query": self.block_sizes[0], "key": self.block_sizes[1], "channel": 1 << 30}
        length = a.shape[contract[0]]
        step = min(length, sizes[summed]) if self._pieces(name) else max(length, 1)
        total = 0
        for start in range(0, length, step):
            x, y = (_cut(x, axis, start, start + step) for x, axis in ((a, contract[0]), (b, contract[1])))
            (x, x_scale), (y, y_scale) = pair[0].encode(x, contract[0], sizes[rows]), pair[1].encode(y, contract[1], sizes[columns])
            found = _scaled(_multiply(x, y, contract).astype(accumulator_dtype(b.dtype)), x_scale, contract[0] == 0)
            found = _scaled(found, y_scale, contract[1] == 1)
            total += found.astype(jnp.float16).astype(found.dtype) if name in self.halved else found
        return total


def _cut(x, axis, start, end):
    if start == 0 and end >= x.shape[axis]:
        return x
    return x[start:end] if axis == 0 else x[:, start:end]


def _scaled(x, scale, turned: bool):
    if scale is None:
        return x
    return x * (scale.T if turned and not isinstance(scale, float) else scale)


def _multiply(a, b, contract):
    if a.dtype == b.dtype == jnp.int8:
        return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.int32)
    a, b = (x.astype(jnp.bfloat16) if x.dtype.itemsize == 1 else x for x in (a, b))
    return multiply(a, b, contract)


def int8(scores: str | None = "block", values: str | None = None, *, block_sizes: tuple[int, int] = (128, 64)) -> Products:
    """Int8 products of queries and keys, and values weighed in few bits.

    Args:
      scores: 'block' (queries and keys share a scale by blocks of ``block_sizes``), 'token' (each row has its own), or None (exact).
      values: how weights and values are rounded. 'int8': weights, at most 1, at the scale 1 / 127, values at a scale for each channel of a block of keys;
        'float8': e4m3, a scale for each row, and for each channel, of a block; 'float16'; 'float16 sums': likewise, and sums over a block of keys
        rounded to float16, as matrix units leave them that sum in float16 (at twice the rate on consumer GPUs); None: exact.
      block_sizes: (queries, keys), powers of two.

    The rounded products are the two of the forward pass; gradients are those of the operands before rounding, their products exact.

    >>> import attnx, jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 100, 2, 16))
    >>> rounded = attnx.attention(q, k, v, mask=attnx.masks.causal(), products=attnx.products.int8())
    >>> bool(abs(rounded - attnx.attention(q, k, v, mask=attnx.masks.causal())).max() < 0.02)
    True
    """
    return _products("int8", scores, values, block_sizes)


def float8(scores: str | None = "token", values: str | None = None, *, block_sizes: tuple[int, int] = (128, 64), dtype: str = "float8_e4m3fn") -> Products:
    """As :func:`int8`, queries and keys in 8-bit floating point: ``dtype`` 'float8_e4m3fn' or 'float8_e5m2'.

    >>> import attnx, jax
    >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 100, 2, 16))
    >>> rounded = attnx.attention(q, k, v, mask=attnx.masks.causal(), products=attnx.products.float8())
    >>> bool(abs(rounded - attnx.attention(q, k, v, mask=attnx.masks.causal())).max() < 0.1)
    True
    """
    check_choice("dtype", dtype, tuple(formats.LARGEST))
    return _products(dtype, scores, values, block_sizes)


def _products(dtype, scores, values, block_sizes):
    check_choice("scores", scores, SHARES)
    check_choice("values", values, VALUES)
    block_sizes = check_block_sizes(block_sizes)
    if any(n & (n - 1) for n in block_sizes):
        raise ValueError(f"block_sizes: expected powers of two, got {block_sizes}")
    float8, half = Scaled("float8_e4m3fn", "token"), Cast("float16")
    chosen = {"int8": (UpToOne(), Scaled("int8", "token")), "float8": (float8, float8), "float16": (half, half), "float16 sums": (half, half)}
    rounded = []
    if scores is not None:
        rounded.append(("scores", Scaled(dtype, scores), Scaled(dtype, scores)))
    if values is not None:
        rounded.append(("values", *chosen[values]))
    if not rounded:
        return Products()
    return Quantised(tuple(rounded), ("values",) if values == "float16 sums" else (), block_sizes)
