"""A checkpoint's arrays as the parameters of a model."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnx.models import Transformer, TransformerConfig
from attnx.pretrained.sources import PretrainedError

M = TypeVar("M", bound=Transformer)


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


class Source(NamedTuple):
    """Where a parameter comes from: the name of a tensor, {} for the index of its layer, and what is done to its array."""

    name: str
    convert: Callable[[np.ndarray], np.ndarray] = np.asarray


def dense(weight: np.ndarray) -> np.ndarray:
    """A matrix [outputs, inputs] as a kernel [inputs, outputs]."""
    return weight.T


def into_heads(heads: int) -> Callable[[np.ndarray], np.ndarray]:
    """A matrix [N H, D] as a kernel [D, N, H], or a bias [N H] as [N, H]."""
    return lambda weight: weight.T.reshape(*weight.shape[1:], heads, -1)


def from_heads(heads: int) -> Callable[[np.ndarray], np.ndarray]:
    """A matrix [D, N H] as a kernel [N, H, D]."""
    return lambda weight: weight.T.reshape(heads, -1, len(weight))


def assemble(kind: type[M], config: TransformerConfig, mechanism, tensors: Tensors, model: Mapping[str, Source], layer: Mapping[str, Source],
             rngs: nnx.Rngs) -> M:
    """A model with a checkpoint's parameters; what its mechanism owns is initialised.

    Args:
      kind, config, mechanism, rngs: of the model.
      tensors: of the checkpoint.
      model: the sources of parameters outside the layers, by path, as 'embedding.table'.
      layer: those of a layer, as 'attention.query.kernel'.

    Raises:
      PretrainedError: where the sources are not all of the model's parameters, or have other shapes.
    """
    key = rngs.params()

    def name(path):
        return (".".join(map(str, path[3:])), path[2]) if path[:2] == ("layers", "blocks") else (".".join(map(str, path)), None)

    def known(path, _):
        path, block = name(path)
        return path in (model if block is None else layer)

    def make():
        return nnx.split(kind(config, mechanism, rngs=nnx.Rngs(key)), known, ...)

    graph, abstract, others = jax.eval_shape(make)
    if missing := [path for path, _ in nnx.to_flat_state(others) if not {"mechanism", "position"} & set(path)]:
        raise PretrainedError(f"the checkpoint has nothing for {', '.join('.'.join(map(str, path)) for path in missing)}")

    def read(source, *index):
        return source.convert(tensors[source.name.format(*index)])

    def value(path, variable):
        path, block = name(path)
        if block is None:
            array = read(model[path])
        else:
            kinds = config.num_layers // variable.shape[0]
            array = np.stack([read(layer[path], i) for i in range(block, config.num_layers, kinds)])
        if array.shape != variable.shape:
            raise PretrainedError(f"{path}: expected shape {variable.shape}, the checkpoint has {array.shape}")
        return variable.replace(jnp.asarray(array, variable.dtype))

    filled: dict[Any, Any] = {path: value(path, variable) for path, variable in nnx.to_flat_state(abstract)}
    # Compiled, so that initial values which the checkpoint replaces are never made.
    others = jax.jit(lambda: make()[2])()
    return nnx.merge(graph, nnx.from_flat_state(filled), others)
