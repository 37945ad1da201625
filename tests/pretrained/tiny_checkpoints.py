"""Checkpoints of a few kilobytes in real formats, and what their models compute, in NumPy and float64 from the formats' own conventions."""

import json
import math

import gguf
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

LAYERS, FEATURES, HEADS, KV_HEADS, HIDDEN, EPSILON, BASE = 4, 32, 4, 2, 64, 1e-3, 500.0
SIZE = FEATURES // HEADS

# Bytes as the characters that stand for them in a byte-level vocabulary: printable ones themselves, the rest from 256 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = [chr(b) for b in PRINTABLE] + [chr(256 + n) for n in range(256 - len(PRINTABLE))]
CONTROL = ["<|end|>", "<|begin|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2"]
TOKENS = [*CONTROL, *BYTES, *(merge.replace(" ", "") for merge in MERGES)]

# One of each type, as a file may mix them.
TYPES = {"attn_q": "Q4_1", "attn_k": "Q8_0", "attn_v": "F16", "attn_output": "BF16", "ffn_gate": "Q4_0", "ffn_up": "Q5_1", "ffn_down": "Q5_0",
         "token_embd": "Q8_0", "output": "Q4_1"}


def quantise(random, shape, kind):
    """Random bytes of a type, as the format lays them out, and the numbers they mean, by the format's definition."""
    if kind == "F32":
        x = random.normal(size=shape).astype(np.float32)
        return x, x
    if kind in ("F16", "BF16"):
        x = (random.normal(size=shape) / math.sqrt(shape[-1])).astype(np.float16 if kind == "F16" else ml_dtypes.bfloat16)
        return x.view(np.uint8) if kind == "BF16" else x, x.astype(np.float32)
    blocks = (*shape[:-1], shape[-1] // 32)
    scale, low = ((random.uniform(0.2, 1, size=(*blocks, 1)) * size).astype(np.float16) for size in (0.05, -0.3))
    wide = lambda x: x.astype(np.float32)
    raw = lambda x: np.ascontiguousarray(x).view(np.uint8)
    if kind == "Q8_0":
        q = random.integers(-128, 128, size=(*blocks, 32)).astype(np.int8)
        packed, numbers = [raw(scale), raw(q)], wide(scale) * wide(q)
    else:
        bits = int(kind[1])
        q = random.integers(2**bits, size=(*blocks, 32)).astype(np.uint8)
        # The low four bits: value n and value n + 16 share a byte. The fifth: a word of 32 bits.
        nibbles = (q[..., :16] & 15) | (q[..., 16:] & 15) << 4
        fifth = [np.packbits(q >> 4, axis=-1, bitorder="little")] if bits == 5 else []
        if kind.endswith("_1"):
            packed, numbers = [raw(scale), raw(low), *fifth, nibbles], wide(scale) * wide(q) + wide(low)
        else:
            packed, numbers = [raw(scale), *fifth, nibbles], wide(scale) * (wide(q) - 2 ** (bits - 1))
    return np.concatenate(packed, -1).reshape(*shape[:-1], -1), numbers.reshape(shape)


def llama_metadata():
    """What a GGUF file states besides tensors, as written by `write_llama`."""
    return {"block_count": LAYERS, "context_length": 64, "embedding_length": FEATURES, "feed_forward_length": HIDDEN,
            "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS}


def write_llama(path, *, tied=True, architecture="llama", tokenizer="gpt2", pre="smollm", drop=(), extra=(), bos=False, **floats):
    """Writes a GGUF file; returns its tensors as numbers."""
    random, numbers = np.random.default_rng(0), {}
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in llama_metadata().items():
        writer.add_uint32(f"{architecture}.{name}", value)
    for name, value in {"attention.layer_norm_rms_epsilon": EPSILON, "rope.freq_base": BASE, **floats}.items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(f"{architecture}.{name}", value)
    writer.add_tokenizer_model(tokenizer)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(TOKENS) - len(CONTROL)))
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(bos)
    kv = KV_HEADS * SIZE
    layer = {"attn_norm": (FEATURES,), "attn_q": (FEATURES, FEATURES), "attn_k": (kv, FEATURES), "attn_v": (kv, FEATURES),
             "attn_output": (FEATURES, FEATURES), "ffn_norm": (FEATURES,), "ffn_gate": (HIDDEN, FEATURES), "ffn_up": (HIDDEN, FEATURES),
             "ffn_down": (FEATURES, HIDDEN)}
    shapes = {"token_embd": (len(TOKENS), FEATURES), "output_norm": (FEATURES,), **({} if tied else {"output": (len(TOKENS), FEATURES)}),
              **{f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()}, **dict.fromkeys(extra, (FEATURES,))}
    for name, shape in shapes.items():
        if name not in drop:
            kind = TYPES.get(name.split(".")[-1], "F32")
            data, numbers[name] = quantise(random, shape, kind)
            own = kind in ("F32", "F16")
            writer.add_tensor(f"{name}.weight", data, raw_dtype=None if own else gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: x.astype(np.float64) for name, x in numbers.items()}


def softmax(x):
    """Over the last axis."""
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def heads_of(x, count):
    """[T, N H] as [N, T, H]."""
    return x.reshape(len(x), count, -1).swapaxes(0, 1)


def attend(query, key, value, mask=0.0):
    """[N, T, H] each to [T, N H]."""
    groups = len(query) // len(key)
    key, value = (np.repeat(x, groups, 0) for x in (key, value))
    weights = softmax(query @ key.swapaxes(1, 2) / math.sqrt(query.shape[-1]) + mask)
    return (weights @ value).swapaxes(0, 1).reshape(query.shape[1], -1)


def llama_logits(w, tokens):
    """The model of a GGUF file: neighbouring channels of queries and keys turn together."""
    t = len(tokens)
    angle = np.arange(t)[:, None] * BASE ** (-np.arange(0, SIZE, 2) / SIZE)
    turn = np.exp(1j * angle)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * scale

    def rotate(x):
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack([turned.real, turned.imag], -1).reshape(x.shape)

    x, mask = w["token_embd"][tokens], np.where(np.tril(np.ones((t, t))), 0, -np.inf)
    for i in range(LAYERS):
        layer = lambda name: w[f"blk.{i}.{name}"]
        y = norm(x, layer("attn_norm"))
        query, key, value = (heads_of(y @ layer(f"attn_{n}").T, count) for n, count in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)))
        x = x + attend(rotate(query), rotate(key), value, mask) @ layer("attn_output").T
        y = norm(x, layer("ffn_norm"))
        gate = y @ layer("ffn_gate").T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ layer("ffn_up").T)) @ layer("ffn_down").T
    return norm(x, w["output_norm"]) @ w.get("output", w["token_embd"]).T


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "paris", "is", "where", "rain", "##s"]
BERT = {"model_type": "bert", "hidden_act": "gelu", "hidden_size": FEATURES, "num_hidden_layers": 2, "num_attention_heads": HEADS,
        "intermediate_size": HIDDEN, "layer_norm_eps": EPSILON, "max_position_embeddings": 16, "type_vocab_size": 2, "vocab_size": len(WORDS)}


def write_bert(folder, *, prefix="", extra=(), drop=(), **options):
    """Writes a folder like those of the Hugging Face hub; returns its tensors in float64."""
    import tokenizers

    random, f = np.random.default_rng(1), FEATURES
    linear = lambda name, outputs, inputs: {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    norm = lambda name: {f"{name}.LayerNorm.weight": (f,), f"{name}.LayerNorm.bias": (f,)}
    shapes = {"embeddings.word_embeddings.weight": (len(WORDS), f), "embeddings.position_embeddings.weight": (16, f),
              "embeddings.token_type_embeddings.weight": (2, f), **norm("embeddings")}
    for i in range(2):
        layer = {**linear("attention.self.query", f, f), **linear("attention.self.key", f, f), **linear("attention.self.value", f, f),
                 **linear("attention.output.dense", f, f), **norm("attention.output"), **linear("intermediate.dense", HIDDEN, f),
                 **linear("output.dense", f, HIDDEN), **norm("output")}
        shapes |= {f"encoder.layer.{i}.{name}": shape for name, shape in layer.items()}
    shapes |= dict.fromkeys(extra, (f,))
    arrays = {name: (random.normal(size=shape) / math.sqrt(shape[-1] if len(shape) > 1 else 4)).astype(np.float32) for name, shape in shapes.items()}
    folder.mkdir(exist_ok=True)
    stored = {prefix + name: x for name, x in arrays.items() if name not in drop}
    if prefix:  # the names of older checkpoints
        stored = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x for name, x in stored.items()}
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(BERT | options))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(dict(zip(WORDS, range(len(WORDS)))), unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = tokenizers.normalizers.BertNormalizer(), tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding(length=12)  # as files have them; a model is called with what there is
    tokenizer.enable_truncation(4)
    tokenizer.save(str(folder / "tokenizer.json"))
    return {name: x.astype(np.float64) for name, x in arrays.items()}


def bert_vectors(w, tokens, types):
    """The vectors of the last layer."""
    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * w[f"{name}.LayerNorm.weight"] + w[f"{name}.LayerNorm.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    table = lambda name: w[f"embeddings.{name}_embeddings.weight"]
    x = norm(table("word")[tokens] + table("position")[:len(tokens)] + table("token_type")[types], "embeddings")
    for i in range(2):
        name = f"encoder.layer.{i}"
        query, key, value = (heads_of(linear(x, f"{name}.attention.self.{part}"), HEADS) for part in ("query", "key", "value"))
        x = norm(x + linear(attend(query, key, value), f"{name}.attention.output.dense"), f"{name}.attention.output")
        y = linear(x, f"{name}.intermediate.dense")
        y = y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2
        x = norm(x + linear(y, f"{name}.output.dense"), f"{name}.output")
    return x
