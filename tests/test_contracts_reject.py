"""The contracts reject mechanisms that are broken, each by the contract that is about its defect."""

import functools

import contracts
import jax
import jax.numpy as jnp
import pytest

from attnx.catalogue import PATTERNS, SEEN, Example

DEFECTS = {
    "leaks the future": "causality",
    "sees no last key": "causality",
    "sums in 16 bits": "sixteen_bits",
    "wrong gradient": "gradients",
    "no gradient at zero": "gradients_at_zero",
    "mixes the batch": "batch_independence",
    "changes the dtype": "shapes_and_dtypes",
    "ignores the mask": "mask_respect",
    "masked rows are uniform": "mask_respect",
    "does not refuse": "refusals",
    "forms disagree": "executions",
    "forms disagree at odd lengths": "lengths",
    "depends on tracing": "jit_is_eager",
}


@jax.custom_jvp
def halved(x):
    return x


halved.defjvp(lambda primals, tangents: (primals[0], tangents[0] / 2))


def attend(defect, case, query, key, value, seen):
    """Single-head attention, with a defect."""
    dtype = value.dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    if case.cross and defect != "does not refuse":
        raise NotImplementedError("no cross-attention")
    if defect == "mixes the batch":
        query = query + query.mean(0)
    if defect == "wrong gradient":
        query = halved(query)
    if defect == "no gradient at zero":
        query = query / jnp.linalg.norm(query, axis=-1, keepdims=True).clip(1e-9)
    s = jnp.einsum("bth,bsh->bts", query.astype(wide), key.astype(wide))
    ok = jnp.ones(s.shape, bool) if defect == "ignores the mask" else jnp.broadcast_to(seen[:, None], s.shape)
    if defect == "sees no last key" and not case.causal:
        ok = ok & (jnp.arange(s.shape[2]) < s.shape[2] - 1)
    if case.causal:
        ok = ok & jnp.tril(jnp.ones(s.shape[1:], bool), 1 if defect == "leaks the future" else 0)
    least = jnp.full_like(s, -1e30)
    e = jnp.exp(jnp.where(ok, s - jnp.where(ok, s, least).max(-1, keepdims=True, initial=-1e30), -1e30 if defect != "masked rows are uniform" else 0))
    e = e if defect == "masked rows are uniform" else jnp.where(ok, e, 0)
    total = e.sum(-1, keepdims=True)
    if defect == "sums in 16 bits":
        total = jax.lax.fori_loop(0, e.shape[2], lambda i, t: t + e[:, :, i, None].astype(dtype), jnp.zeros_like(total, dtype)).astype(wide)
    if defect == "depends on tracing" and isinstance(query, jax.core.Tracer):
        total = total * 1.01
    if case.execution == "blockwise" and (defect == "forms disagree" or defect == "forms disagree at odd lengths" and s.shape[1] % 2 == 0):
        total = total + 1e-6
    out = jnp.einsum("bts,bsv->btv", jnp.where(total > 0, e / jnp.where(total > 0, total, 1), 0), value.astype(wide))
    return out if defect == "changes the dtype" else out.astype(dtype)



def example(defect):
    """The example, in self-attention."""
    return Example(functools.partial(attend, defect), {"query": "bth", "key": "bsh", "value": "bsv", "seen": SEEN}, "btv", PATTERNS[:2],
                   ("reference", "blockwise"), "seen", sizes=dict(h=3, v=2))


def test_sound():
    """Without a defect nothing is rejected, in any claimed pattern."""
    for pattern in PATTERNS[:2]:
        contracts.check(example(None), pattern)


@pytest.mark.parametrize("defect", DEFECTS)
def test_rejected(defect):
    """A defect breaks its contract in some claimed pattern."""
    with pytest.raises(contracts.Broken, match=f"^{DEFECTS[defect]}:"):
        for pattern in PATTERNS[:2]:
            contracts.check(example(defect), pattern)
