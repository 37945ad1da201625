"""The ring against the definition, on eight forced devices, in float64: outputs, residuals and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import attnx
from attnx import masks, scores, weights
from attnx.core.attention import prepare
from attnx.core.ring import choose_ring
from attnx.core.tiling import Tiling

T, SHAPES = 61, {"query": (2, 61, 4, 8), "key": (2, 61, 2, 8), "value": (2, 61, 2, 6), "cotangent": (2, 61, 4, 6)}


def mesh_of(**sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def cases():
    keys = jax.random.split(jax.random.key(0), 4)
    ids = jnp.sort(jax.random.randint(keys[0], (2, T), 0, 4), -1)
    causal = masks.causal()
    return {
        "unmasked": {},
        "window": dict(mask=masks.sliding_window(9)),
        "documents, T5 bias, dropout": dict(mask=causal & masks.documents(ids), scores=scores.t5_bias(jax.random.normal(keys[1], (32, 4))),
                                            dropout_rate=0.2, dropout_key=jax.random.key(9)),
        "bias, sink": dict(mask=causal, scores=scores.bias(jax.random.normal(keys[2], (4, T, T))), weights=weights.softmax(sink=jnp.arange(4.0))),
        "per-key bias, softpick": dict(mask=causal, scores=scores.bias(jax.random.normal(keys[3], (2, 1, 1, T))), weights=weights.softpick()),
        "sigmoid": dict(mask=causal, weights=weights.sigmoid(bias=jnp.arange(4.0))),
        "entmax": dict(mask=causal, weights=weights.entmax15()),
    }


def values_and_gradients(attend, case):
    rest = {name: case[name] for name in ("mask", "dropout_rate", "dropout_key") if name in case}
    *qkv, cotangent = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(SHAPES.values()))

    def loss(qkv, score, weight):
        out = attend(*qkv, scores=score, weights=weight, **rest)
        return (out * cotangent).sum(), out

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    return jax.tree.leaves(gradient(qkv, case.get("scores", ()), case.get("weights", weights.softmax())))


@pytest.mark.parametrize("name", cases())
def test_ring_is_the_definition(x64, name):
    case = cases()[name]
    want = values_and_gradients(lambda *a, **k: attnx.attention(*a, implementation="reference", **k), case)
    layouts = [(mesh_of(data=2, sequence=2, tensor=2), None), (mesh_of(sequence=4), None)]
    if name == "unmasked":
        layouts.append((mesh_of(sequence=4), True))
    if name == "documents, T5 bias, dropout":
        layouts.append((mesh_of(sequence=4), False))
    for mesh, zigzag in layouts:
        got = values_and_gradients(lambda *a, **k: attnx.ring_attention(*a, mesh=mesh, zigzag=zigzag, block_sizes=(4, 8), **k), case)
        for a, b in zip(want, got, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_the_residual_and_its_gradient(x64):
    q, k, v = (jax.random.normal(jax.random.key(i), SHAPES[n]) for i, n in enumerate(("query", "key", "value")))
    with jax.set_mesh(mesh_of(sequence=2)):
        ring = jax.jit(jax.value_and_grad(lambda q: attnx.attention(q, k, v, mask=masks.causal(), implementation="ring", return_residual=True)[1].sum()))(q)
    full = jax.jit(jax.value_and_grad(lambda q: attnx.row_statistics(q, k, mask=masks.causal()).sum()))(q)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), ring, full)


def test_each_device_does_the_same_causal_work():
    """Of 2P chunks device d folds d and 2P-1-d, so every device sees the same number of allowed pairs."""
    q = jnp.zeros((1, 64, 1, 4))
    _, program, data = prepare(q, q, None, mask=masks.causal())
    ring = choose_ring(program, data, Tiling(8, 8, 1), mesh_of(sequence=4))
    assert ring.zigzag
    positions = jnp.arange(64, dtype=jnp.int32)
    spec = jax.sharding.PartitionSpec("sequence")
    dealt = jax.shard_map(lambda p: ring._deal(p, 0), mesh=ring.mesh, in_specs=spec, out_specs=spec)(positions)
    home = jax.shard_map(lambda p: ring._deal(ring._deal(p, 0), 0, back=True), mesh=ring.mesh, in_specs=spec, out_specs=spec)(positions)
    np.testing.assert_array_equal(home, positions)
    work = [int((p + 1).sum()) for p in np.asarray(dealt).reshape(4, 16)]
    assert len(set(work)) == 1
    assert (np.diff(np.asarray(dealt).reshape(4, 2, 8)) == 1).all()  # chunks stay whole, so tiles stay full or empty


def test_a_window_stops_the_ring_early():
    q = jnp.zeros((1, 64, 1, 4))
    mesh = mesh_of(sequence=8)
    for window, steps in ((1, 1), (8, 2), (9, 2), (10, 3), (64, 8)):
        _, program, data = prepare(q, q, None, mask=masks.sliding_window(window))
        assert choose_ring(program, data, Tiling(8, 8, 1), mesh).steps == steps


def test_no_transfer_gathers_the_sequence():
    q = jax.ShapeDtypeStruct((1, 64, 2, 8), jnp.float32)
    attend = jax.jit(lambda q: attnx.ring_attention(q, q, q, mesh=mesh_of(sequence=8), mask=masks.causal()))
    sharding = jax.sharding.NamedSharding(mesh_of(sequence=8), jax.sharding.PartitionSpec(None, "sequence"))
    text = jax.jit(attend, in_shardings=sharding).lower(q).compile().as_text()
    assert "collective-permute" in text and "all-gather" not in text


def test_what_it_lacks_is_said():
    q = jnp.ones((1, 8, 1, 4))
    with pytest.raises(ValueError, match=r"axis_name: expected an axis of the mesh .* got 'sequence'"):
        attnx.ring_attention(q, q, q)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        loss = lambda q: jax.grad(lambda q: attnx.ring_attention(q, q, q, mesh=mesh_of(sequence=2)).sum())(q).sum()
        jax.grad(loss)(q)


def test_a_mesh_in_context_is_used_by_itself():
    """Sharded batch, heads and sequence stay where they are: no whole-array collectives, and the same numbers."""
    q, k, v = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(2, 64, 4, 8), (2, 64, 2, 8), (2, 64, 2, 8)]))
    attend = jax.jit(lambda q, k, v: attnx.attention(q, k, v, mask=masks.causal()))
    want = attend(q, k, v)
    for sizes, spec in ((dict(data=2, sequence=2, tensor=2), ("data", "sequence", "tensor")), (dict(data=2, tensor=2), ("data", None, "tensor"))):
        mesh = mesh_of(**sizes)
        with jax.set_mesh(mesh):
            placed = [jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))) for x in (q, k, v)]
            compiled = attend.lower(*placed).compile()
            np.testing.assert_allclose(compiled(*placed), want, rtol=1e-5, atol=1e-6)
        assert "all-gather" not in compiled.as_text()
