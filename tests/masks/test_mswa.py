"""Multi-scale windows: their sizes, the grouped execution and what it costs, how far a head sees, rolling caches."""

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import attnx
from attnx import masks
from attnx.positions import Rotary


def test_windows():
    """The mean is (15/16)^2 of the base; from a sixteenth to four times; earlier groups have more where they do not divide."""
    for layers, heads in ((4, 4), (8, 12)):
        windows = masks.mswa_windows(layers, heads, 256)
        assert windows.shape == (layers, heads) and windows.mean() == 256 * (15 / 16) ** 2 and windows.min() == 16 and windows.max() == 1024
        assert (np.diff(windows, axis=0) >= 0).all() and (np.diff(windows, axis=1) >= 0).all()
    assert masks.mswa_windows(2, 6, 8, mode="head")[1].tolist() == [2, 2, 4, 4, 8, 16]
    assert masks.mswa_windows(5, 2, 8, mode="layer")[:, 1].tolist() == [2, 2, 4, 8, 16]
    assert masks.mswa_windows(4, 4, 5).min() == 1


@pytest.mark.parametrize("windows, kv_heads", [((2, 3, 7, 30), 4), ((5, 2, 2, 2), 2), ((4, 4, 4, 4), 1)])
def test_dense(x64, windows, kv_heads):
    """Every execution is a mask [N, T, T], forward and backward, where no window divides T and groups share keys unequally; with documents."""
    q, k, v, cotangent = agreement.arrays(queries=23, keys=23, kv_heads=kv_heads)
    ids = jnp.broadcast_to(jnp.arange(23) >= 9, (2, 23)).astype(jnp.int32)
    offset = jnp.arange(23) - jnp.arange(23)[:, None]
    allowed = (offset <= 0) & (offset > -jnp.array(windows)[:, None, None])
    for segments in (None, ids):
        dense = allowed if segments is None else allowed & (ids[0][:, None] == ids[0])

        def gradients(attend):
            return jax.jit(jax.value_and_grad(lambda args: jnp.vdot(attend(*args), cotangent)))((q, k, v))

        expected = gradients(lambda q, k, v: attnx.attention(q, k, v, mask=masks.explicit(dense), implementation="reference"))  # noqa: B023
        for implementation in ("reference", "gathered", "blockwise") if segments is None else ("gathered",):
            got = gradients(lambda *args: masks.multi_window_attention(*args, windows, segment_ids=segments,  # noqa: B023
                                                                      implementation=implementation, block_sizes=(4, 4)))  # noqa: B023
            agreement.assert_agree(got, expected)


def test_mask(x64):
    """As a part of the engine, in tiles; equal windows are one sliding window."""
    args = agreement.arrays(queries=23, keys=23)
    part = masks.per_head_window(jnp.array([1, 3, 6, 20]))
    agreement.assert_agree(agreement.blockwise(*args, mask=part), agreement.reference(*args, mask=part))
    q, k, v, _ = args
    np.testing.assert_allclose(masks.multi_window_attention(q, k, v, (6,) * 4), attnx.attention(q, k, v, mask=masks.sliding_window(6)), atol=1e-12)


def test_reach(x64):
    """The last output of a layer depends on the key a window less one back, and not on the one before; each head on its own window."""
    q, k, v, _ = agreement.arrays(queries=23, keys=23, kv_heads=4)
    windows = (2, 3, 7, 12)
    slopes = jax.jacrev(lambda v: masks.multi_window_attention(q, k, v, windows)[0, -1, :, 0])(v)[:, 0, :, :, 0]  # [N, T, N]
    for n, window in enumerate(windows):
        assert (slopes[n, -window:, n] != 0).all() and (slopes[n, :-window, n] == 0).all()


def test_cost():
    """Arithmetic follows the windows: that of all layers is no more than 1.1 times the share of the budget of that of a uniform window."""
    def cost(windows):
        q = jax.ShapeDtypeStruct((1, 512, 4, 16), jnp.float32)
        attend = lambda q, k, v: masks.multi_window_attention(q, k, v, windows)
        return jax.jit(attend).lower(q, q, q).cost_analysis()["flops"]

    layers = masks.mswa_windows(4, 4, 64)
    assert sum(map(cost, layers)) <= 1.1 * (layers.mean() / 64) * 4 * cost((64,) * 4)


def test_decoding():
    """A layer's rolling caches hold as much as the windows, and give what the whole gives, over a prefill longer than most of them."""
    windows = masks.mswa_windows(2, 4, 8)[1]
    layer = masks.MSWAttention(32, 4, windows=windows, position=Rotary(), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 20, 32))

    @nnx.jit
    def read(layer, x):
        state, first = layer.step(layer.init_state(1, 20), x[:, :11])
        outs = [first]
        for t in range(11, 20):
            state, out = layer.step(state, x[:, t:t + 1])
            outs.append(out)
        return jnp.concatenate(outs, 1), layer(x)

    np.testing.assert_allclose(*read(layer, x), atol=2e-6)
    caches = layer.init_state(1, 10).mechanism
    assert sum(cache.key.shape[1] * cache.key.shape[2] for cache in caches) == sum(min(10, int(window)) for window in windows)


def test_model():
    """Layers of a model, some of them linear."""
    kinds = masks.mswa_mechanisms(6, 4, 16, linear_every=3)
    assert [hasattr(kind, "windows") for kind in kinds] == [True, True, False] * 2
    assert kinds[4].windows == tuple(masks.mswa_windows(6, 4, 16)[4])


def test_dropout():
    """Kept weights are scaled; named forms without it refuse."""
    q, k, v, _ = agreement.arrays(jnp.float32, queries=23, keys=23)
    out = masks.multi_window_attention(q, k, 1 + 0 * v, (23,) * 4, dropout_rate=0.3, dropout_key=jax.random.key(0))
    assert out.std() > 0.05 and abs(out.mean() - 1) < 0.1
    with pytest.raises(NotImplementedError, match="dropout"):
        masks.multi_window_attention(q, k, v, (2,) * 4, dropout_rate=0.3, dropout_key=jax.random.key(0), implementation="gathered")


def test_errors():
    """Wrong arguments are named."""
    q, k, v, _ = agreement.arrays(jnp.float32, queries=23, keys=23)
    for match, call in (("windows: expected", lambda: masks.multi_window_attention(q, k, v, (2, 3))),
                        ("windows: expected", lambda: masks.multi_window_attention(q, k, v, (0, 1, 2, 3))),
                        ("key: expected", lambda: masks.multi_window_attention(q[:, 1:], k, v, (2,) * 4)),
                        ("segment_ids: expected", lambda: masks.multi_window_attention(q, k, v, (2,) * 4, segment_ids=jnp.zeros(23, int))),
                        ("mode: expected", lambda: masks.mswa_windows(4, 4, 8, mode="none"))):
        with pytest.raises(ValueError, match=match):
            call()
