"""The paper: transformers whose attention weighs points by area, in disks of the sphere, beat planar ones on shallow-water dynamics, segmentation and depth.

Here: (A) the operator. Queries, keys and values are fixed linear maps of three random fields of degree 8, known at every point. The sphere is turned ten
times at random, and attention with area weights, without, and in windows of 5 by 5 points of the grid (about the nearest point) is compared with itself
unturned, at 33 by 64 and 17 by 32 points. (B) learning. Two residual blocks of width 32 with attention in disks (radius of two latitudes) or in windows of 5
by 5 points that wrap around in longitude learn the squared gradient of fields of degree 6, whose law no rotation changes, from 400 fields on 16 by 32 points,
200 steps of 8. The claim holds if the turning error with weights is under a fifth of that without at 33 by 64, and disks have an error more than 10% below
windows, everywhere and beyond 60 degrees of latitude.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import attnx
from attnx.core.axes import gather_neighbours
from attnx.geometry import NeighborhoodAttentionS2, s2_attention, sphere_quadrature
from attnx.nn import MLP
from experiments.evidence import Claim, Criterion, Trial
from experiments.figures import bars
from experiments.fit import fit, functional
from experiments.tasks import sphere

GRIDS = {"33 x 64": (33, 64), "17 x 32": (17, 32)}
OPERATORS = ("with weights", "without weights", "windows")
SHAPE, FEATURES, HEADS, REACH = (16, 32), 32, 2, 2
POLAR = np.abs(90 - np.degrees(sphere_quadrature(*SHAPE)[0])) > 60


def windows(shape, rows, columns):
    """Indices [n, 25] of the 5 by 5 points about (row, column); columns wrap, rows beyond a pole are -1."""
    near = np.arange(-REACH, REACH + 1)
    row, column = np.meshgrid(near, near, indexing="ij")
    row, column = rows[:, None] + row.reshape(-1), (columns[:, None] + column.reshape(-1)) % shape[1]
    return np.where((row >= 0) & (row < shape[0]), row * shape[1] + column, -1).astype(np.int32)


def window_attention(query, key, value, table):
    """Attention [B, T, N, H] of queries to the keys that a table lists."""
    near = lambda x: jnp.moveaxis(gather_neighbours(x, table), 3, 2)  # [B, T, N, 25, H]
    scores = jnp.einsum("btnh,btnsh->btns", query, near(key)) * query.shape[-1] ** -0.5
    return attnx.attend_scores(scores[..., None, :], near(value), mask=jnp.asarray(table >= 0)[None, :, None, None])[..., 0, :]


def run(trial: Trial):
    """Both parts."""
    errors = {f"{operator}, {grid}": value for grid, shape in GRIDS.items() for operator, value in
              _turning(trial, (9, 16) if trial.smoke else shape).items()}
    trial.report(0.1, "operators turned")
    return errors | _learning(trial.part(0.1, 1.0))


def _turning(trial, shape, size=8):
    """The relative errors of turned operators, means over rotations."""
    rng = np.random.default_rng(trial.seed)
    at = sphere.points(*shape)
    coefficients = sphere.coefficients(jax.random.key(trial.seed), 8, 3)
    maps = jnp.asarray(rng.normal(size=(3, 3, size)) / np.sqrt(3), jnp.float32)
    weights = np.sqrt(np.broadcast_to(sphere_quadrature(*shape)[1][:, None], shape))

    @jax.jit
    def features(points):
        fields = jax.vmap(lambda axes, amplitudes: sphere.field(axes, amplitudes, points)[0])(*coefficients)
        return [jnp.einsum("frl,fh->rlh", fields, m)[None, :, :, None] for m in maps]

    def plain(query, key, value):
        flat = lambda x: x.reshape(1, -1, 1, size)
        return attnx.attention(flat(query), flat(key), flat(value)).reshape(query.shape)

    def window(query, key, value, points):
        theta, lam = np.arccos(np.clip(points[..., 2], -1, 1)), np.arctan2(points[..., 1], points[..., 0]) % (2 * np.pi)
        rows = np.rint(theta / np.pi * (shape[0] - 1)).astype(int).reshape(-1)
        columns = np.rint(lam / (2 * np.pi) * shape[1]).astype(int).reshape(-1) % shape[1]
        flat = lambda x: x.reshape(1, -1, 1, size)
        return windowed(flat(query), flat(key), flat(value), windows(shape, rows, columns)).reshape(query.shape)

    windowed = jax.jit(window_attention)
    weighted, unweighted = jax.jit(s2_attention), jax.jit(plain)
    found = {name: [] for name in OPERATORS}
    _, *keys = features(at)
    for _ in range(trial.scaled(10, 1)):
        turned = at @ sphere.rotation(rng)
        query, *turned_keys = features(turned)
        pairs = ((weighted(query, *keys), weighted(query, *turned_keys)), (unweighted(query, *keys), unweighted(query, *turned_keys)),
                 (window(query, *keys, turned), window(query, *turned_keys, at)))
        for name, (one, other) in zip(OPERATORS, pairs):
            norm = lambda x: np.linalg.norm(np.asarray(x)[0, :, :, 0] * weights[..., None])
            found[name].append(norm(one - other) / norm(one))
    return {name: np.mean(values) for name, values in found.items()}


class Window(nnx.Module):
    """Multi-head :func:`window_attention` of a field [B, R, L, C]."""

    def __init__(self, rngs):
        glorot = nnx.initializers.glorot_uniform()
        dense = lambda: nnx.LinearGeneral(FEATURES, (HEADS, FEATURES // HEADS), kernel_init=glorot, rngs=rngs)
        self.query, self.key, self.value = dense(), dense(), dense()
        self.out = nnx.Linear(FEATURES, FEATURES, kernel_init=glorot, rngs=rngs)

    def __call__(self, x):
        """[B, R, L, C] to the same."""
        flat = x.reshape(len(x), -1, FEATURES)
        rows, columns = (index.reshape(-1) for index in np.indices(SHAPE))
        found = window_attention(self.query(flat), self.key(flat), self.value(flat), windows(SHAPE, rows, columns))
        return self.out(found.reshape(flat.shape)).reshape(x.shape)


ARMS = {"disks": lambda rngs: NeighborhoodAttentionS2(FEATURES, HEADS, SHAPE, theta_cutoff=REACH * float(np.pi) / (SHAPE[0] - 1), implementation="reference",
                                                      rngs=rngs),
        "windows of the grid": Window}


class Model(nnx.Module):
    """A field to a field by two residual blocks."""

    def __init__(self, attention, rngs):
        self.inputs, self.outputs = nnx.Linear(1, FEATURES, rngs=rngs), nnx.Linear(FEATURES, 1, rngs=rngs)
        self.blocks = nnx.List([nnx.List([nnx.LayerNorm(FEATURES, rngs=rngs), attention(rngs), nnx.LayerNorm(FEATURES, rngs=rngs),
                                          MLP(FEATURES, 2 * FEATURES, rngs=rngs)]) for _ in range(2)])

    def __call__(self, x):
        """[B, R, L] to the same."""
        x = self.inputs(x[..., None])
        for attention_norm, attention, norm, mlp in self.blocks:
            x = x + attention(attention_norm(x))
            x = x + mlp(norm(x).reshape(len(x), -1, FEATURES)).reshape(x.shape)
        return self.outputs(x)[..., 0]


def _learning(trial):
    """Relative errors on fields held out."""
    at, area = jnp.asarray(sphere.points(*SHAPE), jnp.float32), jnp.asarray(sphere_quadrature(*SHAPE)[1], jnp.float32)[:, None]
    make = jax.jit(jax.vmap(lambda axes, amplitudes: sphere.field(axes, amplitudes, at)))
    inputs, outputs = make(*sphere.coefficients(jax.random.key(100 + trial.seed), 6, 500))
    mean, spread = outputs[:400].mean(), outputs[:400].std()
    outputs = (outputs - mean) / spread
    measured = {}
    for index, (name, attention) in enumerate(ARMS.items()):
        params, apply = functional(Model(attention, nnx.Rngs(trial.seed)))

        def loss(params, batch, key, apply=apply):
            return jnp.mean(jnp.sum((apply(params, batch[0]) - batch[1]) ** 2 * area, axis=(1, 2))) / (4 * np.pi)

        def sample(key):
            chosen = jax.random.randint(key, (8,), 0, 400)
            return inputs[chosen], outputs[chosen]

        params = fit(loss, params, sample, steps=trial.scaled(200), trial=trial.part(0.5 * index, 0.5 * (index + 1)), name=name)
        error = (jax.jit(apply)(params, inputs[400:]) - outputs[400:]) ** 2 * area
        scale = outputs[400:] ** 2 * area
        ratio = lambda rows: jnp.sqrt(error[:, rows].sum() / scale[:, rows].sum())  # noqa: B023
        measured |= {f"{name}, everywhere": ratio(slice(None)), f"{name}, polar": ratio(POLAR)}
    return measured


def draw(figure, seeds):
    """Errors of both parts."""
    left, right = figure.subplots(1, 2)
    bars(left, {f"{operator}, {grid}": [seed[f"{operator}, {grid}"] for seed in seeds] for grid in GRIDS for operator in OPERATORS}, "relative error as turned")
    left.set_yscale("log")
    bars(right, {f"{name}, {where}": [seed[f"{name}, {where}"] for seed in seeds] for where in ("everywhere", "polar") for name in ARMS},
         "relative error, squared gradient")


claim = Claim(
    id="attention-on-sphere",
    run=run,
    criteria=(
        Criterion("error as turned at 33 x 64: with weights under a fifth of without",
                  lambda m: 0.2 * m["without weights, 33 x 64"] - m["with weights, 33 x 64"]),
        Criterion("error of what is learnt: disks more than 10% below windows", lambda m: 0.9 * m["windows of the grid, everywhere"] - m["disks, everywhere"]),
        Criterion("the same beyond 60 degrees of latitude", lambda m: 0.9 * m["windows of the grid, polar"] - m["disks, polar"])),
    table=(("", "33 x 64 or everywhere", "17 x 32 or polar"),
           {**{f"as turned, {operator}": tuple(f"{operator}, {grid}" for grid in GRIDS) for operator in OPERATORS},
            **{f"learnt, {name}": (f"{name}, everywhere", f"{name}, polar") for name in ARMS}}),
    draw=draw)
