"""The paper: attention is the posterior mean of values over hidden edges, and what structure the edges are taken to have makes the mechanism. It is a unification and has
no numbers; what follows from it is that the structure should matter where it is that of the data.

Here: a query is the sum of one or two of 16 keys (size 8, noise 0.3) and asks for the mean of their values. Potentials are q W_q (k W_k)^T / sqrt(8), with both
matrices learned in 500 steps of 128 queries; the output is the posterior mean with one edge (softmax) or with two distinct edges, at equal parameters.
The mean squared error is relative to that of always answering zero.
The claim holds if with two keys two edges have at least 10% less error than one, and with one key at least as much.
"""

import jax
import jax.numpy as jnp

from attnx import weights
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars
from experiments.fit import fit
from experiments.tasks import planted

SIZE = 8
STRUCTURES = ("categorical", "pairs")


def _answer(structure, params, query, keys, values):
    potentials = jnp.einsum("bd,bkd->bk", query @ params["query"], keys @ params["key"]) / SIZE**0.5
    return weights.marginal_attention(potentials[:, None, None], values[:, :, None], structure=structure)[0][:, 0, 0]


def run(trial: Trial):
    """Both structures on data of either kind."""
    measured = {}
    cases = [(count, structure) for count in (1, 2) for structure in STRUCTURES]
    for index, (count, structure) in enumerate(cases):
        answer = lambda params, batch, structure=structure: _answer(structure, params, *batch[:3])
        first, second = jax.random.split(jax.random.key(trial.seed))
        params = {"query": jnp.eye(SIZE) + 0.1 * jax.random.normal(first, (SIZE, SIZE)), "key": jnp.eye(SIZE) + 0.1 * jax.random.normal(second, (SIZE, SIZE))}
        loss = lambda params, batch, key, answer=answer: jnp.mean((answer(params, batch) - batch[3]) ** 2)
        params = fit(loss, params, planted.sampler(count, 128), steps=trial.scaled(500), trial=trial.part(index / 4, (index + 1) / 4), learning_rate=1e-2,
                     name=f"{structure}, {count} planted")
        batch = planted.sampler(count, trial.scaled(8192, 16))(jax.random.key(10_000 + trial.seed))
        measured[f"{structure}, {count}"] = jnp.mean((jax.jit(answer)(params, batch) - batch[3]) ** 2) / jnp.mean(batch[3] ** 2)
    return measured


def draw(figure, seeds):
    """Errors of both structures on both kinds of data."""
    for axes, count in zip(figure.subplots(1, 2), (1, 2)):
        bars(axes, {name: [seed[f"{name}, {count}"] for seed in seeds] for name in STRUCTURES}, f"relative error, {count} planted key{'s' * (count > 1)}")


claim = Claim(
    id="marginal-attention",
    run=run,
    criteria=(
        Criterion("relative error with two keys: two edges at least 10% below one", lambda m: 0.9 * m["categorical, 2"] - m["pairs, 2"]),
        Criterion("relative error with one key: two edges no lower than one", lambda m: m["pairs, 1"] - m["categorical, 1"])),
    table=(("", "one key planted", "two keys planted"), {"one edge": ("categorical, 1", "categorical, 2"), "two edges": ("pairs, 1", "pairs, 2")}),
    draw=draw)
