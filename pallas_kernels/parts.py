"""The protocol of parts: scores, masks and weights from which an attention is composed.

A part is a frozen dataclass registered as a pytree: its arrays are leaves (so new values need no recompilation, and gradients
reach them), the rest is static. A part never touches its arrays inside a tile: :meth:`Part.operands` declares
them with the meaning of each axis, and the execution hands their *blocks* to the tile functions. The axes decide everything an execution
needs to know - how a block is cut, how its gradient accumulates, whether it travels with the keys around a ring:

    'batch', 'head', 'kv_head'   the tile has one; removed from the block (size 1 broadcasts)
    'query'                      rows of the tile: stays with the queries
    'key'                        columns of the tile: travels with the keys
    'offset'                     a table over j - i; the tile sees its [bq, bk] diagonal bands
    None                         handed over whole, as a trailing axis

A block is at least two-dimensional: [bq or 1, bk or 1, *None axes]. A tile may also be evaluated transposed, [bk, bq], with all that belongs to
it - scores, positions, blocks, row statistics - turned alike: parts broadcast, and never name the axes of queries and keys.
"""

import dataclasses
import enum
import typing
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class At(NamedTuple):
    """Where a tile lies, in logical positions (int32, -1 = padding): predicates see these, never storage indices."""

    batch: Any  # scalar, or [bq, 1] where rows differ
    head: Any  # likewise, the query's head
    query: Any  # [bq, 1]
    key: Any  # [1, bk], or [bq, bk] where a key is padding to some rows only


class Operand(NamedTuple):
    """An array that a part reads tile by tile, with the meaning of each of its axes."""

    array: Any
    axes: tuple[str | None, ...]


class Spec(NamedTuple):
    """How an operand varies: over batch, key-value heads, groups, queries, keys, or the offset between them.

    Executions keep operands in the layout [batch, kv_head, group, query, key, *None axes], or [batch, kv_head, group, offset].
    """

    batch: bool
    kv: bool
    group: bool
    query: bool
    key: bool
    offset: bool


class Sizes(NamedTuple):
    """The static sizes of a call, for parts that build their operands from them.

    ``offsets`` is the inclusive range of key position minus query position that an 'offset' operand covers.
    """

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    offsets: tuple[int, int]
    dtype: Any


class Range(NamedTuple):
    """The smallest and the largest value that a block holds."""

    low: Any
    high: Any


class Cover(NamedTuple):
    """What is certain of a tile without looking at its pairs: may ``some`` be allowed; is ``every`` one."""

    some: Any
    every: Any


class Blocks(NamedTuple):
    """The operands, or their blocks, by the part they belong to; ``scores`` has a tuple for each score."""

    scores: tuple = ()
    mask: tuple = ()
    weights: tuple = ()


def static(**kwargs):
    """A dataclass field that is part of the program rather than an array; it must be hashable."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@typing.dataclass_transform(frozen_default=True, field_specifiers=(static,))
def part(cls):
    """Class decorator: a frozen dataclass registered as a pytree whose non-static fields are its leaves.

    Two are equal, and hash alike, where their static fields are and their arrays are the same objects: what compilation is keyed by.
    """
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    cls.__eq__ = lambda self, other: type(self) is type(other) and _identity(self) == _identity(other)
    cls.__hash__ = lambda self: hash(_identity(self))
    _register(cls)
    return cls


def _register(cls):
    """A dataclass becomes a pytree whose structure knows its class.

    The structures that jax.tree_util.register_dataclass gives compare equal where the static fields do, whatever the classes, though their hashes differ:
    one lookup in a hundred or so of jit's cache would find the program of another part.
    """
    leaves, statics = ([f.name for f in dataclasses.fields(cls) if f.init and bool(f.metadata.get("static")) is kind] for kind in (False, True))
    keys = [jax.tree_util.GetAttrKey(name) for name in leaves]

    def flatten(self):
        return [getattr(self, name) for name in leaves], tuple(getattr(self, name) for name in statics)

    def flatten_with_keys(self):
        children, structure = flatten(self)
        return list(zip(keys, children)), structure

    def unflatten(structure, children):
        return cls(**dict(zip(leaves, children)), **dict(zip(statics, structure)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)


def _identity(tree):
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple(map(id, leaves))


class Part:
    """What scores, masks and weights have in common."""

    @property
    def arity(self) -> int:
        """How many operands the part has; one for each of its arrays unless it says otherwise."""
        return len(jax.tree.leaves(self))

    def operands(self, sizes: Sizes) -> tuple[Operand, ...]:
        """The arrays that the tile functions read, in the order in which their blocks arrive."""
        if jax.tree.leaves(self):
            raise NotImplementedError(f"{type(self).__name__} holds arrays and must say in operands() what their axes mean")
        return ()

    def as_jax_nn(self) -> dict | None:
        """The part as keyword arguments of ``jax.nn.dot_product_attention``, or None where that function cannot express it."""
        return None


class Score(Part):
    """A change of the scores: ``tile(s, at, *blocks) -> s``, elementwise in s, jnp only, no arrays but the blocks.

    ``horizon``: the distance |j - i| beyond which an 'offset' operand no longer changes; its ends are read there.
    """

    horizon: int = 0

    def tile(self, s, at: At, *blocks):
        raise NotImplementedError


class Similarity(Score):
    """Replaces the dot product: ``pair(q [bq, H], k [bk, H], at, *blocks) -> s [bq, bk]``. The first of the scores, and alone of its kind."""

    def pair(self, q, k, at: At, *blocks):
        raise NotImplementedError


class Mask(Part):
    """Which pairs are allowed. Masks compose with ``&``, ``|`` and ``~``."""

    def tile(self, at: At, *blocks):
        """Booleans that broadcast to [bq, bk]."""
        raise NotImplementedError

    def block(self, query: Range, key: Range, *ranges: Range) -> Cover:
        """What the ranges of positions and operands tell of a whole tile; saying nothing is always right."""
        return Cover(True, False)

    def count(self, query, key: Range):
        """How many of the keys at positions key.low..key.high each query position sees, or None where no closed form is known."""
        return None

    def span(self) -> tuple[int | None, int | None]:
        """How many positions before and after its own a query may see at the most; None is any number. Caches and rings keep no more."""
        return None, None

    def __and__(self, other):
        return And(self, _mask(other)) if other is not None else self

    def __or__(self, other):
        return Or(self, _mask(other))

    def __invert__(self):
        return self.mask if isinstance(self, Not) else Not(self)


def _mask(other):
    if not isinstance(other, Mask):
        raise TypeError(f"mask: masks combine with masks, got {type(other).__name__}; wrap an array in attnx.masks.explicit")
    return other


class _Pair(Mask):
    @property
    def arity(self):
        return self.a.arity + self.b.arity

    def operands(self, sizes):
        return (*self.a.operands(sizes), *self.b.operands(sizes))

    def _both(self, method, *args):
        *args, blocks = args
        n = self.a.arity
        return getattr(self.a, method)(*args, *blocks[:n]), getattr(self.b, method)(*args, *blocks[n:])


@part
class And(_Pair):
    """Pairs that both masks allow."""

    a: Mask
    b: Mask

    def tile(self, at, *blocks):
        a, b = self._both("tile", at, blocks)
        return a & b

    def block(self, query, key, *ranges):
        a, b = self._both("block", query, key, ranges)
        return Cover(jnp.logical_and(a.some, b.some), jnp.logical_and(a.every, b.every))

    def span(self):
        return tuple(min((x for x in side if x is not None), default=None) for side in zip(self.a.span(), self.b.span()))

    def as_jax_nn(self):
        a, b = self.a.as_jax_nn(), self.b.as_jax_nn()
        return None if a is None or b is None or a.keys() & b.keys() else {**a, **b}


@part
class Or(_Pair):
    """Pairs that at least one mask allows."""

    a: Mask
    b: Mask

    def tile(self, at, *blocks):
        a, b = self._both("tile", at, blocks)
        return a | b

    def block(self, query, key, *ranges):
        a, b = self._both("block", query, key, ranges)
        return Cover(jnp.logical_or(a.some, b.some), jnp.logical_or(a.every, b.every))

    def span(self):
        return tuple(None if None in side else max(side) for side in zip(self.a.span(), self.b.span()))


@part
class Not(Mask):
    """Pairs that the mask forbids."""

    mask: Mask

    @property
    def arity(self):
        return self.mask.arity

    def operands(self, sizes):
        return self.mask.operands(sizes)

    def tile(self, at, *blocks):
        return ~self.mask.tile(at, *blocks)

    def block(self, query, key, *ranges):
        cover = self.mask.block(query, key, *ranges)
        return Cover(jnp.logical_not(cover.every), jnp.logical_not(cover.some))

    def count(self, query, key):
        inner = self.mask.count(query, key)
        return None if inner is None else key.high - key.low + 1 - inner


# Weights ------------------------------------------------------------------------------------------------------------


class Sum(NamedTuple):
    """The explicit statistic ``r = finish(sum_j phi(s_ij, earlier, *operands), earlier, *operands)``; finish is elementwise and smooth."""

    phi: Callable
    finish: Callable


class Root(NamedTuple):
    """The statistic r that solves ``sum_j phi(s_ij, r, earlier, *operands) = target``.

    phi is non-increasing and convex in r; ``bracket(row maximum, number of allowed keys) -> (low, high)`` encloses the root.
    Solved by Newton steps from the left, which cannot overshoot, kept inside the bracket by bisection against rounding.
    """

    phi: Callable
    target: float
    bracket: Callable


class Extent(enum.Enum):
    """Statistics that need no formula, 0 for a row without keys; one pass finds both. They have no gradient: the largest score may set a scale that cancels."""

    MAXIMUM = 0
    """The largest score."""
    COUNT = 1
    """The number of allowed keys."""


class Weights(Part):
    """Weights given row statistics: ``weight(s, statistics, *blocks)``, elementwise in s; the statistics a tuple of [bq, 1].

    ``statistics`` lists them: a :class:`Sum`, a :class:`Root`, an :class:`Extent`, or an :class:`Exponential` member, whose residual ``log sum_j den_ij`` it
    then is. A Sum and a Root may use those before it. An empty list is an elementwise weight (sigmoid, ReLU). s = 0 with all statistics 0 must give
    finite values. ``vanishes``: at s = -inf weights, summands and all slopes are 0, whatever the statistics, so a masked score is as good as a masked weight.
    ``normalized``: the weights, at least 0 then, are divided by their sum over the row, which the pass over the values finds; a row of zeros stays.
    """

    statistics: tuple = ()
    vanishes: bool = False
    normalized: bool = False

    def weight(self, s, statistics, *blocks):
        raise NotImplementedError


class Exponential(Weights):
    """The signed exponential family: ``w_ij = num(s_ij, r_i)``, ``r_i = log sum_j den(s_ij)``. Folds in one pass, and merges.

    ``shift(s)`` is a safe exponent to subtract (None: zero always does) and ``terms(s, m) -> (num, den)`` obeys
    ``terms(s, m) = e^-m terms(s, 0)``, finite for every m >= shift(s), with den >= 0. Return the same object twice where num is den.
    """

    def shift(self, s, *blocks):
        raise NotImplementedError

    def terms(self, s, m, *blocks):
        raise NotImplementedError

    def sink(self, sizes: Sizes) -> Operand | None:
        """An extra logit in every row's normaliser with no value behind it (axes among batch, head, query), or None."""
        return None

    @property
    def statistics(self):
        return (self,)

    def weight(self, s, statistics, *blocks):
        return self.terms(s, statistics[0], *blocks)[0]


@part
class Softmax(Exponential):
    """``w_ij = e^(s_ij / tau_i) / (e^sink + sum_j e^(s_ij / tau_i))``: the default weights. See :func:`attnx.weights.softmax`."""

    extra: Any = None
    temperature: Any = None

    @property
    def arity(self):
        return 0 if self.temperature is None else 1

    def operands(self, sizes):
        if self.temperature is None:
            return ()
        axes = {0: (), 1: ("query",), 3: ("batch", "query", "head")}[jnp.ndim(self.temperature)]
        return (Operand(self.temperature, axes),)

    def sink(self, sizes):
        return None if self.extra is None else Operand(self.extra, ("head",) * jnp.ndim(self.extra))

    @property
    def vanishes(self):
        return self.temperature is None  # its gradient would meet 0 * inf

    def shift(self, s, *temperature):
        return s / temperature[0].astype(s.dtype) if temperature else s

    def terms(self, s, m, *temperature):
        e = jnp.exp(self.shift(s, *temperature) - m)
        return e, e

    def as_jax_nn(self):
        return {} if self.extra is None and self.temperature is None else None
