"""Optimisers for transformers, as optax transformations: clipping, schedule, decay and the choice of what is decayed."""

import jax
import optax
from flax import nnx


def warmup_stable_decay(peak: float, steps: int, *, warmup: int = 0, decay: int = 0) -> optax.Schedule:
    """A learning rate that rises linearly over ``warmup`` steps, stays at ``peak``, and falls linearly to 0 over the last ``decay``.

    Source: Shengding Hu et al., "MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training Strategies", 2024,
    arXiv:2404.06395.

    Example:
      >>> schedule = warmup_stable_decay(1.0, steps=10, warmup=2, decay=4)
      >>> [round(float(schedule(step)), 2) for step in (0, 1, 2, 6, 8, 10)]
      [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
    """
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup) if warmup else optax.constant_schedule(peak),
                                 optax.constant_schedule(peak), optax.linear_schedule(peak, 0.0, max(decay, 1))],
                                [warmup, steps - decay])


def adamw(learning_rate: optax.ScalarOrSchedule, *, b1: float = 0.9, b2: float = 0.95, weight_decay: float = 0.1,
          max_norm: float = 1.0) -> optax.GradientTransformation:
    """AdamW after clipping to the global norm ``max_norm``; matrices decay, vectors (norms, biases) do not.

    Source: Ilya Loshchilov and Frank Hutter, "Decoupled Weight Decay Regularization", 2019, arXiv:1711.05101.
    """
    return optax.chain(optax.clip_by_global_norm(max_norm),
                       optax.adamw(learning_rate, b1, b2, weight_decay=weight_decay, mask=_map(lambda p: _rank(p) > 1)))


def muon(learning_rate: optax.ScalarOrSchedule, *, adam_learning_rate: optax.ScalarOrSchedule, momentum: float = 0.95,
         b1: float = 0.9, b2: float = 0.95, ns_steps: int = 5, weight_decay: float = 0.0,
         max_norm: float = 1.0) -> optax.GradientTransformation:
    """Muon for the matrices inside the blocks, Adam for everything else, after clipping to the global norm ``max_norm``.

        m <- momentum m + g,        W <- W - learning_rate sqrt(max(1, rows / columns)) orthogonalised(m)     (Nesterov's m)

    Heads and their sizes count as one axis, and layers as a batch of matrices. What is such a matrix is read from the logical names of
    the parameters' axes (see :class:`attnx.nn.Attention`): one that maps 'embed' to or from something other than 'vocab'.

    Source: Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, https://kellerjordan.github.io/posts/muon/.

    Args:
      learning_rate: of the matrices, about 0.02.
      adam_learning_rate: of the rest.
      momentum: of the matrices.
      b1, b2: decay rates of Adam's moments.
      ns_steps: Newton-Schulz iterations of the orthogonalisation.
      weight_decay: decoupled, of the matrices.
      max_norm: of the gradient.
    """
    return optax.chain(optax.clip_by_global_norm(max_norm), optax.contrib.muon(
        learning_rate, beta=momentum, ns_steps=ns_steps, weight_decay=weight_decay, adam_b1=b1, adam_b2=b2,
        adam_learning_rate=adam_learning_rate, muon_weight_dimension_numbers=_map(_matrix_axes)))


def _map(function):
    """``function`` over the variables of a tree of parameters."""
    return lambda params: jax.tree.map(function, params, is_leaf=lambda p: isinstance(p, nnx.Variable))


def _names(p):
    """The logical names of a parameter's axes, or Nones."""
    names = p.get_metadata().get("out_sharding") if isinstance(p, nnx.Variable) else None
    return names or (None,) * len(getattr(p, "shape", ()))  # optax hides the parameters of the other optimiser behind nodes without a shape


def _rank(p):
    return sum(name != "layers" for name in _names(p))


def _matrix_axes(p):
    names = _names(p)
    axes = [axis for axis, name in enumerate(names) if name != "layers"]
    others = [names[axis] for axis in axes if names[axis] != "embed"]
    if len(others) != len(axes) - 1 or not others or None in others or "vocab" in others:
        return None
    embed, rest = names.index("embed"), tuple(axis for axis in axes if names[axis] != "embed")
    return optax.contrib.MuonDimensionNumbers(*((embed, rest) if embed == axes[0] else (rest, embed)))
