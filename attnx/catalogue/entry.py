"""What an entry of the catalogue says, and how its examples are called.

An :class:`Example` describes a call of a mechanism - its inputs by their axes, the patterns and executions that it serves - so completely that
contracts, benchmarks and documentation can make the call themselves, at any size.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PATTERNS = ("noncausal self", "causal self", "noncausal cross", "causal cross")
IMPLEMENTATIONS = ("reference", "blockwise", "pallas", "ring", "gathered", "parallel", "chunked", "recurrent")

SIZES = {"b": 2, "t": 13, "s": 11, "n": 4, "k": 2, "h": 8, "v": 6, "d": 16}
"""Sizes of the axes where neither the example nor the caller says otherwise: batch, tokens, keys, heads, key-value heads, head size, size of values, features."""


class Case:
    """One way of calling an example.

    Args:
      pattern: one of :data:`PATTERNS`.
      execution: one of the example's; None leaves the choice to the mechanism.
    """

    def __init__(self, pattern: str = PATTERNS[0], execution: str | None = None):
        self.pattern, self.execution = pattern, execution
        self.asked = False
        """Whether the call has looked at ``causal``: a call that never asks cannot be asked for the other kind."""

    @property
    def causal(self) -> bool:
        """Whether a query may see nothing later than itself."""
        self.asked = True
        return self.pattern.startswith("causal")

    @property
    def cross(self) -> bool:
        """Whether keys are other tokens than queries."""
        return self.pattern.endswith("cross")

    @property
    def implementation(self) -> str | None:
        """The execution as an ``implementation=`` argument; None for those that are calls of their own, such as 'step'."""
        return self.execution if self.execution in IMPLEMENTATIONS else None

    @property
    def block_sizes(self) -> tuple[int, int] | None:
        """Tiles so small that the example has several, in the executions that have tiles of any size."""
        return (4, 4) if self.execution in ("blockwise", "ring") else None


class Input(NamedTuple):
    """An array of an example: its axes, one letter each, and what makes it of standard normal numbers of that shape.

    Letters have the meanings and sizes of :data:`SIZES`: 'b' batch, 't' tokens of the output, 's' tokens attended to (the same as t in self-attention);
    any other letter is the example's own.
    """

    axes: str
    make: Callable[[np.ndarray], jax.Array | np.ndarray] = lambda normal: normal


SEEN = Input("bs", lambda normal: normal > -1)
"""Which keys may be seen."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A call of a mechanism.

    Attributes:
      call: ``call(case, **inputs)``, a pure function to the output array; with ``case.execution == 'step'`` it reads token by token.
      inputs: by name: the axes of an array, ``"btnh"``; or an :class:`Input`; or a function of a PRNG key to a pytree, such as parameters.
      output: the axes of the output.
      patterns: those of :data:`PATTERNS` that the call serves; empty for what has no queries and keys.
      executions: the ways of computing it that agree to rounding, the definition first: 'reference', 'blockwise', 'pallas', 'ring', 'gathered', 'chunked',
        'recurrent', 'step' ... .
      mask: the name of the boolean input, [b, s], [b, t] or along an axis of the example's own, that says what may be seen.
      empty: what is found where nothing may be seen: 'zero', or 'finite' (whatever the mechanism says, but no NaN).
      local: whether a token sees only tokens near it, so that the ends of a sequence need not meet.
      linear: axes in which the cost is linear, for the benchmarks ("t").
      sizes: of axes, where :data:`SIZES` does not say or does not fit.
      lengths: other numbers of tokens to be tried; includes 1 unless the mechanism cannot.
      name: to tell it from others of the entry.
    """

    call: Callable[..., Any]
    inputs: Mapping[str, str | Input | Callable]
    output: str
    patterns: tuple[str, ...] = ()
    executions: tuple[str, ...] = ("reference",)
    mask: str | None = None
    empty: str = "zero"
    local: bool = False
    linear: str = ""
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    lengths: tuple[int, ...] = (1, 6)
    name: str = ""

    def axes(self, name: str) -> str:
        """The axes of an input; empty for a pytree."""
        given = self.inputs[name]
        return given if isinstance(given, str) else given.axes if isinstance(given, Input) else ""

    def arrays(self, pattern: str = PATTERNS[0], *, seed: int = 0, dtype: Any = jnp.float32, **sizes: int) -> dict[str, Any]:
        """Inputs of the call.

        Args:
          pattern: in a self-attention the sizes of 's' and 't' are one.
          seed: of the numbers.
          dtype: of the real arrays.
          **sizes: of axes, by letter.
        """
        # NumPy's numbers, for it compiles nothing.
        return self._inputs(pattern, seed, dtype, sizes, lambda index, shape: np.random.default_rng((seed, index)).standard_normal(shape))

    def shapes(self, pattern: str = PATTERNS[0], *, dtype: Any = jnp.float32, **sizes: int) -> dict[str, Any]:
        """Shapes and dtypes of :meth:`arrays`, of any size: nothing is computed."""
        return jax.eval_shape(lambda: self._inputs(pattern, 0, dtype, sizes, lambda index, shape: jnp.zeros(shape, float)))

    def _inputs(self, pattern, seed, dtype, sizes, normal):
        sizes = {**SIZES, **self.sizes, **sizes}
        if pattern.endswith("self"):
            sizes["s"] = sizes["t"]
        made = {}
        for index, (name, given) in enumerate(self.inputs.items()):
            if isinstance(given, str | Input):
                given = Input(given) if isinstance(given, str) else given
                made[name] = given.make(normal(index, tuple(sizes[axis] for axis in given.axes)))
            else:
                made[name] = given(jax.random.fold_in(jax.random.key(seed), index))
        return jax.tree.map(lambda x: jnp.asarray(x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x), made)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A finished row of the catalogue.

    Attributes:
      id: of the paper, see :func:`attnx.catalogue.papers`.
      objects: the functions and classes that are the paper's, the main one first.
      equation: what it computes, in a few lines of plain text.
      claim: what the paper says of it that is put to a test here, in a sentence.
      examples: calls that show its use, and that contracts and benchmarks make.
      notes: what a user should know: reconstructed, approximate, different from released code.
      causal_layer: ``(features, num_heads, *, length, rngs) -> module``, its sublayer for a decoder that is trained on ``length`` tokens: causal, and called like
        :class:`attnx.nn.Attention`, with ``init_state`` and ``step``. None where the paper has no such thing.
    """

    id: str
    objects: tuple[Any, ...]
    equation: str
    claim: str
    examples: tuple[Example, ...] = ()
    notes: str = ""
    causal_layer: Callable[..., Any] | None = None


def stream(step: Callable, state: Any, *arrays: jax.Array) -> jax.Array:
    """Reads arrays [B, T, ...] token by token: ``state, out = step(state, *tokens)`` with tokens [B, 1, ...]; returns the outputs [B, T, ...].

    >>> import jax.numpy as jnp
    >>> total = lambda state, x: (state + x, state + x)
    >>> stream(total, jnp.zeros((1, 1)), jnp.ones((1, 3)))
    Array([[1., 2., 3.]], dtype=float32)
    """
    tokens = tuple(jnp.moveaxis(x, 1, 0)[:, :, None] for x in arrays)
    _, out = jax.lax.scan(lambda state, token: step(state, *token), state, tokens)
    return jnp.moveaxis(out[:, :, 0], 0, 1)
