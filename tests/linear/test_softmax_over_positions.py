"""Softmax over positions: against weights written out, at large offsets, with documents, padding, carried states, and over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from attnx import linear

B, T, N, K, L, V = 2, 11, 4, 2, 5, 3
attend = jax.jit(linear.position_softmax_attention, static_argnames=("is_causal", "implementation", "chunk_size", "return_state"))


def inputs(seed=0, dtype=jnp.float64):
    """Weights that sum to 1, logits, values."""
    w, k, v = (jax.random.normal(key, shape, dtype)
               for key, shape in zip(jax.random.split(jax.random.key(seed), 3), ((B, T, N, L), (B, T, K, L), (B, T, K, V))))
    return jax.nn.softmax(w, -1), 2 * k, v


def pair_weights(w, k, allowed):
    """[B, N, T, S] written out: the mixture of each latent's softmax over the allowed positions [B, T, S] of a query."""
    k = jnp.repeat(k, N // K, axis=2)
    allowed = allowed[:, :, :, None, None]
    s = jnp.where(allowed, k[:, None], -1e30)
    e = jnp.where(allowed, jnp.exp(s - s.max(2, keepdims=True)), 0)
    total = e.sum(2, keepdims=True)
    return jnp.einsum("btnl,btsnl->bnts", w, e / jnp.where(total > 0, total, 1))


def dense(w, k, v, allowed):
    return jnp.einsum("bnts,bsnv->btnv", pair_weights(w, k, allowed), jnp.repeat(v, N // K, axis=2))


CAUSAL = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))


@pytest.mark.parametrize("offset", [-80.0, 0.0, 80.0])
@pytest.mark.usefixtures("x64")
def test_forms(offset):
    """All forms are the weights written out, which sum to 1, whatever is added to the logits of a latent."""
    w, k, v = inputs()
    ones = pair_weights(w, k, CAUSAL).sum(-1)
    np.testing.assert_allclose(ones, 1, atol=1e-12)
    expected = dense(w, k, v, CAUSAL)
    shifted = k + offset * jnp.linspace(-1, 1, L)
    for form in ("parallel", "chunked", "recurrent"):
        np.testing.assert_allclose(attend(w, shifted, v, implementation=form, chunk_size=4 if form == "chunked" else None), expected, atol=1e-12)
    whole = dense(w, k, v, jnp.ones((B, T, T), bool))
    np.testing.assert_allclose(attend(w, shifted, v, is_causal=False), whole, atol=1e-12)
    np.testing.assert_allclose(expected[:, -1], whole[:, -1], atol=1e-12)


def test_offsets_in_float32():
    """In float32 an offset of 80 costs its own rounding, not more."""
    w, k, v = (x.astype(jnp.float32) for x in inputs(dtype=jnp.float32))
    expected = dense(w, k, v, CAUSAL)
    for offset in (-80, 80):
        np.testing.assert_allclose(attend(w, k + offset, v), expected, atol=3e-5)
    rising = k + 100 * jnp.arange(T, dtype=jnp.float32)[:, None, None]  # each token outweighs all before
    np.testing.assert_allclose(attend(w, rising, v), jnp.repeat(v, N // K, 2), atol=1e-5)


@pytest.mark.usefixtures("x64")
def test_gradients():
    """Those of the weights written out, with documents and padding."""
    w, k, v = inputs()
    ids = jnp.stack([jnp.array([0, 0, 0, -1, 0, 1, 1, 1, -1, 2, 2]), jnp.array([-1, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5])])
    allowed = CAUSAL & (ids[:, :, None] == ids[:, None]) & (ids >= 0)[:, :, None]
    run = lambda f: jax.jit(jax.value_and_grad(lambda *args: jnp.sum(jnp.sin(f(*args))), (0, 1, 2)))(w, k, v)
    got, expected = run(lambda *args: attend(*args, segment_ids=ids, chunk_size=4)), run(lambda *args: dense(*args, allowed))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), got, expected)


def test_padding():
    """Logits of -inf and positions of -1 are padding; where all is, zeros with finite gradients."""
    w, k, v = inputs(dtype=jnp.float32)
    seen = jnp.arange(T) % 3 != 1
    hidden = jnp.where(seen[:, None, None], k, -jnp.inf)
    positions = jnp.where(seen, jnp.arange(T), -1)
    for is_causal, allowed in ((True, CAUSAL), (False, jnp.ones_like(CAUSAL))):
        expected = dense(w, k, v, allowed & seen)
        np.testing.assert_allclose(attend(w, hidden, v, is_causal=is_causal), expected, atol=1e-5)
        np.testing.assert_allclose(attend(w, k, v, is_causal=is_causal, key_positions=positions), expected, atol=1e-5)
        out, slopes = jax.value_and_grad(lambda k: jnp.sum(attend(w, k, v, is_causal=is_causal) ** 2))(jnp.full_like(k, -jnp.inf))
        assert out == 0 and jnp.all(slopes == 0)


def test_carried_state():
    """Pieces and single tokens continue one another, also where nothing has been seen yet."""
    w, k, v = inputs(dtype=jnp.float32)
    k = k.at[:, :2].set(-jnp.inf)
    whole, last = attend(w, k, v, return_state=True)
    state, outs = linear.position_softmax_init(B, K, L, V), []
    for begin, end in ((0, 2), (2, 7), (7, 8), (8, T)):
        out, state = attend(*(x[:, begin:end] for x in (w, k, v)), initial_state=state, return_state=True)
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), whole, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, last)


def test_over_devices():
    """A sharded sequence, whose first shard holds padding alone in one row."""
    w, k, v = (x[:, :10] for x in inputs(dtype=jnp.float32))
    ids = jnp.stack([jnp.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1]), jnp.array([-1, -1, -1, -1, -1, 3, 3, 3, 4, 4])])
    mesh = jax.make_mesh((2,), ("sequence",), axis_types=(AxisType.Auto,))
    tokens, whole = PartitionSpec(None, "sequence"), PartitionSpec()

    def run(w, k, v, ids):
        out, state = linear.position_softmax_attention(w, k, v, segment_ids=ids, return_state=True, axis_name="sequence")
        return out, state, linear.position_softmax_attention(w, k, v, is_causal=False, axis_name="sequence")

    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=tokens, out_specs=(tokens, whole, tokens), check_vma=False))
    out, state, both = sharded(w, k, v, ids)
    expected, last = attend(w, k, v, segment_ids=ids, return_state=True)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, last)
    np.testing.assert_allclose(both, attend(w, k, v, is_causal=False), atol=1e-5)


def test_errors():
    w, k, v = inputs(dtype=jnp.float32)
    with pytest.raises(ValueError, match="segment_ids: expected none with is_causal=False"):
        linear.position_softmax_attention(w, k, v, is_causal=False, segment_ids=jnp.zeros((B, T), int))
    with pytest.raises(ValueError, match="logits: expected the 10 tokens"):
        linear.position_softmax_attention(w[:, 1:], k, v)
    with pytest.raises(ValueError, match="initial_state.mean: expected shape"):
        linear.position_softmax_attention(w, k, v, initial_state=linear.position_softmax_init(B, K, L, V + 1))
    with pytest.raises(NotImplementedError, match="no streaming form"):
        linear.position_softmax(is_causal=False).init(1, 1, 1, 1, 1, jnp.float32)
