"""Multi-token attention: its convolutions written out, an oracle, documents, what starts it off, the layers around it, and its memory."""

import agreement
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from flax import nnx
from jax import lax

import attnx
from attnx import masks, scores

T, N = 7, 4


def inputs(dtype=jnp.float64, seed=0):
    return agreement.arrays(dtype, batch=2, queries=T, keys=T, heads=N, kv_heads=2, size=8, value_size=6, seed=seed)[:3]


attend, convolve = jax.jit(scores.multi_token_attention, static_argnames="block_size"), jax.jit(scores.key_query_conv)


def kernels(dtype=jnp.float64, queries=3, keys=5):
    made = [jax.random.normal(key, shape, dtype) for key, shape in zip(jax.random.split(jax.random.key(7), 4), [(N, queries, keys), (2, 2, 2)] * 2)]
    return scores.Mixing(*made)


def convolved(s, kernel):
    """[B, N, T, T] by loops over rows, keys and taps."""
    s, kernel = np.asarray(s), np.asarray(kernel)
    _, queries, keys = kernel.shape
    out = np.zeros(s.shape)
    for i in range(T):
        for j in range(T):
            for a in range(queries):
                for b in range(-(keys // 2), keys // 2 + 1):
                    if 0 <= j + b <= i - a:
                        out[:, :, i, j] += kernel[:, queries - 1 - a, keys // 2 + b] * s[:, :, i - a, j + b]
    return out


def dense_convolution(s, kernel):
    """The same by the library of convolutions, differentiable."""
    _, queries, keys = kernel.shape
    seen = jnp.where(jnp.tril(jnp.ones((T, T), bool)), s, 0)
    return lax.conv_general_dilated(seen, kernel[:, None], (1, 1), ((queries - 1, 0), (keys // 2, keys // 2)), feature_group_count=N)


def test_convolution(x64):
    """Loops, and a grouped convolution of the padded map; a score that is not seen counts 0, however large."""
    s, (kernel, *_) = jax.random.normal(jax.random.key(0), (2, N, T, T)), kernels()
    got = convolve(s, kernel)
    np.testing.assert_allclose(got, convolved(s, kernel), atol=1e-12)
    np.testing.assert_allclose(got, dense_convolution(s, kernel), atol=1e-12)
    above = jnp.triu(jnp.ones((T, T), bool), 1)
    np.testing.assert_array_equal(convolve(jnp.where(above, -jnp.inf, s), kernel), got)


def test_head_mix(x64):
    """From a group's heads, the rows, to its new ones."""
    s, (_, mix, *_) = jax.random.normal(jax.random.key(0), (2, N, T, T)), kernels()
    got = scores.head_mix(s, mix)
    for group in range(2):
        for new in range(2):
            expected = sum(mix[group, old, new] * s[:, 2 * group + old] for old in range(2))
            np.testing.assert_allclose(got[:, 2 * group + new], expected, atol=1e-12)


def dense(query, key, value, mixing):
    """All steps, with other people's convolution."""
    visible = jnp.tril(jnp.ones((T, T), bool))
    blocks = [jax.scipy.linalg.block_diag(*mix) for mix in (mixing.score_mix, mixing.weight_mix)]
    s = jnp.einsum("bits,io->bots", dense_convolution(oracles.dot_products(query, key), mixing.score_kernel), blocks[0])
    w = jnp.where(visible, dense_convolution(oracles.softmax(s, jnp.broadcast_to(visible, s.shape)), mixing.weight_kernel), 0)
    return jnp.einsum("bits,io,bsov->btov", w, blocks[1], jnp.repeat(value, 2, axis=2))


def test_oracle(x64):
    """All steps at once, forward and backward, in blocks shorter than the halo."""
    args = (*inputs(), kernels())
    got, expected = (jax.jit(jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(f(*a))), (0, 1, 2, 3)))(*args) for f in (
        lambda *a: scores.multi_token_attention(*a, block_size=2), dense))
    agreement.assert_agree(got, expected)


def test_identity(x64):
    """Kernels and matrices that change nothing leave softmax attention."""
    args = inputs()
    mixing = scores.Mixing(scores.identity_kernel(N, 6, 11), scores.identity_mix(N, N), scores.identity_kernel(N, 2, 3), scores.identity_mix(N, 2))
    expected = attnx.attention(*args, mask=masks.causal())
    for given in (mixing, scores.Mixing()):
        np.testing.assert_allclose(attend(*args, given), expected, atol=1e-12)


def test_documents_and_padding(x64):
    """Packed documents are as if they were apart; padding before a sequence changes nothing."""
    args, mixing = inputs(), kernels()
    ids = jnp.broadcast_to(jnp.arange(T) >= 3, (2, T)).astype(jnp.int32)
    positions = jnp.where(jnp.arange(T) < 3, -1, jnp.arange(T) - 3)
    parts = [attend(*(x[:, cut] for x in args), mixing) for cut in (slice(0, 3), slice(3, T))]
    packed = attend(*args, mixing, segment_ids=ids, block_size=4)
    np.testing.assert_allclose(packed, jnp.concatenate(parts, axis=1), atol=1e-12)
    np.testing.assert_allclose(attend(*args, mixing, positions=positions)[:, 3:], parts[1], atol=1e-12)
    s = jax.random.normal(jax.random.key(0), (2, N, T, T))
    same = (ids[:, :, None] == ids[:, None])[:, None] & jnp.tril(jnp.ones((T, T), bool))
    whole = convolve(s, mixing.score_kernel, same, segment_ids=ids)[:, :, 3:, 3:]
    np.testing.assert_allclose(whole, convolve(s[:, :, 3:, 3:], mixing.score_kernel), atol=1e-12)


OPTIONS = {"default": dict(score_kernel=(6, 11)), "all": dict(score_kernel=(2, 3), weight_kernel=(3, 5), score_mix=4, weight_mix=2, gate=True, layer=3, num_kv_heads=2),
           "heads alone": dict(score_kernel=None, weight_mix=2)}


@pytest.mark.parametrize("name", OPTIONS)
def test_layer(name):
    """Prefill and steps find what the call finds, and every parameter has a gradient."""
    layer = scores.MultiTokenAttention(16, 4, rngs=nnx.Rngs(0), **OPTIONS[name])
    x = jax.random.normal(jax.random.key(0), (2, 9, 16))
    graph, params = nnx.split(layer)
    leaves, structure = jax.tree.flatten(params)
    params = jax.tree.unflatten(structure, [x + 0.1 * jax.random.normal(key, x.shape) for key, x in zip(jax.random.split(jax.random.key(1), len(leaves)), leaves)])

    @jax.jit
    def both(params, x):
        layer = nnx.merge(graph, params)
        state = layer.init_state(batch=2, max_length=9)
        outs = []
        for begin, end in ((0, 1), (1, 8), (8, 9)):
            state, out = layer.step(state, x[:, begin:end])
            outs.append(out)
        return layer(x), jnp.concatenate(outs, axis=1)

    whole, stepped = both(params, x)
    np.testing.assert_allclose(stepped, whole, atol=1e-5)
    slopes = jax.jit(jax.grad(lambda params: jnp.sum(both(params, x)[0] ** 2)))(params)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(slopes))


def test_norm_and_gate():
    """Each head's output is normalised with gains that heads share, scaled by the layer's factor, and gated by itself."""
    layer = scores.MultiTokenAttention(16, 4, gate=True, layer=2, rngs=nnx.Rngs(0))
    seen = []
    layer(jax.random.normal(jax.random.key(0), (1, T, 16)), hooks={"output": lambda value, layer, at: seen.append(value) or value})
    out = seen[0]
    normal = out / jnp.sqrt(jnp.mean(out**2, -1, keepdims=True) + 1e-5) * (1 - (0.8 - 0.6 * np.exp(-0.6)))
    np.testing.assert_allclose(layer._gated(layer.output_norm(out), None, None), normal * jax.nn.sigmoid(layer.head_gate(normal)), atol=1e-6)
    assert layer.output_norm.scale.shape == (4,)


@pytest.mark.usefixtures("optimised")
def test_linear_memory():
    """Temporary bytes of blocks of queries, gradients included, grow with the length of a row."""
    mixing = scores.Mixing(scores.identity_kernel(N, 2, 3))

    def temporary(length, implementation):
        x = jax.ShapeDtypeStruct((1, length, N, 16), jnp.float32)
        loss = lambda q, k, v, mixing: scores.multi_token_attention(q, k, v, mixing, implementation=implementation).sum()
        return jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(x, x, x, mixing).compile().memory_analysis().temp_size_in_bytes

    sizes = [temporary(length, "blockwise") for length in (1024, 2048, 4096)]
    growth = np.diff(sizes)
    assert growth[1] < 2.2 * growth[0] and 6 * sizes[-1] < temporary(4096, "reference"), sizes


def test_errors():
    """Wrong arguments are named."""
    query, key, value = inputs(jnp.float32)
    made = kernels(jnp.float32)
    for match, change in (("score_kernel: expected shape", dict(mixing=scores.Mixing(made.score_kernel[..., :4]))),
                          ("key: expected the query's", dict(query=query[:, 1:])),
                          ("weight_mix: expected shape", dict(mixing=made._replace(weight_mix=made.weight_mix[:1]))),
                          ("segment_ids: expected shape", dict(segment_ids=jnp.zeros((2, 3), int)))):
        with pytest.raises(ValueError, match=match):
            scores.multi_token_attention(**{**dict(query=query, key=key, value=value, mixing=made), **change})
    with pytest.raises(ValueError, match="group: expected a divisor"):
        scores.MultiTokenAttention(16, 4, weight_mix=3, rngs=nnx.Rngs(0))
