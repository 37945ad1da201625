"""Loading a checkpoint of any format."""

import os
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from attnx.mechanism import Mechanism
from attnx.pretrained import bert, llama
from attnx.pretrained.model import Pretrained
from attnx.pretrained.sources import find


def load(name_or_path: str | os.PathLike, *, mechanism: Mechanism | Sequence[Mechanism] | None = None, dtype=jnp.float32,
         rngs: nnx.Rngs | None = None) -> Pretrained:
    """A pretrained model with its tokenizer.

    Args:
      name_or_path: 'smollm2-135m' or 'minilm-l6' (once fetched), a path, or ``hf://owner/name``, see :func:`attnx.pretrained.find`.
      mechanism: takes the place of the attention that the model was trained with: one mechanism for all layers, or a sequence that alternates, whose
        length divides the number of layers (as many as layers: one for each). By default what it was trained with.
      dtype: of the parameters and thereby of the computation; quantised ones are widened to it.
      rngs: initial values of parameters that the mechanism owns; by default ``nnx.Rngs(0)``.

    Returns:
      A :class:`attnx.pretrained.Pretrained`; its model is an :class:`attnx.models.Decoder` or an :class:`attnx.models.Encoder`.

    Raises:
      PretrainedError: where there is no such checkpoint (says how to get it), or one of another architecture; never a model that is only nearly it.

    Example:
      >>> minilm = load("minilm-l6")  # doctest: +SKIP
      >>> near, far, question = minilm.embed(["Paris is in France.", "It rains.", "Where is Paris?"])  # doctest: +SKIP
      >>> bool(near @ question > far @ question)  # doctest: +SKIP
      True
    """
    path = find(name_or_path)
    return (llama if path.is_file() else bert).read(path, mechanism, dtype, rngs or nnx.Rngs(0))
