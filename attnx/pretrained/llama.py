"""Llama-style decoders from GGUF files, of any type of tensor that the package ``gguf`` can dequantise.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Architecture: Hugo Touvron et al., "LLaMA: Open and Efficient Foundation Language
Models", 2023, arXiv:2302.13971.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnx import masks
from attnx.mechanism import pairs
from attnx.models import Decoder, TransformerConfig
from attnx.positions import Rotary
from attnx.pretrained import byte_pairs
from attnx.pretrained.assemble import Source, Tensors, assemble, dense, from_heads, into_heads
from attnx.pretrained.model import Pretrained
from attnx.pretrained.sources import PretrainedError, require


def read(path: Path, mechanism, dtype, rngs: nnx.Rngs) -> Pretrained:
    """The decoder in a GGUF file, see :func:`attnx.pretrained.load`."""
    gguf = require("gguf")
    try:
        file = gguf.GGUFReader(path)
    except (ValueError, IndexError, OverflowError) as error:
        raise PretrainedError(f"{path} is not a GGUF file that can be read: {error}") from error
    fields = {name: field.contents() for name, field in file.fields.items()}
    stored = {tensor.name: tensor for tensor in file.tensors}

    def tensor(name):
        data, kind = stored[name].data, stored[name].tensor_type
        try:
            return gguf.quants.dequantize(data, kind)
        except NotImplementedError as error:
            raise PretrainedError(f"{name}: tensors of type {kind.name} cannot be dequantised") from error

    tensors = Tensors(stored, tensor)
    config = configuration(fields, tensors, stored["token_embd.weight"].shape[1] if "token_embd.weight" in stored else 0, dtype)
    model = assemble(Decoder, config, pairs(mask=masks.causal()) if mechanism is None else mechanism, tensors,
                     *sources(config.num_heads, config.num_kv_heads or config.num_heads, config.tie_embedding), rngs)
    tensors.finish()
    stop = {fields[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot") if f"tokenizer.ggml.{name}_token_id" in fields}
    return Pretrained(model, byte_pairs.tokenizer(fields), config, int(stated(fields, "context_length")), frozenset(map(int, stop)))


def configuration(fields: dict[str, Any], tensors: Tensors, vocab_size: int, dtype) -> TransformerConfig:
    """The sizes that the metadata state.

    Raises:
      PretrainedError: for another architecture, or positions of another kind.
    """
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise PretrainedError(f"expected a GGUF file of architecture 'llama', got {architecture!r}")

    field = partial(stated, fields)
    heads, features = int(field("attention.head_count")), int(field("embedding_length"))
    size = int(field("attention.key_length", features // heads))
    if field("rope.dimension_count", size) != size or field("rope.scaling.type", "none") != "none":
        raise PretrainedError("rotary positions that are scaled or turn only a part of each head are not supported")
    return TransformerConfig(
        vocab_size=int(vocab_size), features=features, num_layers=int(field("block_count")), num_heads=heads,
        num_kv_heads=int(field("attention.head_count_kv", heads)), head_size=size, hidden_features=int(field("feed_forward_length")), mlp="swiglu",
        norm="rms", norm_epsilon=float(field("attention.layer_norm_rms_epsilon")), position=Rotary(base=float(field("rope.freq_base", 10000.0))),
        tie_embedding="output.weight" not in tensors.names, param_dtype=jnp.dtype(dtype))


def stated(fields: dict[str, Any], name: str, default=None) -> Any:
    """A number of the architecture, or the default.

    Raises:
      PretrainedError: where the file states none and there is no default.
    """
    value = fields.get(f"llama.{name}", default)
    if value is None:
        raise PretrainedError(f"the GGUF file does not state llama.{name}")
    return value


def sources(heads: int, kv_heads: int, tied: bool) -> tuple[dict[str, Source], dict[str, Source]]:
    """Where the parameters of the model and of a layer are in the file."""
    def layer(name, *convert):
        return Source(f"blk.{{}}.{name}.weight", *convert)

    model = {"embedding.table": Source("token_embd.weight"), "norm.scale": Source("output_norm.weight")}
    if not tied:
        model["embedding.output"] = Source("output.weight")
    return model, {
        "attention_norm.scale": layer("attn_norm"),
        "attention.query.kernel": layer("attn_q", halves(heads)),
        "attention.key.kernel": layer("attn_k", halves(kv_heads)),
        "attention.value.kernel": layer("attn_v", into_heads(kv_heads)),
        "attention.out.kernel": layer("attn_output", from_heads(heads)),
        "mlp_norm.scale": layer("ffn_norm"),
        "mlp.gate.kernel": layer("ffn_gate", dense),
        "mlp.up.kernel": layer("ffn_up", dense),
        "mlp.down.kernel": layer("ffn_down", dense),
    }


def halves(heads: int) -> Callable[[np.ndarray], np.ndarray]:
    """:func:`into_heads`, channels reordered: a GGUF file of a Llama has those that turn together side by side, ``Rotary()`` half a head apart."""
    return lambda weight: weight.T.reshape(weight.shape[1], heads, -1, 2).swapaxes(2, 3).reshape(weight.shape[1], heads, -1)
