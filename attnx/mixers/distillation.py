"""Taking attention layers out of a trained model: recording what they do, teaching a network to do the same, and putting it in their place.

The experiments of Bozic et al. (2023, arXiv 2311.10642), see :mod:`attnx.mixers.sentence_ff`, at four levels of an encoder's layer:

    ALR     attention                                        x -> attention(x), its norm and residual stay
    ALRR    the sub-layer around it                          x -> x + attention(norm(x))
    ALSR    each head                                        x -> what the heads found, [B, T, N, H]; the output projection stays
    ELR     the whole layer                                  x -> block(x)

and ALR of a decoder's attention to itself and to a context. The teacher is frozen, layers are imitated one by one, and nothing is trained after they are put in.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from attnx.core import checks
from attnx.mixers.sentence_ff import LEVELS
from attnx.nn.block import TransformerBlock
from attnx.nn.common import rows
from attnx.nn.stack import Stack


class LayerIO(NamedTuple):
    """What a layer was given and what it made of it.

    Attributes:
      inputs: [B, T, D].
      outputs: [B, T, ...].
      positions: int32 [B, T], -1 where inputs are padding.
      context, context_positions: [B, S, D] and int32 [B, S] of attention to a context; else None.
    """

    inputs: Float[Array, "B T D"]
    outputs: Float[Array, "B T *E"]
    positions: Int[Array, "B T"]
    context: Float[Array, "B S D"] | None = None
    context_positions: Int[Array, "B S"] | None = None


class _Recorder(nnx.Module):
    """Does what its teacher does and keeps it."""

    def __init__(self, teacher, kept, heads=False):
        self.teacher, self.keep, self.heads = teacher, kept.append, heads

    def __call__(self, x, context=None, *, positions=None, context_positions=None, **options):
        found = []

        def look(value, layer, at):
            found.append(value)
            return value

        if self.heads:
            options["hooks"] = {**(options.get("hooks") or {}), "output": look}
        if context is not None:
            options |= dict(context=context, context_positions=context_positions)
        out = self.teacher(x, positions=positions, **options)
        self.keep(LayerIO(x, found[0] if self.heads else out, _all(x, positions), context, None if context is None else _all(context, context_positions)))
        return out


def _all(x, positions):
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32) if positions is None else positions, x.shape[:2])


class _Sublayer(TransformerBlock):
    """A block whose first sub-layer is a network of its own."""

    def __init__(self, block, student):
        self.features, self.norm_position, self.dropout_rate = block.features, block.norm_position, block.dropout_rate
        for name in ("cross_attention", "cross_norm", "mlp", "mlp_norm"):
            setattr(self, name, nnx.data(getattr(block, name)))
        self.attention, self.replaced = student, block

    def attend(self, x, *, positions=None, segment_ids=None, dropout_keys=(None, None), hooks=None, layer=0):
        return self.attention(x, positions=positions, segment_ids=segment_ids, hooks=hooks, layer=layer)


class _Heads(nnx.Module):
    """An attention layer's output projection of heads that a network makes."""

    def __init__(self, attention, student):
        self.attention, self.student = attention, student

    def __call__(self, x, *, positions=None, **options):
        heads = self.student(x, positions=positions, **options)
        return self.attention.out(rows(heads)).reshape(*x.shape[:2], -1)


def _blocks(model) -> list[tuple[Any, int]]:
    """Where the blocks of a model are, in order: the lists called ``blocks``, and indices."""
    found = []
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Stack):
            raise ValueError("model: expected one whose blocks can be changed one by one, got a scanned Stack inside; attnx.nn.unstack makes it so")
        if isinstance(module, nnx.List) and path[-1:] == ("blocks",):
            found.append(([(isinstance(part, str), part) for part in path], module))
    return [(module, index) for _, module in sorted(found, key=lambda item: item[0]) for index in range(len(module))]


def _put(model, layer, make, level, cross):
    """Puts ``make(what is there)`` in the place of a layer's part; returns what was there."""
    if level not in LEVELS:
        raise ValueError(f"level: expected one of {', '.join(map(repr, LEVELS))}, got {level!r}")
    if cross and level != "ALR":
        raise ValueError(f"level: expected 'ALR' of attention to a context, got {level!r}")
    blocks = _blocks(model)
    checks.check_integer("layer", layer, least=0, most=len(blocks) - 1)
    holder, index = blocks[layer]
    if level in ("ALRR", "ELR"):
        old = holder[index]
        holder[index] = make(old)
        return old
    block, name = holder[index], "cross_attention" if cross else "attention"
    old = getattr(block, name, None)
    if old is None:
        raise ValueError(f"layer: expected a block with {name}, got {layer}, a {type(block).__name__} without")
    setattr(block, name, nnx.data(make(old)))
    return old


def swap(model: nnx.Module, layer: int, student: nnx.Module, *, level: str = "ALR", cross: bool = False) -> nnx.Module:
    """Puts a network in the place of an attention layer, or of more or less than that; in place.

    Args:
      model: any module that holds :class:`attnx.nn.TransformerBlock` in lists called ``blocks``: unstacked (:func:`attnx.nn.unstack`), and one half of an
        encoder-decoder at a time.
      layer: which block, from 0.
      student: called like what it replaces: a :class:`SentenceFF`, :class:`CausalSentenceFF`, :class:`CrossSentenceFF`, :class:`HeadwiseFF`, or anything else.
      level: 'ALR', 'ALRR', 'ALSR' or 'ELR', see the module.
      cross: whether attention to a context is replaced.

    Returns:
      What was there: the attention layer, or with 'ALRR' and 'ELR' the block. Given back as the student (level 'ELR' for a block), it is in its place again.

    Raises:
      ValueError: a layer or a level that does not exist, a model with a scanned stack.

    >>> import attnx
    >>> from attnx.mixers import SentenceFF
    >>> from attnx.nn import Attention, Layers
    >>> block = TransformerBlock(8, attention=Attention(8, 2, mechanism=attnx.pairs(), rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    >>> model = Layers([block])
    >>> type(swap(model, 0, SentenceFF(5, 8, 4, rngs=nnx.Rngs(0)))).__name__, model(jnp.ones((1, 3, 8))).shape
    ('Attention', (1, 3, 8))
    """
    make = {"ALRR": lambda old: _Sublayer(old, student), "ALSR": lambda old: _Heads(old, student)}.get(level, lambda old: student)
    return _put(model, layer, make, level, cross)


def extract_io(model: nnx.Module, run: Callable[[], Any], *, level: str = "ALR", cross: bool = False) -> tuple[Any, tuple[LayerIO, ...]]:
    """Runs a model and keeps what one part of each of its blocks was given and gave.

    Args:
      model: as in :func:`swap`: what holds the blocks, such as the encoder of a model.
      run: calls the model that ``model`` is a part of; may be traced.
      level, cross: as in :func:`swap`.

    Returns:
      What ``run`` returned, and a :class:`LayerIO` a block.

    >>> import attnx
    >>> from attnx.nn import Attention, Layers
    >>> block = TransformerBlock(8, attention=Attention(8, 2, mechanism=attnx.pairs(), rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    >>> model = Layers([block])
    >>> out, (seen,) = extract_io(model, lambda: model(jnp.ones((1, 3, 8))), level="ALSR")
    >>> seen.inputs.shape, seen.outputs.shape
    ((1, 3, 8), (1, 3, 2, 4))
    """
    kept: list[LayerIO] = []
    make = {"ALRR": lambda old: _Sublayer(old, _Recorder(old.attend, kept)),
            "ALSR": lambda old: _Recorder(old, kept, heads=True)}.get(level, lambda old: _Recorder(old, kept))
    layers = range(len(_blocks(model)))
    replaced = [_put(model, layer, make, level, cross) for layer in layers]
    try:
        out = run()
    finally:
        for layer, old in zip(layers, replaced):
            _put(model, layer, lambda _, old=old: old, "ELR" if level in ("ALRR", "ELR") else "ALR", cross)
    return out, tuple(kept)


def distillation_loss(outputs: Float[Array, "B T *E"], targets: Float[Array, "B T *E"], positions: Int[Array, "B T"]) -> Float[Array, ""]:
    """The mean squared error over the numbers of real tokens: that over all, padding counting as right, divided by the share of tokens that are real.

    Args:
      outputs, targets: [B, T, ...].
      positions: int32 [B, T], -1 for padding.

    >>> distillation_loss(jnp.array([[[2.0], [9.0]]]), jnp.zeros((1, 2, 1)), jnp.array([[0, -1]]))
    Array(4., dtype=float32)
    """
    real = (positions >= 0).reshape(*positions.shape, *(1,) * (outputs.ndim - 2))
    error = jnp.where(real, outputs - targets, 0)
    return jnp.sum(error**2) / jnp.maximum(jnp.sum(positions >= 0) * (outputs.size // max(positions.size, 1)), 1)


def distill_attention(student: nnx.Module, data: LayerIO, *, steps: int, batch_size: int = 64, learning_rate: float = 1e-3,
                      optimizer: optax.GradientTransformation | None = None, key: Array) -> Float[Array, " steps"]:
    """Trains a network to imitate a layer, in place.

    Args:
      student: called ``student(inputs, [context,] positions=..., [context_positions=...])``.
      data: what :func:`extract_io` found, B samples.
      steps: updates, each of ``batch_size`` samples drawn at random.
      learning_rate: of Adam with b1 = 0.9 and b2 = 0.98, as in the paper.
      optimizer: in its place.
      key: of the samples drawn.

    Returns:
      The loss of each update, :func:`distillation_loss`.

    >>> from attnx.mixers import SentenceFF
    >>> x = jax.random.normal(jax.random.key(0), (8, 3, 2))
    >>> data = LayerIO(x, x[:, ::-1], jnp.broadcast_to(jnp.arange(3), (8, 3)))
    >>> losses = distill_attention(SentenceFF(3, 2, 8, rngs=nnx.Rngs(0)), data, steps=200, batch_size=8, learning_rate=1e-2, key=jax.random.key(1))
    >>> bool(losses[-1] < losses[0] / 10)
    True
    """
    graph, params, rest = nnx.split(student, nnx.Param, ...)
    params, losses = _train(graph, optimizer or _adam(learning_rate), batch_size, params, rest, data, jax.random.split(key, steps))
    nnx.update(student, params)
    return losses


@functools.cache
def _adam(learning_rate):
    return optax.adam(learning_rate, b1=0.9, b2=0.98, eps=1e-9)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _train(graph, optimizer, batch_size, params, rest, data, keys):
    def loss(params, batch):
        crossed = {} if batch.context is None else dict(context=batch.context, context_positions=batch.context_positions)
        return distillation_loss(nnx.merge(graph, params, rest)(batch.inputs, positions=batch.positions, **crossed), batch.outputs, batch.positions)

    def update(state, key):
        params, inner = state
        chosen = jax.random.randint(key, (batch_size,), 0, len(data.inputs))
        value, slopes = jax.value_and_grad(loss)(params, jax.tree.map(lambda x: x[chosen], data))
        changes, inner = optimizer.update(slopes, inner, params)
        return (optax.apply_updates(params, changes), inner), value

    (params, _), losses = jax.lax.scan(update, (params, optimizer.init(params)), keys)
    return params, losses
