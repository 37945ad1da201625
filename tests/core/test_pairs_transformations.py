"""jit, vmap, remat, scan, shard_map, higher derivatives and dropout of the pairs engine."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import arrays, assert_agree
from jax.sharding import Mesh, PartitionSpec

import attnx
from attnx import masks, scores, weights

T, S, N = 13, 11, 4
blockwise = partial(attnx.attention, implementation="blockwise", block_sizes=(4, 4))
reference = partial(attnx.attention, implementation="reference")


def documents(seed):
    ids = [jnp.sort(jax.random.randint(jax.random.key(seed + i), (2, n), 0, 3)) for i, n in enumerate((T, S))]
    return masks.documents(*ids)


def stack(trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


@pytest.mark.usefixtures("x64")
def test_vmap():
    """Over query, key, value and traced mask data, with a shared bias: the same as one by one, forward and backward."""
    table = jax.random.normal(jax.random.key(9), (8, N))
    calls = stack([(*arrays(seed=i), documents(i)) for i in range(3)])

    def derivatives(attend, query, key, value, cotangent, mask):
        def loss(query, key, value, table):
            out = attend(query, key, value, scores=scores.t5_bias(table, max_distance=9), mask=mask)
            return jnp.vdot(out, cotangent), out
        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(query, key, value, table)

    got = jax.jit(jax.vmap(partial(derivatives, blockwise)))(*calls)
    one = jax.jit(partial(derivatives, reference))
    assert_agree(got, stack([one(*jax.tree.map(lambda x: x[i], calls)) for i in range(3)]))


@pytest.mark.usefixtures("x64")
def test_scan_over_rematerialised_layers():
    """Layers under scan and remat with dropout: recomputation draws the same pattern, so gradients are those of a plain loop."""
    x, *_ = arrays(heads=2, kv_heads=2, queries=T)
    layers = jax.random.normal(jax.random.key(1), (3, 4, 5, 5)) / 2
    keys = jax.random.split(jax.random.key(2), 3)

    def layer(attend, x, parameters):
        (q, k, v, o), key = parameters
        return x + attend(x @ q, x @ k, x @ v, mask=masks.causal(), dropout_rate=0.2, dropout_key=key) @ o, None

    def scanned(x, layers):
        return jnp.sin(jax.lax.scan(jax.checkpoint(partial(layer, blockwise)), x, (layers, keys))[0]).sum()

    def looped(x, layers):
        for i in range(3):
            x, _ = layer(reference, x, (layers[i], keys[i]))
        return jnp.sin(x).sum()

    got, expected = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(x, layers) for f in (scanned, looped))
    assert_agree(got, expected)


@pytest.mark.usefixtures("x64")
def test_shard_map():
    """Over batch and heads of a mesh, the bias table replicated over the batch: gradients of local arrays, and the sum for the table."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    data, sharded = PartitionSpec("data"), PartitionSpec("data", None, "tensor")
    query, key, value, cotangent = arrays()
    table = jax.random.normal(jax.random.key(9), (8, N))
    mask = documents(0)

    def derivatives(attend, query, key, value, cotangent, table, mask):
        def loss(query, key, value, table):
            return jnp.vdot(attend(query, key, value, scores=scores.t5_bias(table, max_distance=9), mask=mask), cotangent)
        return jax.grad(loss, argnums=(0, 1, 2, 3))(query, key, value, table)

    local = jax.shard_map(partial(derivatives, blockwise), mesh=mesh, in_specs=(sharded,) * 4 + (PartitionSpec(None, "tensor"), data),
                          out_specs=(sharded,) * 3 + (PartitionSpec(None, "tensor"),))
    call = (query, key, value, cotangent, table, mask)
    assert_agree(jax.jit(local)(*call), jax.jit(partial(derivatives, reference))(*call))


SECOND = {"softmax with a sink and a bias": (weights.softmax(sink=0.3), lambda bias: scores.bias(bias)), "entmax-1.5": (weights.entmax15(), lambda bias: ())}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives(name):
    """The gradient of a function of all first gradients."""
    primals = (*arrays(queries=6, keys=5)[:3], jax.random.normal(jax.random.key(9), (6, 5)))
    part, change = SECOND[name]

    def loss(attend, primals):
        def first(primals):
            *arrays, bias = primals
            return jnp.sin(attend(*arrays, scores=change(bias), mask=masks.causal(), weights=part)).sum()
        return sum(jnp.cos(g * (i + 1)).sum() for i, g in enumerate(jax.grad(first)(primals)))

    got, expected = (jax.jit(jax.grad(partial(loss, attend)))(primals) for attend in (blockwise, reference))
    assert_agree(got, expected, 1e-10)


@pytest.mark.parametrize("part", [weights.softmax(), weights.sigmoid(), weights.entmax15()], ids=["softmax", "sigmoid", "entmax"])
def test_forward_mode_raises(part):
    """Forward mode is for the reference; elsewhere JAX says so."""
    q, k, v, _ = arrays(jnp.float32)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jit(lambda q: jax.jvp(lambda q: blockwise(q, k, v, weights=part), (q,), (q,))).lower(q)


TRACES = []


def counted(s, at, slope):
    TRACES.append(s.shape)
    return s * slope


def counted_mask(at, least):
    TRACES.append(at.key.shape)
    return at.key >= least


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_new_values_need_no_recompilation(implementation):
    """New arrays in every part, positions and dropout keys: traced once, without an outer jit too, and by a part built anew each time."""
    compiled = []
    listener = lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None

    def call(i):
        q, k, v, _ = arrays(jnp.float32, seed=i)
        out = attnx.attention(
            q, k, v, scores=(scores.elementwise(counted, jnp.float32(i)), scores.bias(jnp.full((T, S), i, jnp.float32)), scores.soft_cap(jnp.float32(i + 1))),
            mask=masks.documents(jnp.full(T, i), jnp.full(S, i)) & masks.predicate(counted_mask, jnp.asarray(i)),
            weights=weights.softmax(sink=jnp.float32(i)), query_positions=jnp.arange(T) + i, dropout_rate=0.1, dropout_key=jax.random.key(i),
            implementation=implementation)
        return jax.block_until_ready(out)

    TRACES.clear()
    call(0)
    call(1)  # eager conversions of the second call's arguments are compiled too
    assert TRACES
    TRACES.clear()
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        call(2)
        call(3)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert TRACES == [] and compiled == []


def test_parts_of_other_classes_have_other_structures():
    """What jit's cache is keyed by; also inside of other parts."""
    causal, alike = masks.causal(), [weights.laplace(), weights.relu(), weights.softpick()]
    pairs = [*itertools.combinations(alike, 2), (causal & causal, causal | causal), (~(causal & causal), ~(causal | causal))]
    for a, b in pairs:
        assert a != b and jax.tree.structure(a) != jax.tree.structure(b), (a, b)
        assert a == type(a)(**vars(a)) and jax.tree.structure(a) == jax.tree.structure(type(a)(**vars(a)))
    (path, leaf), = jax.tree.leaves_with_path(weights.softmax(sink=1.0))
    assert leaf == 1 and jax.tree_util.keystr(path) == ".extra"


# Dropout ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_dropout_is_the_same_in_every_execution():
    """The output is that of the dropped weights, whatever the execution and the tiles."""
    q, k, v, _ = arrays()
    options = dict(mask=masks.causal(), dropout_rate=0.4, dropout_key=jax.random.key(1))

    @jax.jit
    def run():
        dropped = attnx.attention_weights(q, k, **options)
        return (jnp.einsum("bnts,bsnv->btnv", dropped, jnp.repeat(v, 2, axis=2)),
                [reference(q, k, v, **options), blockwise(q, k, v, **options), blockwise(q, k, v, **options | {"block_sizes": (3, 16)})])

    expected, got = run()
    assert_agree(got, [expected] * 3, 1e-13)


def test_dropout_is_unbiased():
    """The share of dropped weights is the rate, in every batch element, head, row and column; kept ones are divided by 1 - rate;
    neighbours, heads and keys are independent."""
    rate, (b, n, t, s) = 0.3, (2, 4, 128, 128)
    q, k = jnp.zeros((b, t, n, 1)), jnp.zeros((b, s, n, 1))
    one, other = (np.asarray(attnx.attention_weights(q, k, dropout_rate=rate, dropout_key=jax.random.key(i))) * s for i in range(2))
    np.testing.assert_allclose(one[one > 0], 1 / (1 - rate), rtol=1e-5)
    dropped = (one == 0) - rate
    deviation = lambda count: np.sqrt(rate * (1 - rate) / count)
    assert abs(dropped.mean()) < 4 * deviation(one.size)
    for axes in ((1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):
        means = dropped.mean(axes)
        assert np.abs(means).max() < 5 * deviation(one.size / means.size)
    pairs = [(dropped[..., 1:], dropped[..., :-1]), (dropped[..., 1:, :], dropped[..., :-1, :]), (dropped[:, 1:], dropped[:, :-1]),
             (dropped[1:], dropped[:-1]), (dropped, (other == 0) - rate)]
    for x, y in pairs:
        assert abs((x * y).mean()) < 5 * rate * (1 - rate) / np.sqrt(x.size)


def test_no_dropout_at_rate_zero():
    """A rate of 0 needs no key and changes nothing."""
    q, k, v, _ = arrays(jnp.float32)
    assert_agree(reference(q, k, v, dropout_rate=0.0, dropout_key=jax.random.key(0)), reference(q, k, v), 0)
