"""BERT-style encoders from safetensors.

Format: https://github.com/huggingface/safetensors. Architecture: Jacob Devlin, Ming-Wei Chang, Kenton Lee, Kristina Toutanova, "BERT: Pre-training of
Deep Bidirectional Transformers for Language Understanding", 2018, arXiv:1810.04805.
"""

import json
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnx.mechanism import pairs
from attnx.models import Encoder, TransformerConfig
from attnx.pretrained.assemble import Source, Tensors, assemble, dense, from_heads, into_heads
from attnx.pretrained.model import Pretrained
from attnx.pretrained.sources import PretrainedError, require

_ACTIVATIONS: dict[str, Literal["exact_gelu", "gelu", "relu"]] = {"gelu": "exact_gelu", "gelu_new": "gelu", "relu": "relu"}


def read(folder: Path, mechanism, dtype, rngs: nnx.Rngs) -> Pretrained:
    """The encoder in a folder, see :func:`attnx.pretrained.load`. Heads on top of it (pooler, predictions) are left out."""
    safetensors = require("safetensors")
    try:
        options = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tokenizer = require("tokenizers").Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
        file = safetensors.safe_open(folder / "model.safetensors", "numpy")
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise PretrainedError(f"no encoder that can be read in {folder}: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    config = configuration(options, dtype)
    with file:
        # Checkpoints with heads prefix the names of the encoder; old ones call scale and bias of norms gamma and beta.
        names = {name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): name
                 for name in file.keys()}
        tensors = Tensors(names, lambda name: file.get_tensor(names[name]))
        model = assemble(Encoder, config, pairs() if mechanism is None else mechanism, tensors, *sources(config.num_heads), rngs)
        tensors.finish(lambda name: name.startswith(("pooler.", "cls.")) or name == "embeddings.position_ids")
    return Pretrained(model, tokenizer, config, int(options["max_position_embeddings"]))


def configuration(options: dict[str, Any], dtype) -> TransformerConfig:
    """The sizes that a ``config.json`` states.

    Raises:
      PretrainedError: for another kind of model, positions or activation.
    """
    expected = {"model_type": ("bert",), "position_embedding_type": ("absolute", None), "hidden_act": tuple(_ACTIVATIONS)}
    for name, values in expected.items():
        if options.get(name) not in values:
            raise PretrainedError(f"config.json: expected {name} {' or '.join(repr(v) for v in values if v)}, got {options.get(name)!r}")
    try:
        return TransformerConfig(
            vocab_size=options["vocab_size"], features=options["hidden_size"], num_layers=options["num_hidden_layers"],
            num_heads=options["num_attention_heads"], hidden_features=options["intermediate_size"], mlp=_ACTIVATIONS[options["hidden_act"]],
            norm="layer", norm_epsilon=options["layer_norm_eps"], norm_position="post", position=None, position_embedding="learned",
            max_length=options["max_position_embeddings"], token_types=options["type_vocab_size"], embedding_norm=True, use_bias=True,
            param_dtype=jnp.dtype(dtype))
    except KeyError as error:
        raise PretrainedError(f"config.json does not state {error}") from error


def sources(heads: int) -> tuple[dict[str, Source], dict[str, Source]]:
    """Where the parameters of the model and of a layer are in the file."""
    def norm(path, name):
        return {f"{path}.scale": Source(f"{name}.LayerNorm.weight"), f"{path}.bias": Source(f"{name}.LayerNorm.bias")}

    def linear(path, name, kernel, bias=np.asarray):
        return {f"{path}.kernel": Source(f"{name}.weight", kernel), f"{path}.bias": Source(f"{name}.bias", bias)}

    def in_heads(name):
        return linear(f"attention.{name}", f"{own}.attention.self.{name}", into_heads(heads), into_heads(heads))

    own = "encoder.layer.{}"
    return {
        "embedding.table": Source("embeddings.word_embeddings.weight"),
        "embedding.positions": Source("embeddings.position_embeddings.weight"),
        "embedding.types": Source("embeddings.token_type_embeddings.weight"),
        **norm("embedding_norm", "embeddings"),
    }, {
        **in_heads("query"), **in_heads("key"), **in_heads("value"),
        **linear("attention.out", f"{own}.attention.output.dense", from_heads(heads)),
        **norm("attention_norm", f"{own}.attention.output"),
        **linear("mlp.up", f"{own}.intermediate.dense", dense),
        **linear("mlp.down", f"{own}.output.dense", dense),
        **norm("mlp_norm", f"{own}.output"),
    }
