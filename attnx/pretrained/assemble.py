"""A checkpoint's arrays as the parameters of a model."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnx.models import Transformer, TransformerConfig
from attnx.pretrained.sources import PretrainedError


class Tensors:
    """The arrays of a file by their names there, counted as they are read.

    Args:
      names: all that the file has.
      read: ``read(name) -> array``.
    """

    def __init__(self, names, read: Callable[[str], np.ndarray]):
        self.read, self.unread = read, set(names)
        self.names = frozenset(self.unread)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.names:
            raise PretrainedError(f"the checkpoint has no tensor '{name}'")
        self.unread.discard(name)
        return self.read(name)

    def finish(self, ignored: Callable[[str], bool] = lambda name: False):
        """Raises PretrainedError where the file has tensors that nobody read: then its model is not the one that was built."""
        if rest := sorted(name for name in self.unread if not ignored(name)):
            raise PretrainedError(f"the checkpoint has tensors that this kind of model does not: {', '.join(rest[:4])}{' ...' if rest[4:] else ''}")


class Weights(NamedTuple):
    """Where a model's parameters come from.

    Attributes:
      model: ``{path of a parameter: () -> array}``, e.g. 'embedding.table'.
      layer: ``{path in a block: index of the layer -> array}``, e.g. 'attention.query.kernel'.
    """

    model: Mapping[str, Callable[[], np.ndarray]]
    layer: Mapping[str, Callable[[int], np.ndarray]]


def dense(weight: np.ndarray) -> np.ndarray:
    """A matrix [outputs, inputs] as a kernel [inputs, outputs]."""
    return weight.T


def into_heads(heads: int) -> Callable[[np.ndarray], np.ndarray]:
    """A matrix [N H, D] as a kernel [D, N, H], or a bias [N H] as [N, H]."""
    return lambda weight: weight.T.reshape(*weight.shape[1:], heads, -1)


def from_heads(heads: int) -> Callable[[np.ndarray], np.ndarray]:
    """A matrix [D, N H] as a kernel [N, H, D]."""
    return lambda weight: weight.T.reshape(heads, -1, len(weight))


def assemble(kind: type[Transformer], config: TransformerConfig, mechanism, weights: Weights, rngs: nnx.Rngs) -> Transformer:
    """A model with a checkpoint's parameters; what its mechanism owns is initialised.

    Raises:
      PretrainedError: where the weights are not all and exactly those of the model.
    """
    key = rngs.params()

    def name(path):
        return (".".join(map(str, path[3:])), path[2]) if path[:2] == ("layers", "blocks") else (".".join(map(str, path)), None)

    def known(path, _):
        path, block = name(path)
        return path in (weights.model if block is None else weights.layer)

    def make():
        return nnx.split(kind(config, mechanism, rngs=nnx.Rngs(key)), known, ...)

    graph, abstract, others = jax.eval_shape(make)
    if missing := [path for path, _ in nnx.to_flat_state(others) if not {"mechanism", "position"} & set(path)]:
        raise PretrainedError(f"the checkpoint has nothing for {', '.join('.'.join(map(str, path)) for path in missing)}")

    def value(path, variable):
        path, block = name(path)
        if block is None:
            array = weights.model[path]()
        else:
            kinds = config.num_layers // variable.shape[0]
            array = np.stack([weights.layer[path](layer) for layer in range(block, config.num_layers, kinds)])
        if array.shape != variable.shape:
            raise PretrainedError(f"{path}: expected shape {variable.shape}, the checkpoint has {array.shape}")
        return variable.replace(jnp.asarray(array, variable.dtype))

    filled: dict[Any, Any] = {path: value(path, variable) for path, variable in nnx.to_flat_state(abstract)}
    # Compiled, so that initial values which the checkpoint replaces are never made.
    others = jax.jit(lambda: make()[2])()
    return nnx.merge(graph, nnx.from_flat_state(filled), others)
