"""Relative position representations: the definition written out, its symmetries, labels of graphs, decoding."""

from functools import partial

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx

import attnx
from attnx import positions

T, S, CLIP = 13, 11, 3


def inputs(dtype=jnp.float64, keys=S, clip=CLIP, heads=()):
    query, key, value, cotangent = agreement.arrays(dtype, queries=T, keys=keys)
    tables = (jax.random.normal(jax.random.key(n), (*heads, 2 * clip + 1, size), dtype) for n, size in ((7, 5), (8, 3)))
    return (query, key, value, *tables), cotangent


def by_hand(query, key, value, key_table, value_table, labels, allowed):
    """[T, S, H] vectors, a head at a time."""
    group = query.shape[2] // key.shape[2]
    out = []
    for n in range(query.shape[2]):
        of = lambda table: table[n] if table.ndim == 3 else table
        k, v = key[:, :, n // group], value[:, :, n // group]
        s = jnp.einsum("bth,btsh->bts", query[:, :, n], k[:, None] + of(key_table)[labels]) / query.shape[3] ** 0.5
        w = oracles.softmax(s, jnp.broadcast_to(allowed, s.shape))
        out.append(jnp.einsum("bts,btsv->btv", w, v[:, None] + of(value_table)[labels]))
    return jnp.stack(out, 2)


@pytest.mark.parametrize("clip, per_head, causal", [(1, False, True), (CLIP, True, False), (16, False, False)])
def test_definition(x64, clip, per_head, causal):
    """Every form is the definition, forward and backward; for clips short of and beyond the sequence."""
    args, cotangent = inputs(clip=clip, heads=(4,) if per_head else ())
    labels = jnp.clip(jnp.arange(S) - jnp.arange(T)[:, None], -clip, clip) + clip
    seen = jax.random.normal(jax.random.key(3), (2, 1, T, S)) > -1
    allowed = seen & (jnp.arange(S) <= jnp.arange(T)[:, None]) if causal else seen

    def gradients(attend):
        return jax.jit(jax.value_and_grad(lambda args: jnp.vdot(attend(*args), cotangent)))(args)

    expected = gradients(lambda *args: by_hand(*args, labels, allowed[:, 0]))
    for implementation, size in (("reference", None), ("bucketed", 4), ("skew", 4), ("skew", 5), ("skew", 64)):
        got = gradients(partial(positions.relative_attention, is_causal=causal, mask=seen, implementation=implementation, block_size=size))
        agreement.assert_agree(got, expected)


def test_reductions(x64):
    """Tables of zeros are softmax attention; one table alone is the other of zeros."""
    (q, k, v, a, b), _ = inputs()
    attend = partial(positions.relative_attention, q, k, v)
    np.testing.assert_allclose(attend(0 * a, 0 * b), attnx.attention(q, k, v), atol=1e-13)
    np.testing.assert_allclose(attend(a), attend(a, 0 * b), atol=1e-13)
    np.testing.assert_allclose(attend(None, b), attend(0 * a, b), atol=1e-13)


def test_translation(x64):
    """The same content further right in its padding, or at larger positions, is given the same outputs."""
    (q, k, v, *tables), _ = inputs(keys=T)
    short = lambda x: x[:, :6]
    plain = positions.relative_attention(*map(short, (q, k, v)), *tables)
    at = lambda first: [jnp.zeros_like(x).at[:, first:first + 6].set(short(x)) for x in (q, k, v)]
    for first in (0, 2, 7):
        seen = (jnp.arange(T) >= first) & (jnp.arange(T) < first + 6)
        padded = positions.relative_attention(*at(first), *tables, mask=seen[None, None, None])
        np.testing.assert_allclose(padded[:, first:first + 6], plain, atol=1e-13)
    places = 100 + jnp.arange(6)
    np.testing.assert_allclose(positions.relative_attention(*map(short, (q, k, v)), *tables, query_positions=places, key_positions=places), plain, atol=1e-13)


def test_far_offsets_are_one(x64):
    """Exchanging the keys and values at offsets c + 2 and c + 7 changes nothing; at c - 1 and c + 7 it does."""
    (q, k, v, *tables), _ = inputs(keys=T)
    exchange = lambda x, i, j: x.at[:, jnp.array([i, j])].set(x[:, jnp.array([j, i])])
    out = lambda i, j: positions.relative_attention(q, exchange(k, i, j), exchange(v, i, j), *tables)[:, 0]
    np.testing.assert_allclose(out(CLIP + 2, CLIP + 7), out(0, 0), atol=1e-13)
    assert jnp.abs(out(CLIP - 1, CLIP + 7) - out(0, 0)).max() > 1e-2


def test_labels(x64):
    """Labels of clipped offsets are relative attention; permuted nodes have permuted outputs; a label without vectors has none."""
    (q, k, v, *tables), _ = inputs(keys=T)
    labels = (jnp.clip(jnp.arange(T) - jnp.arange(T)[:, None], -CLIP, CLIP) + CLIP)[None]
    for implementation in ("reference", "bucketed"):
        attend = partial(positions.edge_label_attention, implementation=implementation)
        np.testing.assert_allclose(attend(q, k, v, labels, *tables), positions.relative_attention(q, k, v, *tables), atol=1e-12)
    kinds = jax.random.randint(jax.random.key(0), (2, T, T), -1, 2 * CLIP + 1)
    order = jax.random.permutation(jax.random.key(1), T)
    out = attend(q, k, v, kinds, *tables)
    np.testing.assert_allclose(attend(*(x[:, order] for x in (q, k, v)), kinds[:, order][:, :, order], *tables), out[:, order], atol=1e-12)
    np.testing.assert_allclose(attend(q, k, v, 0 * kinds - 1, *tables), attnx.attention(q, k, v), atol=1e-12)
    np.testing.assert_allclose(attend(q, k, v, kinds, *tables, block_size=4), out, atol=1e-12)


def test_bert_form(x64):
    """Keys alone, tables read at i - j as in the 'relative_key' form of BERT, written out: q_i . (k_j + d_(i - j + L - 1)) / sqrt(H)."""
    (q, k, v, _, _), _ = inputs(keys=T)
    distance = jax.random.normal(jax.random.key(5), (2 * T - 1, 5))
    scores = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, 2, 2))
    of = distance[jnp.arange(T)[:, None] - jnp.arange(T) + T - 1]
    w = jax.nn.softmax((scores + jnp.einsum("btnh,tsh->bnts", q, of)) / 5**0.5)
    expected = jnp.einsum("bnts,bsnv->btnv", w, jnp.repeat(v, 2, 2))
    np.testing.assert_allclose(positions.relative_attention(q, k, v, distance[::-1]), expected, atol=1e-12)


def test_skew():
    """Skew reads what its name says, and unskew undoes it, being its transpose."""
    offsets = jax.random.normal(jax.random.key(0), (2, 4, 9))
    for rows in (1, 4):
        x = offsets[:, :rows, :6 + rows - 1]
        y = positions.skew(x)
        assert y.shape == (2, rows, 6)
        for t in range(rows):
            np.testing.assert_array_equal(y[:, t], x[:, t, rows - 1 - t:rows - 1 - t + 6])
        np.testing.assert_array_equal(positions.skew(positions.unskew(y)), y)
        np.testing.assert_array_equal(positions.unskew(y), jax.vjp(positions.skew, x)[1](y)[0])


def test_memory():
    """The temporaries of a gradient grow with T, not with T^2 or T^2 H: four times the length, less than five times the memory."""
    def temporary(length):
        q, table = jax.ShapeDtypeStruct((1, length, 1, 32), jnp.float32), jax.ShapeDtypeStruct((9, 32), jnp.float32)
        loss = lambda q, *tables: jnp.sum(positions.relative_attention(q, q, q, *tables, block_size=2**19 // length) ** 2)
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, table, table).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(2048), temporary(8192)
    assert long < 2 * short and long < 8192 * 8192 * 4 / 4


def test_dropout():
    """The same pattern in every form, on weights that both sums use."""
    args, _ = inputs(jnp.float32)
    forms = [positions.relative_attention(*args, implementation=name, block_size=size, dropout_rate=0.5, dropout_key=jax.random.key(0))
             for name, size in (("reference", None), ("bucketed", 4), ("skew", 5))]
    for form in forms[1:]:
        np.testing.assert_allclose(form, forms[0], atol=2e-6)
    assert jnp.abs(forms[0] - positions.relative_attention(*args)).max() > 0.1


@pytest.mark.parametrize("options", [dict(), dict(tables="keys"), dict(tables="values", per_head=True, num_kv_heads=2)])
def test_layer(options):
    """Prefill and steps find what the call finds; every parameter has a gradient; documents do not see each other."""
    layer = positions.RelativeSelfAttention(16, 4, clip=2, is_causal=True, rngs=nnx.Rngs(0), **options)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    x = jax.random.normal(jax.random.key(0), (2, 7, 16))

    @jax.jit
    def both(params, x):
        layer = nnx.merge(graph, params, rest)
        state, first = layer.step(layer.init_state(2, 7), x[:, :5])
        outs = [first]
        for t in range(5, 7):
            state, out = layer.step(state, x[:, t:t + 1])
            outs.append(out)
        ids = jnp.broadcast_to(jnp.arange(7) >= 3, (2, 7)).astype(jnp.int32)
        return layer(x), jnp.concatenate(outs, 1), layer(x, segment_ids=ids)[:, 3:], layer(x[:, 3:])

    whole, stepped, packed, apart = both(params, x)
    np.testing.assert_allclose(stepped, whole, atol=2e-6)
    np.testing.assert_allclose(packed, apart, atol=2e-6)
    slopes = jax.jit(jax.grad(lambda params: jnp.sum(both(params, x)[0] ** 2)))(params)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(slopes))
    assert len(jax.tree.leaves(params)) == 6 - ("tables" in options)


def test_errors():
    """Wrong arguments are named."""
    (q, k, v, a, b), _ = inputs(jnp.float32)
    labels = jnp.zeros((1, T, S), int)
    for match, call in (("key_table: expected at least one", lambda: positions.relative_attention(q, k, v)),
                        ("key_table: expected an odd", lambda: positions.relative_attention(q, k, v, a[1:])),
                        ("value_table: expected as many", lambda: positions.relative_attention(q, k, v, a, b[2:])),
                        ("key_table: expected shape", lambda: positions.relative_attention(q, k, v, b)),
                        ("mask: expected", lambda: positions.relative_attention(q, k, v, a, mask=jnp.ones((2, T, S), bool))),
                        ("segment_ids: expected", lambda: positions.relative_attention(q, k, v, a, segment_ids=jnp.zeros((2, T), int))),
                        ("labels: expected", lambda: positions.edge_label_attention(q, k, v, labels[:, 1:], a)),
                        ("tables: expected", lambda: positions.RelativeSelfAttention(16, 4, tables="none", rngs=nnx.Rngs(0)))):
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(NotImplementedError, match="skew"):
        positions.relative_attention(q, k, v, a, query_positions=jnp.arange(T), implementation="skew")
