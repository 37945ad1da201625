"""Lightning attention: its forms at the lengths where tiles end, its limits, an oracle, and the layer around it."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import linear
from attnx.core.linear import init

B, N, H, HV = 1, 2, 8, 6
SLOPES = jnp.array([0.5, 0.03])
attend = jax.jit(linear.lightning_attention, static_argnames=("implementation", "chunk_size", "return_state"))


def inputs(length, dtype=jnp.float32, seed=0):
    return [jax.random.normal(jax.random.key(seed + i), (B, length, N, size), dtype) for i, size in enumerate((H, H, HV))]


def naive(query, key, value, slopes=SLOPES):
    """The masked product."""
    t = jnp.arange(query.shape[1])
    between = (t[:, None] - t)[None, None]
    decay = jnp.where(between >= 0, jnp.exp(-slopes[:, None, None] * jnp.maximum(between, 0)), 0)
    return jnp.einsum("bnts,bsnv->btnv", jnp.einsum("btnh,bsnh->bnts", query, key) * decay, value)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 300])
def test_forms_at_the_ends_of_tiles(length):
    args = inputs(length)
    expected = jax.jit(naive)(*args)
    for options in (dict(chunk_size=16), dict(chunk_size=64), dict(implementation="recurrent")):
        np.testing.assert_allclose(attend(*args, SLOPES, **options), expected, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.usefixtures("x64")
def test_gradients_are_those_of_the_masked_product():
    args = inputs(65, jnp.float64)
    slopes = SLOPES.astype(jnp.float64)
    loss = lambda f: lambda *args: jnp.sum(jnp.sin(f(*args)))
    got = jax.jit(jax.grad(loss(lambda *a: linear.lightning_attention(*a, chunk_size=16)), (0, 1, 2, 3)))(*args, slopes)
    for a, b in zip(got, jax.jit(jax.grad(loss(naive), (0, 1, 2, 3)))(*args, slopes), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-11 * float(jnp.abs(b).max()))


def test_a_carried_state_continues():
    args = inputs(65)
    whole = attend(*args, SLOPES)
    first, state = attend(*(x[:, :37] for x in args), SLOPES, return_state=True)  # ends within a tile
    rest = attend(*(x[:, 37:] for x in args), SLOPES, initial_state=state)
    np.testing.assert_allclose(jnp.concatenate([first, rest], 1), whole, atol=1e-4)
    state, prefilled = linear.lightning_step(init(B, N, H, HV), *(x[:, :64] for x in args), SLOPES)
    _, last = linear.lightning_step(state, *(x[:, 64:] for x in args), SLOPES)
    np.testing.assert_allclose(jnp.concatenate([prefilled, last], 1), whole, atol=1e-4)


def test_limits():
    """No slope sums everything; a steep one leaves each token itself."""
    query, key, value = inputs(65)
    sums = jnp.cumsum(jnp.einsum("bsnh,bsnv->bsnhv", key, value), axis=1)
    cumulative = jnp.einsum("btnh,btnhv->btnv", query, sums)
    for slopes in (None, jnp.zeros(N)):
        np.testing.assert_allclose(attend(query, key, value, slopes), cumulative, atol=1e-4)
    itself = jnp.einsum("btnh,btnh->btn", query, key)[..., None] * value
    np.testing.assert_allclose(attend(query, key, value, jnp.full(N, 50.0)), itself, atol=1e-5)


def test_long_sequences_stay_finite():
    """Exponents are differences, never positive."""
    query, key, value = (x[..., :1, :2] for x in inputs(65536))
    out, slopes = jax.jit(jax.value_and_grad(lambda q: jnp.sum(linear.lightning_attention(q, key, value, jnp.ones(1)))))(query)
    assert jnp.isfinite(out) and jnp.isfinite(slopes).all()


def test_slices_of_the_head_add_up():
    query, key, value = inputs(65)
    parts = [attend(query[..., part], key[..., part], value, SLOPES) for part in (slice(0, 4), slice(4, 8))]
    np.testing.assert_allclose(sum(parts), attend(query, key, value, SLOPES), atol=1e-4)


def test_oracle():
    """The recurrence of flash-linear-attention, read from its file because the package needs a GPU."""
    torch, package = pytest.importorskip("torch"), importlib.util.find_spec("fla")
    pytest.importorskip("einops")
    if package is None:
        pytest.skip("flash-linear-attention is not installed")
    spec = importlib.util.spec_from_file_location("naive_simple_gla", pathlib.Path(package.submodule_search_locations[0]) / "ops/simple_gla/naive.py")
    spec.loader.exec_module(peer := importlib.util.module_from_spec(spec))
    args = inputs(63)
    decay = jnp.broadcast_to(-SLOPES, (B, 63, N))
    expected, _ = peer.naive_recurrent_simple_gla(*(torch.from_numpy(np.array(x)) for x in (*args, decay)), scale=1.0)
    np.testing.assert_allclose(attend(*args, SLOPES), expected.numpy(), atol=1e-4)


def test_slopes():
    """Geometric by head, fading with depth."""
    np.testing.assert_allclose(linear.lightning_slopes(8), 2.0 ** -np.arange(1, 9) * (1 + 1e-5), rtol=1e-6)
    first, last = linear.lightning_slopes(6, 0, 12), linear.lightning_slopes(6, 11, 12)
    np.testing.assert_allclose(last / first, 1e-5 / (1 + 1e-5), rtol=1e-2)


def test_layer():
    """The layer written out; prefill and steps find what it finds; only its slopes are not trained."""
    layer = linear.TNLAttention(16, 4, layer=1, num_layers=3, gate_rank=3, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 9, 16))
    q, k, v = (jax.nn.silu(project(x)) for project in (layer.query, layer.key, layer.value))
    found = naive(q, k, v, jnp.asarray(linear.lightning_slopes(4, 1, 3))).reshape(2, 9, 16)
    found = (found - found.mean(-1, keepdims=True)) / jnp.sqrt(found.var(-1, keepdims=True) + 1e-6)
    gate = jax.nn.sigmoid(layer.gate.up(layer.gate.down(x)))
    expected = layer.out(found.reshape(2, 9, 4, 4) * gate)

    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def both(params, x):
        layer = nnx.merge(graph, params, rest)
        state, first = layer.step(layer.init_state(batch=2, max_length=9), x[:, :8])
        return layer(x), jnp.concatenate([first, layer.step(state, x[:, 8:])[1]], 1)

    whole, stepped = both(params, x)
    np.testing.assert_allclose(whole, expected, atol=1e-5)
    np.testing.assert_allclose(stepped, whole, atol=1e-5)
    slopes = jax.jit(jax.grad(lambda params: jnp.sum(both(params, x)[0] ** 2)))(params)
    assert len(jax.tree.leaves(slopes)) == 8 and all(jnp.any(g != 0) for g in jax.tree.leaves(slopes))


def test_errors():
    args = inputs(5)
    with pytest.raises(ValueError, match=r"slopes: expected shape \[M\]"):
        linear.lightning_attention(*args, jnp.ones(3))
    with pytest.raises(ValueError, match="layer: expected an index below"):
        linear.lightning_slopes(4, 3, 3)
