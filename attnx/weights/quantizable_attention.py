"""Gated heads: what a head found is multiplied by a gate, which lets it do nothing without extreme scores.

Bondarenko, Nagel, Blankevoort: "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing" (2023, arXiv 2306.12929):

    out_tn = sigmoid(G_n(x_t)) * sum_j softmax_j(s_tj) v_j

with a small predictor G_n of each head's gate, read from the layer's input. Softmax attention can only do nothing by giving its weight to tokens of small value,
for which it needs scores so large that some activations become outliers, and these ruin quantisation by tensor. The paper's other remedy is
:func:`attnx.weights.clipped_softmax`; how to measure either is in :mod:`attnx.analysis`.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from attnx.core import checks
from attnx.nn.attention import Attention

KINDS = ("per_token", "per_head", "unconditional")
PREDICTORS = ("linear", "mlp", "all_heads")


def init_gate(key: Array, features: int, num_heads: int, *, kind: str = "per_token", predictor: str = "linear", hidden_size: int | None = None,
              initial: float = 0.5, fine_tune: bool = False, dtype=jnp.float32) -> dict[str, Array]:
    """Parameters of :func:`gated_attention`.

    Args:
      key: a PRNG key.
      features: D of the layer's input, a multiple of num_heads unless the predictor is "all_heads".
      num_heads: N.
      kind, predictor: as there.
      hidden_size: M of "mlp", by default D / N / 4 (at least 1); the paper's second size is D / N.
      initial: pi, how far gates are open at first, through the last bias logit(pi).
      fine_tune: whether the last kernel is drawn small, N(0, 0.01), so that all gates are pi at first. With ``scale=1 / pi`` a pretrained
        layer then starts as it was.
      dtype: of the arrays.

    Returns:
      "bias" [N]; unless unconditional "kernel" [N, D / N], [N, M] or [D, N] by predictor; for "mlp" also "hidden_kernel" [N, D / N, M] and
      "hidden_bias" [N, M].

    The released code starts only linear predictors at pi; here all do.

    >>> import jax
    >>> {name: x.shape for name, x in init_gate(jax.random.key(0), 32, 4, predictor="mlp").items()}
    {'bias': (4,), 'hidden_kernel': (4, 8, 2), 'hidden_bias': (4, 2), 'kernel': (4, 2)}
    """
    _check_kind(kind, predictor)
    if not 0 < initial < 1:
        raise ValueError(f"initial: expected a number between 0 and 1, got {initial}")
    first, last = jax.random.split(key)
    uniform = lambda key, shape, fan: jax.random.uniform(key, shape, dtype, -(fan**-0.5), fan**-0.5)
    parameters = {"bias": jnp.full(num_heads, math.log(initial / (1 - initial)), dtype)}
    if kind == "unconditional":
        return parameters
    if predictor != "all_heads" and features % num_heads:
        raise ValueError(f"num_heads: expected a divisor of features = {features} for predictor={predictor!r}, got {num_heads}")
    size = features // num_heads
    shape, fan = ((features, num_heads), features) if predictor == "all_heads" else ((num_heads, size), size)
    if predictor == "mlp":
        hidden = hidden_size or max(size // 4, 1)
        parameters |= {"hidden_kernel": uniform(first, (num_heads, size, hidden), size), "hidden_bias": jnp.zeros((num_heads, hidden), dtype)}
        shape, fan = (num_heads, hidden), hidden
    parameters["kernel"] = 0.01 * jax.random.normal(last, shape, dtype) if fine_tune else uniform(last, shape, fan)
    return parameters


def gated_attention(found: Float[Array, "B T N Hv"], x: Float[Array, "B T D"], parameters: Mapping[str, Array], *, kind: str = "per_token",
                    predictor: str = "linear", where: Bool[Array, "B T"] | None = None, scale: float = 1.0) -> Float[Array, "B T N Hv"]:
    """Multiplies what heads found by their gates.

    ::

        out_tn = scale * sigmoid(g_tn) found_tn,        g_tn = G_n(x_t),  or its mean over tokens,  or a constant b_n

    Args:
      found: [B, T, N, Hv], of any attention.
      x: [B, T, D], the input of the layer (not what it found).
      parameters: see :func:`init_gate`.
      kind: "per_token"; "per_head", one gate for all tokens of a sequence, of the mean logit over them (which a causal model must not
        know); or "unconditional", which ignores x.
      predictor: "linear", of the head's own share ``x[n D / N : (n + 1) D / N]``; "mlp", of that with a hidden layer of rectified units; or "all_heads",
        linear of the whole of x.
      where: which tokens the mean of "per_head" is over; all by default, as in the released code, which counts padding too.
      scale: a factor, 1 / pi when fine-tuning.

    Returns:
      [B, T, N, Hv] in the dtype of ``found``.

    Raises:
      ValueError, TypeError: an unknown kind or predictor, or shapes that do not fit, named.

    Cost: O(T D) besides the attention, O(T D N) for "all_heads".

    >>> import jax, jax.numpy as jnp
    >>> found, x = jnp.ones((1, 5, 2, 3)), jnp.zeros((1, 5, 8))
    >>> gated_attention(found, x, init_gate(jax.random.key(0), 8, 2, initial=0.25))[0, 0]
    Array([[0.25, 0.25, 0.25],
           [0.25, 0.25, 0.25]], dtype=float32)
    """
    _check_kind(kind, predictor)
    for name, array in (("found", found), ("x", x)):
        checks.check_real(name, array, ranks=(4,) if name == "found" else (3,))
    if x.shape[:2] != found.shape[:2]:
        raise ValueError(f"x: expected shape [B, T, D] with B, T = {found.shape[:2]} as in found, got {checks.describe(x)}")
    wide = jnp.promote_types(found.dtype, jnp.float32)
    logits = parameters["bias"].astype(wide)
    if kind != "unconditional":
        logits = logits + _predict(x, parameters, predictor, found.shape[2], wide)
    if kind == "per_head":
        count = 1 if where is None else jnp.maximum(jnp.sum(where, axis=1), 1)[:, None, None]
        logits = logits.mean(axis=1, keepdims=True) if where is None else jnp.sum(jnp.where(where[..., None], logits, 0), axis=1, keepdims=True) / count
    return (found * (scale * jax.nn.sigmoid(logits))[..., None]).astype(found.dtype)


def _predict(x, parameters, predictor, heads, wide):
    """Logits [B, T, N] without the last bias."""
    kernel = parameters["kernel"]
    if predictor == "all_heads":
        return jnp.einsum("btd,dn->btn", x, kernel, preferred_element_type=wide)
    if x.shape[2] % heads:
        raise ValueError(f"x: expected a number of features that N = {heads} divides for predictor={predictor!r}, got {checks.describe(x)}")
    own = x.reshape(*x.shape[:2], heads, -1)
    if predictor == "mlp":
        hidden = jnp.einsum("btnh,nhm->btnm", own, parameters["hidden_kernel"], preferred_element_type=wide)
        own = jax.nn.relu(hidden + parameters["hidden_bias"])
    return jnp.einsum("btnh,nh->btn", own, kernel, preferred_element_type=wide)


def _check_kind(kind, predictor):
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    if predictor not in PREDICTORS:
        raise ValueError(f"predictor: expected one of {', '.join(map(repr, PREDICTORS))}, got {predictor!r}")


class HeadGate(nnx.Module):
    """:func:`gated_attention` with its parameters.

    Args:
      features, num_heads, kind, predictor, hidden_size, initial, fine_tune: as in :func:`init_gate`; with ``fine_tune`` outputs are divided by
        ``initial``.
      param_dtype: of the parameters.
      rngs: the generator of initial values.

    >>> import jax.numpy as jnp
    >>> gate = HeadGate(16, 4, fine_tune=True, initial=0.25, rngs=nnx.Rngs(0))
    >>> found = jnp.ones((1, 3, 4, 2))
    >>> bool(jnp.allclose(gate(found, jnp.ones((1, 3, 16))), found, atol=0.1))
    True
    """

    def __init__(self, features: int, num_heads: int, *, kind: str = "per_token", predictor: str = "linear", hidden_size: int | None = None,
                 initial: float = 0.5, fine_tune: bool = False, param_dtype=jnp.float32, rngs: nnx.Rngs):
        parameters = init_gate(rngs.params(), features, num_heads, kind=kind, predictor=predictor, hidden_size=hidden_size, initial=initial,
                               fine_tune=fine_tune, dtype=param_dtype)
        self.parameters = nnx.Dict({name: nnx.Param(x) for name, x in parameters.items()})
        self.kind, self.predictor, self.scale = kind, predictor, 1 / initial if fine_tune else 1.0

    def __call__(self, found: Float[Array, "B T N Hv"], x: Float[Array, "B T D"], where: Bool[Array, "B T"] | None = None) -> Float[Array, "B T N Hv"]:
        """As :func:`gated_attention`."""
        parameters = {name: x[...] for name, x in self.parameters.items()}
        return gated_attention(found, x, parameters, kind=self.kind, predictor=self.predictor, where=where, scale=self.scale)


class GatedAttention(Attention):
    """Multi-head attention whose heads are gated by :class:`HeadGate`, of any mechanism.

    Args:
      features, num_heads, mechanism: as in :class:`attnx.nn.Attention`; so are all other options but ``output_gate``.
      kind, predictor, hidden_size, initial, fine_tune: as in :class:`HeadGate`. Gates "per_head" leave out tokens whose position is -1, and need
        all tokens at once: such a layer has no ``step``.

    >>> import attnx, jax.numpy as jnp
    >>> layer = GatedAttention(32, 4, mechanism=attnx.pairs(mask=attnx.masks.causal()), predictor="mlp", rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 10, 32))).shape
    (1, 10, 32)
    """

    def __init__(self, features: int, num_heads: int, *, mechanism, kind: str = "per_token", predictor: str = "linear", hidden_size: int | None = None,
                 initial: float = 0.5, fine_tune: bool = False, param_dtype=jnp.float32, rngs: nnx.Rngs, **options):
        super().__init__(features, num_heads, mechanism=mechanism, param_dtype=param_dtype, rngs=rngs, **options)
        self.head_gate = HeadGate(features, num_heads, kind=kind, predictor=predictor, hidden_size=hidden_size, initial=initial, fine_tune=fine_tune,
                                  param_dtype=param_dtype, rngs=rngs)

    def init_state(self, batch, max_length, **options):
        if self.head_gate.kind == "per_head":
            raise NotImplementedError("kind='per_head': the gate is a mean over all tokens, which are not known step by step; use 'per_token'")
        return super().init_state(batch, max_length, **options)

    def _gated(self, out, x, positions):
        where = None if positions is None else jnp.broadcast_to(positions >= 0, x.shape[:2])
        return super()._gated(self.head_gate(out, x, where), x, positions)
