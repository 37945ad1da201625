"""Extractors: written out, nested in each other, shifted, scaled, packed, padded and streamed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import mixers
from attnx.catalogue.rows.extractors import EXTRACT

B, T, D, L = 2, 12, 3, 8
STATIC = ("index", "scale", "implementation")
RUN = {kind: jax.jit(extract, static_argnames=STATIC) for kind, extract in EXTRACT.items()}


def arrays(kind, seed=0):
    """Tokens and parameters."""
    x, w, a, m = jax.random.split(jax.random.key(seed), 4)
    shape = (L, *(D,) * {"SHE": 2, "HE": 1}.get(kind, 0))
    mixing = jax.random.normal(m, (D, D), float) if kind in ("HE", "WE") else None
    return jax.random.normal(x, (B, T, D), float), mixers.ExtractorParams(jax.random.normal(w, shape, float), jax.random.normal(a, (D, D), float), mixing)


def written_out(x, params, index, allowed):
    """Token by token; allowed [B, T, T] says what is summed. Also the number of terms."""
    x, w, a = np.asarray(x), np.asarray(params.weights), np.asarray(params.adjustment)
    z = x if params.mixing is None else x @ np.asarray(params.mixing)
    e, count = np.zeros_like(x), np.zeros((B, T, 1))
    for b, t, i in np.argwhere(allowed):
        r = t - i if index == "relative" else i
        if r < L:
            e[b, t] += z[b, i] @ w[r] if w.ndim == 3 else w[r] * z[b, i]
            count[b, t] += 1
    return e * (x @ a), count


@pytest.mark.parametrize("index", ["relative", "absolute"])
@pytest.mark.parametrize("kind", EXTRACT)
def test_written_out(x64, kind, index):
    """The sums, with and without documents, padding and the count."""
    x, params = arrays(kind)
    past = np.tril(np.ones((B, T, T), bool))
    expected, count = written_out(x, params, index, past)
    np.testing.assert_allclose(RUN[kind](x, params, index=index), expected, atol=1e-12)
    np.testing.assert_allclose(RUN[kind](x, params, index=index, scale="rsqrt_count"), expected / np.sqrt(np.maximum(count, 1)), atol=1e-12)
    ids, at = np.arange(T) // 5, np.where(np.arange(T) < 10, np.arange(T), -1)
    seen = past & (ids[:, None] == ids) & (at >= 0) & (at >= 0)[:, None]
    expected, count = written_out(x, params, index, seen)
    got = RUN[kind](x, params, index=index, scale="rsqrt_count", positions=jnp.asarray(at), segment_ids=jnp.broadcast_to(ids, (B, T)))
    np.testing.assert_allclose(got, expected / np.sqrt(np.maximum(count, 1)), atol=1e-12)


def test_places():
    """By place, positions that differ between rows choose the weights: row 1 is row 0 from place 2 on."""
    for kind in ("SHE", "WE"):
        x, params = arrays(kind)
        x = x.at[0, :2].set(0)
        rows = jnp.stack([x[0], jnp.roll(x[0], -2, axis=0)])
        positions = jnp.stack([jnp.arange(T), jnp.arange(T) + 2])
        out = RUN[kind](rows, params, index="absolute", positions=positions)
        np.testing.assert_allclose(out[1, :-2], out[0, 2:], atol=1e-5)


def test_nesting(x64):
    """Each is a case of the one before it."""
    x, he = arrays("HE")
    w = he.weights[:, 0]
    she = mixers.ExtractorParams(he.mixing @ jax.vmap(jnp.diag)(he.weights), he.adjustment)
    for index in ("relative", "absolute"):
        run = lambda kind, params, index=index: RUN[kind](x, params, index=index)
        np.testing.assert_allclose(run("SHE", she), run("HE", he), atol=1e-12)
        we = he._replace(weights=w)
        np.testing.assert_allclose(run("HE", he._replace(weights=jnp.repeat(w[:, None], D, 1))), run("WE", we), atol=1e-12)
        me = mixers.ExtractorParams(w, he.adjustment)
        np.testing.assert_allclose(run("WE", we._replace(mixing=jnp.eye(D))), run("ME", me), atol=1e-12)


def test_shift_and_scale(x64):
    """By lag zeros at the front shift the output, by place they do not; the output is quadratic in the tokens, and causal to the bit."""
    x, params = arrays("HE")
    for index, same in (("relative", True), ("absolute", False)):
        y = RUN["HE"](x, params, index=index)
        shifted = RUN["HE"](jnp.roll(x, 3, axis=1).at[:, :3].set(0), params, index=index)
        assert np.allclose(shifted[:, 3:], y[:, :-3], atol=1e-12) == same
        np.testing.assert_allclose(RUN["HE"](-3.0 * x, params, index=index), 9 * y, atol=1e-10)
        assert (RUN["HE"](x.at[:, 7:].set(5.0), params, index=index)[:, :7] == y[:, :7]).all()


@pytest.mark.parametrize("kind", ["SHE", "ME"])
def test_fft(kind):
    """In single precision the transform finds what the sum does."""
    x, params = arrays(kind)
    np.testing.assert_allclose(RUN[kind](x, params, implementation="fft"), RUN[kind](x, params, implementation="direct"), atol=1e-4)


def test_state():
    """A stream of any cut; the state is as large for long texts as for short ones."""
    for kind, index in (("SHE", "relative"), ("SHE", "absolute"), ("ME", "relative")):
        layer = mixers.Extractor(D, L, kind=kind, index=index, scale="rsqrt_count", rngs=nnx.Rngs(0))
        x = arrays(kind)[0].astype(jnp.float32)

        @nnx.jit
        def both(layer, x):
            state, out = layer.init_state(B, T), []
            for first, last in ((0, 5), (5, 6), (6, T)):
                state, y = layer.step(state, x[:, first:last])
                out.append(y)
            return layer(x), jnp.concatenate(out, axis=1)

        np.testing.assert_allclose(*both(layer, x), atol=1e-5)
        short, long = (jax.eval_shape(lambda n=n: layer.init_state(B, n)) for n in (16, 4096))
        assert short == long


def test_layer():
    """Every parameter has a gradient; initial values have the stated variances."""
    for kind, count in (("SHE", L * D * D + D * D), ("HE", L * D + 2 * D * D), ("WE", L + 2 * D * D), ("ME", L + D * D)):
        graph, params = nnx.split(mixers.Extractor(D, L, kind=kind, rngs=nnx.Rngs(0)))
        assert sum(x.size for x in jax.tree.leaves(params)) == count
        x = arrays(kind)[0].astype(jnp.float32)
        slopes = jax.jit(jax.grad(lambda params, graph=graph, x=x: jnp.sum(jnp.sin(nnx.merge(graph, params)(x)))))(params)
        assert all(jnp.any(slope) for slope in jax.tree.leaves(slopes))
    wide = mixers.Extractor(32, 64, rngs=nnx.Rngs(0))
    assert abs(float(wide.weights[...].std()) * 32**0.5 - 1) < 0.05
    assert abs(float(mixers.Extractor(32, 64, kind="HE", rngs=nnx.Rngs(0)).weights[...].std()) * 8 - 1) < 0.1


def test_refusals():
    """Parameters of another kind, options that do not exist, and what the transform cannot do."""
    x, params = arrays("SHE")
    with pytest.raises(ValueError, match=r"params.weights: expected shape \['L', 3\] for HE"):
        mixers.extractor_he(x, params)
    with pytest.raises(ValueError, match="params.mixing: expected shape"):
        mixers.extractor_we(x, mixers.ExtractorParams(jnp.ones(L), jnp.ones((D, D))))
    with pytest.raises(NotImplementedError, match="segment_ids need 'direct'"):
        mixers.extractor_she(x, params, segment_ids=jnp.zeros((B, T), int), implementation="fft")
    with pytest.raises(ValueError, match="index: expected one of"):
        mixers.extractor_she(x, params, index="lag")
    with pytest.raises(ValueError, match="kind: expected one of"):
        mixers.Extractor(D, L, kind="XE", rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="hooks"):
        mixers.Extractor(D, L, rngs=nnx.Rngs(0))(x, hooks={"weights": lambda *a: a[0]})
