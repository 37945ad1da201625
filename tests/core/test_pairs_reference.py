"""The materialised definition against formulas written out independently, and against jax.nn."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from agreement import arrays, assert_agree, reference

import attnx
from attnx import masks, scores, weights

pytestmark = pytest.mark.usefixtures("x64")
CAUSAL = np.tril(np.ones((13, 11), bool))


@jax.jit
def written_out(query, key, value, cotangent):
    """Causal softmax attention and everything that :func:`agreement.evaluate` derives from it."""
    def loss(query, key, value):
        s = oracles.dot_products(query, key)
        out = oracles.attend(oracles.softmax, query, key, value, CAUSAL)
        r = oracles.log_normaliser(s, CAUSAL).transpose(0, 2, 1)
        return jnp.vdot(out, cotangent) + jnp.sum(jnp.sin(r) * cotangent.mean(-1)), (out, r)

    gradients, (out, r) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(query, key, value)
    return {"out": out, "r": r, "gradients": list(gradients)}


def test_softmax_with_residual():
    """Output, log-normaliser and the gradients of a loss of both."""
    data = arrays()
    assert_agree(reference(*data, mask=masks.causal()), written_out(*data), 1e-13)


def test_jax_nn():
    """jax.nn computes its softmax in float32 whatever the inputs, hence the tolerance."""
    q, k, v, _ = arrays(value_size=5)
    bias = jax.random.normal(jax.random.key(1), (4, 13, 11))
    got = jax.jit(lambda: attnx.attention(q, k, v, scores=scores.bias(bias), mask=masks.causal(), implementation="reference"))()
    assert_agree(got, jax.jit(lambda: jax.nn.dot_product_attention(q, k, v, bias=bias[None], is_causal=True))(), 1e-6)


def test_scale_and_order_of_scores():
    """The scale comes first, then the scores in the order given."""
    q, k, v, _ = arrays()
    bias = jax.random.normal(jax.random.key(1), (13, 11))
    capped = lambda s: 2 * jnp.tanh(s / 2)
    orders = (((scores.bias(bias), scores.soft_cap(2.0)), lambda s: capped(s + bias)),
              ((scores.soft_cap(2.0), scores.bias(bias)), lambda s: capped(s) + bias))
    got = jax.jit(lambda: [attnx.attention(q, k, v, scores=parts, scale=0.3, implementation="reference") for parts, _ in orders])()
    assert_agree(got, jax.jit(lambda: [oracles.attend(oracles.softmax, q, k, v, change=change, scale=0.3) for _, change in orders])(), 1e-13)


def test_forward_mode():
    """Tangents through scores, a root statistic and a sink equal those of the written-out formulas."""
    q, k, v, _ = arrays(queries=5, keys=6)
    tangents = tuple(arrays(queries=5, keys=6, seed=1)[:3])
    for part, oracle in ((weights.entmax15(), oracles.entmax15), (weights.softmax(sink=0.5), lambda s, ok: oracles.softmax(s, ok, sink=0.5))):
        run = lambda f: jax.jit(lambda: jax.jvp(f, (q, k, v), tangents))()
        got = run(lambda q, k, v: attnx.attention(q, k, v, weights=part, implementation="reference"))
        assert_agree(got, run(lambda q, k, v: oracles.attend(oracle, q, k, v)))


def test_second_derivative():
    """A Hessian-vector product, forward over reverse, equals that of the written-out formula."""
    q, k, v, cotangent = arrays(queries=5, keys=6)
    tangents = tuple(arrays(queries=5, keys=6, seed=1)[:3])

    def product(attend):
        loss = lambda q, k, v: jnp.vdot(jnp.sin(attend(q, k, v)), cotangent)
        return jax.jit(lambda: jax.jvp(jax.grad(loss, argnums=(0, 1, 2)), (q, k, v), tangents))()

    got = product(lambda q, k, v: attnx.attention(q, k, v, weights=weights.entmax15(), implementation="reference"))
    assert_agree(got, product(lambda q, k, v: oracles.attend(oracles.entmax15, q, k, v)), 1e-10)


def test_hooks():
    """Hooks see and change the scores and the weights, with positions that broadcast against them."""
    q, k, v, _ = arrays(queries=5, keys=6)

    @jax.jit
    def run():
        seen = {}

        def silence(value, at):
            seen["scores"] = value
            assert jnp.broadcast_shapes(value.shape, *(jnp.shape(x) for x in at)) == (2, 4, 5, 6)
            return jnp.where(at.head == 1, 0.0, value)

        def halve(value, at):
            seen["weights"] = value
            return jnp.where(at.key == 0, 0.5 * value, value)

        out = attnx.attention(q, k, v, hooks={"scores": silence, "weights": halve})
        return seen["scores"], seen["weights"], out

    @jax.jit
    def by_hand():
        s = oracles.dot_products(q, k)
        w = oracles.softmax(s.at[:, 1].set(0), jnp.ones((), bool))
        return s, w, jnp.einsum("bnts,bsnv->btnv", w.at[..., 0].multiply(0.5), jnp.repeat(v, 2, axis=2))

    assert_agree(run(), by_hand(), 1e-13)
