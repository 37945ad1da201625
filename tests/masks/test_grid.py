"""Neighbourhoods: the mask against loops over its definition, what it degenerates to, tiles, plans, permutation, extra keys."""

import itertools
import math

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnx
from attnx import masks, weights
from attnx.core import fused
from attnx.masks.grid import neighborhood
from pallas_kernels.parts import At

CASES = {"window": ((13,), 5, {}), "even window": ((12,), 4, {}), "stride": ((13,), 6, dict(stride=4)), "even stride at the end": ((11,), 5, dict(stride=4)),
         "dilation": ((17,), 3, dict(dilation=5)), "causal": ((13,), 5, dict(stride=3, is_causal=True)), "causal, dilated": ((14,), 3, dict(dilation=4, is_causal=True)),
         "plane": ((7, 9), (3, 5), dict(stride=(1, 2))), "dilated plane": ((9, 7), 3, dict(dilation=(3, 2), stride=2)),
         "space, causal in time": ((5, 4, 6), (3, 2, 3), dict(is_causal=(True, False, False), dilation=(1, 2, 1)))}


def keys_of(n, place, window, stride, dilation, causal):
    """The keys of one query of one dimension, by the letter."""
    residue, inner = place % dilation, place // dilation
    size = len(range(residue, n, dilation))
    if causal:
        leader = min(inner // stride * stride + stride - 1, size - 1)
        return [j * dilation + residue for j in range(size) if j <= inner and leader - j < window]
    leader = min(inner // stride * stride + stride // 2, size - 1)
    left, right = window // 2, window // 2 + window % 2 - 1
    center = min(max(leader, left), size - 1 - right)
    return [j * dilation + residue for j in range(center - left, center + right + 1)]


def dense(grid, window, stride=1, dilation=1, is_causal=False):
    """Who sees whom, [prod(grid), prod(grid)]."""
    dims = len(grid)
    each = [(x,) * dims if isinstance(x, (int, bool)) else x for x in (window, stride, dilation, is_causal)]
    allowed = np.zeros((math.prod(grid),) * 2, bool)
    for row, places in enumerate(itertools.product(*map(range, grid))):
        for seen in itertools.product(*(keys_of(n, place, *of) for n, place, *of in zip(grid, places, *each))):
            allowed[row, np.ravel_multi_index(seen, grid)] = True
    return allowed


@pytest.mark.parametrize("name", CASES)
def test_definition(x64, name):
    """By rows and in tiles, which do not divide the grid, with gradients; any query but a causal one has as many keys as the window."""
    grid, window, options = CASES[name]
    allowed = dense(grid, window, **options)
    if not options.get("is_causal"):
        assert (allowed.sum(1) == (window ** len(grid) if isinstance(window, int) else math.prod(window))).all()
    assert allowed.any(1).all()
    q, k, v, cotangent = (x.reshape(x.shape[0], *grid, *x.shape[2:]) for x in agreement.arrays(queries=len(allowed), keys=len(allowed)))
    flat = lambda x: x.reshape(x.shape[0], -1, *x.shape[len(grid) + 1:])
    gradient = lambda attend: jax.jit(jax.value_and_grad(lambda args: jnp.vdot(attend(*args).reshape(cotangent.shape), cotangent)))((q, k, v))
    expected = gradient(lambda *args: attnx.attention(*map(flat, args), mask=masks.explicit(jnp.asarray(allowed)), implementation="reference"))
    rows = neighborhood(grid, window, **options)
    places = jnp.arange(len(allowed))
    np.testing.assert_array_equal(rows.tile(At(0, 0, places[:, None], places[None])), allowed)
    attend = lambda *args: masks.neighborhood_attention(*args, window, **options, query_tile=(3, 2, 2)[:len(grid)], key_tile=(2, 3, 4)[:len(grid)])
    agreement.assert_agree(gradient(attend), expected)


@pytest.mark.parametrize("name", CASES)
def test_plan(name):
    """No allowed pair lies in a tile that is left out, nor a forbidden one in a tile that needs no mask; tiles of single tokens are exact."""
    grid, window, options = CASES[name]
    allowed = jnp.asarray(dense(grid, window, **options)).reshape(1, *grid, -1)
    dilation = options.get("dilation", 1)
    for tiles in ((3, 2, 2)[:len(grid)], (2, 3, 4)[:len(grid)]), ((1,) * len(grid),) * 2:
        plan = masks.neighborhood_plan(grid, window, **options, query_tile=tiles[0], key_tile=tiles[1])
        sizes = [math.prod(tile) for tile in tiles]
        pairs = masks.token_permute(allowed, tiles[0], dilation)[0]  # [query tokens, keys by rows]
        pairs = masks.token_permute(pairs.T.reshape(1, *grid, -1), tiles[1], dilation)[0].T
        pairs = np.asarray(pairs).reshape(len(plan.some), sizes[0], -1, sizes[1])
        assert (plan.some >= pairs.any((1, 3))).all() and (plan.every <= pairs.all((1, 3))).all() and (plan.every <= plan.some).all()
        assert plan.some.sum() < 1.6 * pairs.any((1, 3)).sum()
        if sizes == [1, 1]:
            np.testing.assert_array_equal(plan.some, pairs[:, 0, :, 0])
            assert plan.is_perfect
    if dilation == 1:
        assert plan.dense == pytest.approx(math.prod(grid) ** 2 / float(allowed.sum()))


def test_special_cases(x64):
    """A window of all is dense attention, of one the value; a stride of the window is attention inside windows."""
    q, k, v, _ = (x.reshape(2, 4, 6, *x.shape[2:]) for x in agreement.arrays(queries=24, keys=24))
    flat = lambda x: x.reshape(2, 24, *x.shape[3:])
    np.testing.assert_allclose(flat(masks.neighborhood_attention(q, k, v, (4, 6))), attnx.attention(*map(flat, (q, k, v))), atol=1e-12)
    np.testing.assert_allclose(masks.neighborhood_attention(q, k, v, 1), jnp.repeat(v, 2, axis=3), atol=1e-12)
    windows = lambda x: x.reshape(2, 2, 2, 2, 3, *x.shape[3:]).swapaxes(2, 3).reshape(8, 6, *x.shape[3:])
    np.testing.assert_allclose(windows(masks.neighborhood_attention(q, k, v, (2, 3), stride=(2, 3))), attnx.attention(*map(windows, (q, k, v))), atol=1e-12)


def test_perfect_plans_reach_the_bound():
    """Where the stride is a multiple of the query's tile and windows lie on key tiles, visits are the window and nothing more; with stride 1 they are not."""
    for grid, window, stride, tile in (((64, 64), 16, 16, (8, 8)), ((32, 64), (16, 32), (8, 16), (8, 8)), ((16, 32, 32), (8, 16, 16), (8, 16, 16), (4, 4, 4)),
                                       ((256,), 64, 64, (16,))):
        plan = masks.neighborhood_plan(grid, window, stride=stride, query_tile=tile, key_tile=tile)
        if all(s == w for s, w in zip(np.broadcast_to(stride, len(grid)), np.broadcast_to(window, len(grid)))):
            assert plan.is_perfect and plan.speedup == plan.dense
        strided, sliding = plan.speedup, masks.neighborhood_plan(grid, window, query_tile=tile, key_tile=tile).speedup
        assert sliding < 0.9 * plan.dense and sliding <= strided


def test_extra_keys_weights_and_residual(x64):
    """Tokens that all see enter one normaliser; other weights run in the same tiles."""
    q, k, v, _ = (x.reshape(2, 4, 6, *x.shape[2:]) for x in agreement.arrays(queries=24, keys=24))
    flat = lambda x: x.reshape(2, 24, *x.shape[3:])
    mask = masks.explicit(jnp.asarray(np.pad(dense((4, 6), 3), ((0, 0), (0, 5)), constant_values=True)))
    extra = [jax.random.normal(jax.random.key(i), (2, 5, 2, size)) for i, size in ((1, 5), (2, 3))]
    expected = attnx.attention(flat(q), *(jnp.concatenate([flat(x), e], 1) for x, e in zip((k, v), extra)), mask=mask, return_residual=True)
    got = masks.neighborhood_attention(q, k, v, 3, extra_key=extra[0], extra_value=extra[1], query_tile=(2, 2), key_tile=(2, 4), return_residual=True)
    agreement.assert_agree([flat(x) for x in got], list(expected))
    mask = masks.explicit(jnp.asarray(dense((4, 6), 3)))
    np.testing.assert_allclose(flat(masks.neighborhood_attention(q, k, v, 3, weights=weights.softpick(), query_tile=(2, 2))),
                               attnx.attention(*map(flat, (q, k, v)), mask=mask, weights=weights.softpick()), atol=1e-11)


def test_kernel(x64):
    """The mask runs inside the interpreted TPU kernel."""
    args = agreement.arrays(batch=1, queries=256, keys=256, heads=1, kv_heads=1, size=8, value_size=8)
    mask = neighborhood((16, 16), (5, 3), stride=(2, 1), query_tile=(8, 16), key_tile=(16, 8))
    with fused.forced():
        got = agreement.evaluate(*args, mask=mask, implementation="pallas", block_sizes=(128, 128))
    agreement.assert_agree(got, agreement.reference(*args, mask=mask))


def with_bias(grid, window, options, implementation):
    """Output and gradients, of a table of biases too."""
    size = math.prod(grid)
    *arrays, cotangent = (x.reshape(x.shape[0], *grid, *x.shape[2:]) for x in agreement.arrays(queries=size, keys=size))
    windows = (window,) * len(grid) if isinstance(window, int) else window
    table = jax.random.normal(jax.random.key(5), (4, *(2 * w - 1 for w in windows)))

    def attend(*args):
        tile = (2, 3, 2)[:len(grid)]
        out = masks.neighborhood_attention(*args[:3], window, **options, bias=args[3], scale=0.3, implementation=implementation, query_tile=tile, key_tile=tile)
        return jnp.vdot(out, cotangent), out
    return jax.jit(jax.value_and_grad(attend, range(4), has_aux=True))(*arrays, table)


@pytest.mark.parametrize("name", ["stride", "causal, dilated", "dilated plane", "space, causal in time"])
def test_bias(x64, name):
    """What enters kernels as features of queries and keys is what tiles look up."""
    grid, window, options = CASES[name]
    expected = with_bias(grid, window, options, "blockwise")
    with fused.forced():  # with no implementation named as well
        agreement.assert_agree(with_bias(grid, window, options, None if len(grid) == 2 else "pallas"), expected)


def test_large_windows_with_biases():
    """Kernels refuse them by name, and are passed over where they are not named."""
    x, table = jnp.ones((1, 20, 20, 1, 4)), jnp.ones((1, 37, 37))
    with fused.forced():
        with pytest.raises(NotImplementedError, match="bias: kernels take windows of at most 256 tokens, got 361"):
            masks.neighborhood_attention(x, x, x, 19, bias=table, implementation="pallas")
        assert "pallas" not in str(jax.make_jaxpr(lambda x: masks.neighborhood_attention(x, x, x, 19, bias=table))(x))
        assert "pallas" in str(jax.make_jaxpr(lambda x: masks.neighborhood_attention(x, x, x, 16, bias=table[:, :31, :31]))(x))


@pytest.mark.parametrize("grid, window, options, message", [
    ((4, 4), 5, {}, "window: expected an integer from 1 to 4, got 5"),
    ((8,), 3, dict(dilation=3), "dilation: expected an integer from 1 to 2, got 3"),
    ((8,), 3, dict(stride=4), "stride: expected an integer from 1 to 3, got 4"),
    ((4, 4), (3,), {}, "window: expected an integer or one for each of 2 dimensions"),
    ((2, 2, 2, 2), 1, {}, "grid: expected 1 to 3 dimensions"),
    ((4, 4), 2, dict(is_causal=(True,)), "is_causal: expected a boolean or one for each of 2"),
])
def test_wrong_sizes(grid, window, options, message):
    x = jnp.ones((1, *grid, 1, 4))
    with pytest.raises(ValueError, match=message):
        masks.neighborhood_attention(x, x, x, window, **options)


def test_wrong_shapes():
    x = jnp.ones((1, 4, 4, 1, 4))
    for args in ((x, x[:, :3], x), (x, x, x[:, :, :3]), (x[:, 0, 0], x[:, 0, 0], x[:, 0, 0])):
        with pytest.raises(ValueError, match="key: expected"):
            masks.neighborhood_attention(*args, 1)
    with pytest.raises(ValueError, match="extra_value: expected one with extra_key"):
        masks.neighborhood_attention(x, x, x, 3, extra_key=x[:, 0])
    with pytest.raises(ValueError, match="x: expected 16 tokens"):
        masks.token_unpermute(x[:, 0], (4, 4), (2, 2))
