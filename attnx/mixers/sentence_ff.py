"""Shallow feed-forward networks over whole sentences, in the place of attention layers that they imitate.

Bozic, Dordevic, Coppola, Thommes, Singh: "Rethinking Attention: Exploring Shallow Feed-Forward Neural Networks as an Alternative to Attention Layers in Transformers"
(AAAI 2024, arXiv 2311.10642). The sentence, padded with zeros to a fixed length L, is one vector of W = L D numbers:

    F(u) = LayerNorm(leaky_relu(LayerNorm(u) W_1 + b_1)) W_2 + b_2,           out = F(flatten(x_1 .. x_L)) as [L, D], zero at padding

Token p has place p, so nothing is equivariant, and no sentence is longer than L. In a decoder F maps the sentence with all tokens after t zeroed to the output at t;
in place of attention to a context, the token followed by the context's L tokens. The first layer is linear but for two statistics, so with

    c_i = (x_i * gamma_i) W_1,i,     s_i = sum of x_i,     q_i = sum of x_i^2                                             gamma: scale of the first norm

the hidden layer at t follows from the sums of c, s and q over i <= t: all outputs of a decoder cost no more than one sentence, and a stream remembers three sums.
Networks are trained to imitate, see :func:`attnx.mixers.distill_attention`; from scratch they fail.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnx.core import checks
from attnx.nn.common import check_sequence, refuse

LEVELS = ("ALR", "ALRR", "ALSR", "ELR")
_SHARES = {"XS": 256, "S": 128, "M": 8, "L": 2}
_HEAD_SHARES = {"XS": 32, "S": 16, "M": 8, "L": 4}


def hidden_size(level: str, size: Literal["XS", "S", "M", "L"], length: int, features: int) -> int:
    """How wide the paper makes the hidden layer: a fixed share of W = ``length * features``, at least 1.

    Args:
      level: 'ALR' (attention), 'ALRR' (with its norm and residual), 'ELR' (a whole layer of the encoder): W / 256, 128, 8, 2; 'ALSR' (each head by a network of its
        own): W / 32, 16, 8, 4.
      size: 'XS', 'S', 'M' or 'L'.
      length, features: L and D.

    >>> hidden_size("ALR", "S", 50, 128), hidden_size("ALSR", "L", 50, 128)
    (50, 1600)
    """
    if level not in LEVELS or size not in _SHARES:
        raise ValueError(f"level, size: expected one of {LEVELS} and one of {tuple(_SHARES)}, got {level!r} and {size!r}")
    return max(length * features // (_HEAD_SHARES if level == "ALSR" else _SHARES)[size], 1)


class _Network(nnx.Module):
    """F, of ``slots`` places of D numbers each."""

    def __init__(self, slots, features, hidden, outputs, param_dtype, rngs):
        width = slots * features
        options = dict(param_dtype=param_dtype, rngs=rngs)
        self.slots, self.features = slots, features
        self.norm, self.expand = nnx.LayerNorm(width, epsilon=1e-5, **options), nnx.Linear(width, hidden, **options)
        self.hidden_norm, self.project = nnx.LayerNorm(hidden, epsilon=1e-5, **options), nnx.Linear(hidden, outputs, **options)

    def __call__(self, x):
        """Sentences [..., slots, D] to [..., outputs]: the definition."""
        return self._second(self.expand(self.norm(x.reshape(*x.shape[:-2], -1))), x.dtype)

    def summands(self, x, slots):
        """What tokens [B, t, D] in these slots [t] add to the three sums: [B, t, hidden] and [B, t, 2], at least float32."""
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        scale, kernel = (p.reshape(self.slots, self.features, -1).at[slots].get(mode="fill", fill_value=0) for p in (self.norm.scale[...], self.expand.kernel[...]))
        return jnp.einsum("btd,tdh->bth", x, (scale * kernel).astype(x.dtype)), jnp.stack([x.sum(-1), (x * x).sum(-1)], axis=-1)

    def finish(self, total, moments, dtype):
        """Outputs [..., outputs] from the sums of all summands: [..., hidden] and [..., 2]."""
        width = self.slots * self.features
        mean, square = moments[..., :1] / width, moments[..., 1:] / width
        scale, offset, kernel = (p[...].astype(total.dtype) for p in (self.norm.scale, self.norm.bias, self.expand.kernel))
        normal = (total - mean * (scale @ kernel)) * jax.lax.rsqrt(jnp.maximum(square - mean**2, 0) + self.norm.epsilon)
        return self._second(normal + offset @ kernel + self.expand.bias[...].astype(total.dtype), dtype)

    def _second(self, hidden, dtype):
        return self.project(self.hidden_norm(jax.nn.leaky_relu(hidden, 0.01))).astype(dtype)


def _placed(name, x, positions, length):
    """Tokens [B, T, D] in the places of their positions, [B, L, D]; zeros elsewhere."""
    if positions is None:
        if x.shape[1] > length:
            raise ValueError(f"{name}: expected at most {length} tokens, which the network was made for, got {checks.describe(x)}")
        return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0)))
    return jnp.zeros((x.shape[0], length, x.shape[2]), x.dtype).at[_indices(name, x, positions, length)].set(x, mode="drop")


def _read(name, out, x, positions):
    """Outputs [B, L, ...] of the tokens x; zeros where these are padding."""
    return out[:, :x.shape[1]] if positions is None else out.at[_indices(name, x, positions, out.shape[1])].get(mode="fill", fill_value=0)


def _indices(name, x, positions, length):
    positions = checks.check_positions(f"{name} positions", positions, *x.shape[:2])
    return jnp.arange(x.shape[0])[:, None], jnp.broadcast_to(jnp.where(positions < 0, length, positions), x.shape[:2])


def _refuse(**given):
    refuse("a network of whole sentences reads one sentence and has no scores", **given)


class SentenceFF(nnx.Module):
    """F from a sentence to all its outputs, for encoders: ALR, ALRR and ELR. Called like :class:`attnx.nn.Attention` or a block.

    Args:
      length: L, the most tokens of a sentence.
      features: D.
      hidden: size of the hidden layer, see :func:`hidden_size`.
      outputs: numbers a token, D by default.
      param_dtype: of the parameters, 2 W + W (hidden + 1) + ... = O(L D hidden) many.
      rngs: the generator of initial values.

    Cost: O(L D hidden), whatever the sentence.

    >>> network = SentenceFF(6, 4, hidden_size("ALR", "L", 6, 4), rngs=nnx.Rngs(0))
    >>> x = jnp.ones((1, 3, 4))
    >>> bool((network(x, positions=jnp.array([0, 1, -1]))[:, 2] == 0).all())
    True
    """

    def __init__(self, length: int, features: int, hidden: int, outputs: int | None = None, *, param_dtype=jnp.float32, rngs: nnx.Rngs):
        self.length, self.features = checks.check_integer("length", length, least=1), features
        self.network = _Network(length, features, hidden, length * (outputs or features), param_dtype, rngs)

    def __call__(self, x: Float[Array, "B T D"], context=None, *, positions: Int[Array, "*B T"] | None = None, context_positions=None, segment_ids=None,
                 dropout_key=None, hooks=None, layer=0) -> Float[Array, "B T E"]:
        """[B, T, D] to [B, T, outputs].

        Args:
          x: [B, T, D], T at most L.
          positions: int32 [T] or [B, T], the tokens' places, below L; -1 is padding, which counts as zeros and whose output is zero. 0, 1, 2, ... by default.
          context, context_positions, segment_ids, hooks: None.
          dropout_key, layer: not used.
        """
        check_sequence("x", x, self.features)
        _refuse(context=context, segment_ids=segment_ids, hooks=hooks)
        out = self.network(_placed("x", x, positions, self.length))
        return _read("x", out.reshape(x.shape[0], self.length, -1), x, positions)

    def init_state(self, batch: int, max_length: int, **options):
        """Raises NotImplementedError: every output depends on the whole sentence."""
        raise NotImplementedError("a network from whole sentences has no streaming form; CausalSentenceFF has")


class SentenceState(NamedTuple):
    """What a network remembers: the position of the next token and the sums of c [B, hidden] and of s and q [B, 2]; constant in size."""

    position: Int[Array, ""]
    total: Float[Array, "B hidden"]
    moments: Float[Array, "B 2"]


class CausalSentenceFF(nnx.Module):
    """F from the sentence so far to the output at its last token, for a decoder's self-attention. Called like :class:`attnx.nn.Attention`.

    Args:
      length, features, hidden, outputs, param_dtype, rngs: as in :class:`SentenceFF`.
      implementation: 'reference', which reads T copies of the sentence, each with later tokens zeroed, O(T L D hidden); None by running sums, O(T D hidden).

    >>> network = CausalSentenceFF(6, 4, 3, rngs=nnx.Rngs(0))
    >>> x = jax.random.normal(jax.random.key(0), (1, 6, 4))
    >>> state, first = network.step(network.init_state(1, 6), x[:, :4])
    >>> state, last = network.step(state, x[:, 4:])
    >>> bool(jnp.allclose(jnp.concatenate([first, last], axis=1), network(x), atol=1e-5))
    True
    """

    def __init__(self, length: int, features: int, hidden: int, outputs: int | None = None, *, implementation: str | None = None, param_dtype=jnp.float32,
                 rngs: nnx.Rngs):
        checks.check_choice("implementation", implementation, ("reference",))
        self.length, self.features, self.implementation = checks.check_integer("length", length, least=1), features, implementation
        self.network = _Network(length, features, hidden, outputs or features, param_dtype, rngs)

    @property
    def reach(self) -> int:
        """The most tokens it reads."""
        return self.length

    def __call__(self, x: Float[Array, "B T D"], *, positions: Int[Array, "*B T"] | None = None, segment_ids=None, dropout_key=None, hooks=None,
                 layer=0) -> Float[Array, "B T E"]:
        """[B, T, D] to [B, T, outputs]; arguments as in :class:`SentenceFF`. Later are tokens of later positions."""
        check_sequence("x", x, self.features)
        _refuse(segment_ids=segment_ids, hooks=hooks)
        placed, slots = _placed("x", x, positions, self.length), jnp.arange(self.length)
        if self.implementation == "reference":
            out = self.network(jnp.where((slots <= slots[:, None])[..., None], placed[:, None], 0))
        else:
            out = self.network.finish(*(jnp.cumsum(part, axis=1) for part in self.network.summands(placed, slots)), x.dtype)
        return _read("x", out, x, positions)

    def init_state(self, batch: int, max_length: int, *, dtype=None) -> SentenceState:
        """The state before the first token."""
        checks.check_integer("max_length", max_length, least=0, most=self.length)
        return _empty(self.network, batch, dtype)

    def step(self, state: SentenceState, x: Float[Array, "B t D"], *, hooks=None, layer=0) -> tuple[SentenceState, Float[Array, "B t E"]]:
        """The next t tokens: ``(state, [B, t, outputs])``."""
        check_sequence("x", x, self.features)
        _refuse(hooks=hooks)
        parts = self.network.summands(x, state.position + jnp.arange(x.shape[1]))
        sums = [before[:, None].astype(part.dtype) + jnp.cumsum(part, axis=1) for before, part in zip(state[1:], parts)]
        after = SentenceState(state.position + x.shape[1], *(part[:, -1].astype(before.dtype) for before, part in zip(state[1:], sums)))
        return after, self.network.finish(*sums, x.dtype)


def _empty(network, batch, dtype):
    wide = jnp.promote_types(dtype or jnp.float32, jnp.float32)
    return SentenceState(jnp.zeros((), jnp.int32), jnp.zeros((batch, network.expand.kernel.shape[1]), wide), jnp.zeros((batch, 2), wide))


class CrossSentenceState(NamedTuple):
    """What a network remembers of a context: the position of the next token, the context's share of the sums as in :class:`SentenceState`, and whether it has a token."""

    position: Int[Array, ""]
    total: Float[Array, "B hidden"]
    moments: Float[Array, "B 2"]
    real: Bool[Array, " B"]


class CrossSentenceFF(nnx.Module):
    """F from a token and the sentence that it attends to, to the token's output, for a decoder's attention to an encoder. Called like :class:`attnx.nn.Attention`.

    Args:
      length: L, the most tokens of the context.
      features: D, of tokens and context.
      hidden, outputs, implementation, param_dtype, rngs: as in :class:`CausalSentenceFF`; W is (1 + L) D here.

    >>> network = CrossSentenceFF(6, 4, 3, rngs=nnx.Rngs(0))
    >>> network(jnp.ones((1, 2, 4)), jnp.ones((1, 5, 4))).shape
    (1, 2, 4)
    """

    def __init__(self, length: int, features: int, hidden: int, outputs: int | None = None, *, implementation: str | None = None, param_dtype=jnp.float32,
                 rngs: nnx.Rngs):
        checks.check_choice("implementation", implementation, ("reference",))
        self.length, self.features, self.implementation = checks.check_integer("length", length, least=1), features, implementation
        self.network = _Network(1 + length, features, hidden, outputs or features, param_dtype, rngs)

    def __call__(self, x: Float[Array, "B T D"], context: Float[Array, "B S D"], *, positions: Int[Array, "*B T"] | None = None,
                 context_positions: Int[Array, "*B S"] | None = None, dropout_key=None, hooks=None, layer=0) -> Float[Array, "B T E"]:
        """[B, T, D] to [B, T, outputs]; outputs are zero where x or the whole context is padding (positions of -1)."""
        check_sequence("x", x, self.features)
        _refuse(hooks=hooks)
        real = self._real(context, context_positions)[:, None]
        if positions is not None:
            real &= jnp.broadcast_to(positions >= 0, x.shape[:2])
        if self.implementation == "reference":
            placed = self._placed(context, context_positions)
            out = self.network(jnp.concatenate([x[:, :, None], jnp.broadcast_to(placed[:, None], (*x.shape[:2], *placed.shape[1:]))], axis=2))
        else:
            out = self._read(self._sums(context, context_positions), x)
        return jnp.where(real[..., None], out, 0)

    def init_state(self, batch: int, max_length: int, *, context: Float[Array, "B S D"], context_positions: Int[Array, "*B S"] | None = None, dtype=None
                   ) -> CrossSentenceState:
        """The context's share of the sums, made once."""
        return CrossSentenceState(jnp.zeros((), jnp.int32), *self._sums(context, context_positions), self._real(context, context_positions))

    def step(self, state: CrossSentenceState, x: Float[Array, "B t D"], *, hooks=None, layer=0) -> tuple[CrossSentenceState, Float[Array, "B t E"]]:
        """The next t tokens: ``(state, [B, t, outputs])``."""
        check_sequence("x", x, self.features)
        _refuse(hooks=hooks)
        out = self._read((state.total, state.moments), x)
        return state._replace(position=state.position + x.shape[1]), jnp.where(state.real[:, None, None], out, 0)

    def _real(self, context, context_positions):
        """Which contexts hold a token, [B]."""
        places = jnp.zeros(context.shape[:2], jnp.int32) if context_positions is None else jnp.broadcast_to(context_positions, context.shape[:2])
        return (places >= 0).any(axis=1)

    def _placed(self, context, context_positions):
        check_sequence("context", context, self.features)
        return _placed("context", context, context_positions, self.length)

    def _sums(self, context, context_positions):
        return [part.sum(axis=1) for part in self.network.summands(self._placed(context, context_positions), 1 + jnp.arange(self.length))]

    def _read(self, sums, x):
        batch, length, features = x.shape
        own = [part.reshape(batch, length, -1) for part in self.network.summands(x.reshape(-1, 1, features), jnp.zeros(1, jnp.int32))]
        return self.network.finish(*(part[:, None] + token for part, token in zip(sums, own)), x.dtype)


class HeadwiseFF(nnx.Module):
    """A network for each head, from a sentence to what the head found: ALSR. What mixes heads stays that of the layer it imitates.

    Args:
      networks: a :class:`SentenceFF` with ``outputs`` of the head's size for each head.

    >>> networks = [SentenceFF(6, 4, 3, 2, rngs=nnx.Rngs(n)) for n in range(2)]
    >>> HeadwiseFF(networks)(jnp.ones((1, 5, 4))).shape
    (1, 5, 2, 2)
    """

    def __init__(self, networks: Sequence[SentenceFF]):
        self.networks = nnx.List(networks)

    def __call__(self, x: Float[Array, "B T D"], **inputs) -> Float[Array, "B T N H"]:
        """[B, T, D] to [B, T, N, H]; arguments as of :class:`SentenceFF`."""
        return jnp.stack([network(x, **inputs) for network in self.networks], axis=2)
