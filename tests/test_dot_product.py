"""attnx.dot_product_attention against jax.nn.dot_product_attention: the same calls, results and gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agree

import attnx

B, T, N, H = 2, 12, 4, 8


def arrays(dtype=jnp.float32, *, kv_heads=N, keys=T, lead=()):
    """Query, key, value and an output cotangent."""
    shapes = (B, T, N, H), (B, keys, kv_heads, H), (B, keys, kv_heads, H), (B, T, N, H)
    return [jax.random.normal(k, (*lead, *s), dtype) for k, s in zip(jax.random.split(jax.random.key(0), 4), shapes)]


@partial(jax.jit, static_argnames=("attend", "count", "over", "is_causal", "local_window_size", "scale"))
def evaluate(attend, primals, cotangent, others=(), count=3, over=False, **static):
    """Output and gradients by the first ``count`` of query, key, value, bias; under vmap with ``over``."""
    def gradients(primals, cotangent):
        def loss(*chosen):
            query, key, value, bias = (*chosen, *primals[count:])
            out = attend(query, key, value, bias, **dict(others), **static)
            return jnp.vdot(out, cotangent.astype(out.dtype)), out
        return jax.grad(loss, argnums=tuple(range(count)), has_aux=True)(*primals[:count])
    return (jax.vmap(gradients) if over else gradients)(primals, cotangent)


def assert_same(primals, cotangent, tolerance, others=(), **options):
    ours, theirs = (evaluate(attend, primals, cotangent, dict(others), **options) for attend in (attnx.dot_product_attention, jax.nn.dot_product_attention))
    assert [x.dtype for x in jax.tree.leaves(ours)] == [x.dtype for x in jax.tree.leaves(theirs)]
    assert_agree(ours, theirs, tolerance)


# 16-bit inputs: the weights are rounded once and the results once, to 2^-8 (bfloat16) or 2^-11 (float16) of the largest entry.
@pytest.mark.parametrize("dtype, groups, over, tolerance", [(jnp.bfloat16, 1, True, 2e-2), (jnp.bfloat16, 4, False, 2e-2), (jnp.float16, 2, True, 3e-3)])
def test_dtypes_groups_and_vmap(dtype, groups, over, tolerance):
    """Grouped and multi-query heads in 16 bits, causal, under vmap too; jax.nn in float32, for it lacks float16 on some backends."""
    *primals, cotangent = arrays(dtype, kv_heads=N // groups, lead=(3,) if over else ())
    primals = (*primals, jnp.zeros((3, 1, 1, 1, 1) if over else (1, 1, 1, 1), dtype))
    ours = evaluate(attnx.dot_product_attention, primals, cotangent, over=over, is_causal=True)
    wide = [x.astype(jnp.float32) for x in (*primals, cotangent)]
    theirs = evaluate(jax.nn.dot_product_attention, tuple(wide[:4]), wide[4], over=over, is_causal=True)
    assert all(x.dtype == dtype for x in jax.tree.leaves(ours))
    assert_agree(ours, theirs, tolerance)


LENGTHS = jnp.array([7, T]), jnp.array([9, 5])
MASK = jax.random.bernoulli(jax.random.key(5), 0.7, (B, 1, T, T)).at[..., 0].set(True)
BANDS = {
    "custom mask, causal": (dict(mask=MASK), dict(is_causal=True, scale=0.2)),
    "padding": (dict(query_seq_lengths=LENGTHS[0], key_value_seq_lengths=LENGTHS[1]), {}),
    "padding of keys, causal": (dict(key_value_seq_lengths=LENGTHS[1]), dict(is_causal=True)),
    "window": ({}, dict(local_window_size=(3, 2))),
    "window of one number, causal, padding of queries": (dict(query_seq_lengths=LENGTHS[0]), dict(local_window_size=4, is_causal=True)),
}


@pytest.mark.parametrize("name", BANDS)
def test_masks_and_bias(name):
    """Masks and a bias with its gradient. Rows without keys are zero here and an average of all values there: none is drawn."""
    others, static = BANDS[name]
    *primals, cotangent = arrays(kv_heads=2)
    bias = jax.random.normal(jax.random.key(6), (1, N, T, T) if "custom" in name else (B, N, T, T))
    assert_same((*primals, bias), cotangent, 3e-6, others, count=4, **static)


def test_bias_gradient_under_vmap_with_a_row_mask():
    """A mask [1, 1, S] broadcasts over heads and queries; the bias has one entry a batch and is differentiated under vmap."""
    *primals, cotangent = arrays(lead=(3,))
    bias = jax.random.normal(jax.random.key(6), (3, B, N, T, T))
    assert_same((*primals, bias), cotangent, 3e-6, dict(mask=(jnp.arange(T) < 9)[None, None]), count=4, over=True)


def test_three_axes():
    """No batch axis: [T, N, H]."""
    query, key, value, _ = (x[0] for x in arrays(kv_heads=2))
    run = lambda f: jax.jit(partial(f, is_causal=True, return_residual=True))(query, key, value)
    out, residual = run(attnx.dot_product_attention)
    assert out.shape == query.shape and residual.shape == query.shape[:2]
    assert_agree((out, residual), run(jax.nn.dot_product_attention), 2e-6)


def test_float64_without_infinities(x64):
    """A one-dimensional mask broadcasts, and no infinity arises on the way, forward or backward."""
    primals = [x.astype(jnp.float64) for x in arrays(kv_heads=2)]
    mask = jnp.arange(T) < 7
    with jax.debug_infs(True), jax.debug_nans(True):
        run = lambda f: jax.jit(jax.value_and_grad(lambda q, k, v: jnp.sin(f(q, k, v, mask=mask)).sum(), argnums=(0, 1, 2)))(*primals[:3])
        ours = run(attnx.dot_product_attention)
    assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(ours))
    assert_agree(ours, run(jax.nn.dot_product_attention), 1e-6)  # theirs computes the softmax in float32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
def test_residual(dtype):
    """The log of the normaliser, [B, T, N] in the key's dtype; it has no gradient, and asking for it does not change the output's."""
    query, key, value, cotangent = arrays(dtype, kv_heads=2)

    def run(attend):
        def loss(q, k, v):
            out, residual = attend(q, k, v, is_causal=True, return_residual=True)
            return jnp.vdot(out, cotangent).astype(jnp.float32) + 100 * residual.astype(jnp.float32).sum(), (out, residual)
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(query, key, value)

    ours, theirs = run(attnx.dot_product_attention), run(jax.nn.dot_product_attention)
    assert ours[1][1].dtype == theirs[1][1].dtype == dtype
    assert_agree(ours, theirs, 2e-6 if dtype == jnp.float32 else 2e-2)


def test_other_lengths_of_keys():
    """S different from T, a window and a custom mask that broadcasts over everything but the keys."""
    *primals, cotangent = arrays(keys=9)
    mask = (jnp.arange(9) != 4)[None, None, None]
    assert_same((*primals, jnp.zeros((1, 1, 1, 9))), cotangent, 3e-6, dict(mask=mask), local_window_size=(6, 9))


def test_implementations_and_plain_inputs():
    """'xla' is the fold; NumPy arrays are welcome; rows without keys are zero, not an average."""
    query, key, value, _ = map(np.asarray, arrays())
    mask = np.ones((T, T), bool)
    mask[3] = False
    run = lambda name: jax.jit(partial(attnx.dot_product_attention, implementation=name))(query, key, value, mask=mask)
    out = run("xla")
    np.testing.assert_allclose(out, run("blockwise"), atol=1e-6)
    assert (out[:, 3] == 0).all() and (out[:, 4] != 0).all()
