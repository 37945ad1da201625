"""Mega."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from attnx import mixers, weights
from attnx.catalogue.entry import Entry, Example, Input, stream
from attnx.core.convolve import ema_init

SEEN = Input("bt", lambda normal: normal > -1)
LONGEST = 300


def attend(case, query, key, value, table, **options):
    """Attention without averages."""
    return mixers.gated_attention(query, key, value, table, causal=case.causal, implementation=case.implementation, block_sizes=case.block_sizes, **options)


def average(case, x, seen, **params):
    """Averages alone."""
    params = mixers.EMA(**params)
    if case.causal == (params.delta.shape[0] != x.shape[2]):
        raise NotImplementedError("averages of D rows are causal, those of 2 D rows are not")
    if case.execution == "step":
        step = lambda state, token: mixers.multihead_ema(token, params, initial_state=state, return_state=True)[::-1]
        return stream(step, ema_init(x.shape[0], params.delta, x.dtype), x)
    positions = jnp.where(seen, jnp.arange(x.shape[1], dtype=jnp.int32), -1)
    form = {"reference": "direct"}.get(case.execution, case.execution)
    return mixers.multihead_ema(x, params, positions=positions, implementation=form)


@functools.cache
def _layer():
    return nnx.split(mixers.MegaLayer(16, 8, 6, 3, chunk=4, activation="laplace", rngs=nnx.Rngs(0)), nnx.Param)


def parameters(key):
    """Of the layer, larger than at the start of a training."""
    leaves, structure = jax.tree.flatten(_layer()[1])
    return jax.tree.unflatten(structure, [0.5 * jax.random.normal(key, x.shape) for key, x in zip(jax.random.split(key, len(leaves)), leaves)])


def layer(case, x, seen, params):
    """The whole layer, with chunks of four tokens."""
    if not case.causal:
        raise NotImplementedError("the layer of the example is causal")
    module = nnx.merge(_layer()[0], params)
    module.implementation = case.implementation
    if case.execution == "step":
        return stream(module.step, module.init_state(x.shape[0], x.shape[1], dtype=x.dtype), x)
    return module(x, positions=jnp.where(seen, jnp.arange(x.shape[1], dtype=jnp.int32), -1))


def averages(rows, pattern, executions, name):
    """An example of averages with that many rows."""
    inputs = {"x": "btd", "seen": SEEN, "delta": "om", "alpha": "om", "beta": "om", "gamma": "om", "omega": "d"}
    return Example(average, inputs, "btd", (pattern,), executions, "seen", "finite", linear="t", sizes={"o": rows, "m": 3}, name=name)


def attentions(name, table, **options):
    """An example of attention with a table of that size."""
    return Example(functools.partial(attend, **options), {"query": "bth", "key": "bsh", "value": "bsv", "table": "o"}, "btv", ("causal self", "noncausal self"),
                   ("reference", "blockwise", "pallas", "ring"), local="chunk" in options, sizes={"o": table}, name=name)


entry = Entry(
    id="mega",
    objects=(mixers.MegaLayer, mixers.multihead_ema, mixers.gated_attention, mixers.NormalizedFFN, mixers.EMA, mixers.rotary_table, weights.laplace,
             weights.relu_squared),
    equation="""h_t = (1 - p a) h_(t-1) + p beta x_t,      e_t = silu(<gamma, h_t> / sqrt(n) + omega x_t)
q, k, gates from e;      out_i = sum over j of f(q_i . k_j / n_i + b_(j-i)) v_j,      v = silu(x W_v)
Y = X + u (silu(c + (out r) W_h) - X)""",
    claim="One head over averaged tokens does better than a transformer on long sequences, and nearly as well with attention in chunks.",
    examples=(attentions("laplace, in chunks", 7, activation="laplace", chunk=4), attentions("softmax", 2 * LONGEST - 1, activation="softmax"),
              averages(16, "causal self", ("reference", "fft", "chunked", "step"), "averages"),
              averages(32, "noncausal self", ("reference", "fft", "chunked"), "averages both ways"),
              Example(layer, {"x": "btd", "seen": SEEN, "params": parameters}, "btd", ("causal self",), ("reference", "blockwise", "step"), "seen", "finite",
                      linear="t", name="layer")),
    notes="Padding enters no average and is seen by no token, but keeps its residual. The Laplace weight has the paper's constants, unrounded.",
)
