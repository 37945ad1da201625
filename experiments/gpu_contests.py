"""What ``gpu_bench`` compares: who computes what, on which arrays, and how it is called."""

import importlib.util
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import attnx
from attnx import masks, scores, weights
from attnx.core import fused
from attnx.core.decode import decode
from attnx.core.linear import linear_attention
from attnx.core.selected import selected_attention
from attnx.core.windows import window_attention
from attnx.products import sage_attention
from pallas_kernels import native

OURS, TRITON = "attnx pallas", "attnx triton"


class Shape(NamedTuple):
    """The arrays of a contest."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    size: int


class Entry(NamedTuple):
    """A contestant: ``passes(*arrays) -> {pass: Work}``, and ``expected(*arrays)``, the results of all passes by the definition."""

    passes: Callable
    expected: Callable


class Contest(NamedTuple):
    """Contestants that take turns at one shape.

    Attributes:
      entries: ``entries(length)``, by name.
      density: of an entry's name, the share of pairs that it allows; None where arithmetic is not what counts.
      base: whose speed others are compared with.
      arrays: ``arrays(shape)``, what contestants are handed.
      small: the shape at which they are held against the definition.
      traffic: of a pass, the bytes that it has to read and write; None where these are not what counts.
    """

    name: str
    shape: Shape
    entries: Callable[[int], dict[str, Entry]]
    density: Callable[[str], float] | None
    base: str
    arrays: Callable[[Shape], list]
    small: Shape
    traffic: Callable[[str], float] | None = None


# Attention ----------------------------------------------------------------------------------------------------------


def contests(options):
    """All of them."""
    return [*_libraries(options), _parts(options), *_selected(options), *_windows(options), *_eight_bits(options), *_linear(options),
            *_decoding(options)]


def _libraries(options):
    for size in options.sizes:
        heads = options.width // size
        for length in options.lengths:
            for causal in (True, False):
                for kv_heads in dict.fromkeys((heads, max(1, heads // options.group))):
                    name = f"{'causal' if causal else 'full'}, T={length}, D={size}" + (f", {heads} heads on {kv_heads}" if kv_heads < heads else "")
                    share = _causal_share(length) if causal else 1.0
                    yield _of_pairs(name, Shape(max(1, options.tokens // length), length, heads, kv_heads, size), partial(_installed, causal),
                                    lambda _, share=share: share, "cuDNN")


def _of_pairs(name, shape, entries, density, base):
    return Contest(name, shape, entries, density, base, _queries_keys_values, shape._replace(batch=1, length=min(1024, shape.length)))


def _queries_keys_values(shape: Shape):
    """Query, key, value and the output's cotangent."""
    b, t, n, k, h = shape
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (b, t, heads, h), jnp.bfloat16) for key, heads in zip(keys, (n, k, k, n))]


def _installed(causal, length):
    """Our kernels and the other libraries that there are."""
    parts = {"mask": masks.causal() if causal else None}
    expected = by_definition(partial(attnx.attention, **parts, implementation="reference"))
    attends = {OURS: partial(attnx.attention, **parts, implementation="pallas"),
               "cuDNN": partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")}
    if importlib.util.find_spec("tokamax"):
        import tokamax

        attends["tokamax"] = partial(tokamax.dot_product_attention, is_causal=causal)
    entries = {name: Entry(of_jax(attend), expected) for name, attend in attends.items()}
    if _has_torch():
        entries |= {"PyTorch SDPA": Entry(_of_torch(partial(_sdpa, causal)), expected),
                    "FlexAttention": Entry(_of_torch(_flex(causal, length)), expected)}
    return entries


def _parts(options):
    length, size = options.parts_length, max(options.sizes)
    heads, window = options.width // size, min(1024, options.parts_length)

    def calls(length):
        documents = jnp.arange(length) * 16 // length
        return {
            "causal softmax": dict(mask=masks.causal()),
            "full softmax": {},
            f"sliding window of {window}": dict(mask=masks.sliding_window(window)),
            "16 documents": dict(mask=masks.causal() & masks.documents(documents)),
            "ALiBi": dict(mask=masks.causal(), scores=scores.alibi(heads)),
            "soft cap": dict(mask=masks.causal(), scores=scores.soft_cap(30.0)),
            "softpick": dict(mask=masks.causal(), weights=weights.softpick()),
            "sigmoid": dict(mask=masks.causal(), weights=weights.sigmoid()),
        }

    def entries(length):
        return {name: _entry(partial(attnx.attention, **parts)) for name, parts in calls(length).items()}

    density = {"full softmax": 1.0, "16 documents": _causal_share(length // 16) / 16,
               f"sliding window of {window}": window / length * (1 - (window - 1) / (2 * length))}
    return _of_pairs(f"parts, T={length}, D={size}", Shape(max(1, options.tokens // length), length, heads, heads, size), entries,
                   lambda name: density.get(name, _causal_share(length)), "causal softmax")


def _causal_share(length):
    return (1 + 1 / length) / 2


def _selected(options):
    """Blocks that each query block of a key-value head chooses, beside our own causal softmax at equal work."""
    size, block = max(options.sizes), 64
    heads = options.width // size
    kv_heads = max(1, heads // options.group)

    def entries(length):
        blocks = -(-length // block)
        chosen = jax.random.randint(jax.random.key(1), (1, kv_heads, blocks, options.chosen), 0, blocks)
        table = jnp.arange(blocks)[:, None] - jnp.arange(options.chosen)  # as many, the last ones
        return {"causal softmax": _entry(partial(attnx.attention, mask=masks.causal())),
                "any blocks": _entry(partial(selected_attention, indices=chosen, block_sizes=(block, block))),
                "the last blocks": _entry(partial(selected_attention, indices=table[None, None], block_sizes=(block, block)))}

    for length in options.selected_lengths:
        blocks = -(-length // block)
        density = {"causal softmax": _causal_share(length),
                   "any blocks": 1 - (1 - 1 / blocks) ** options.chosen,  # duplicates count once
                   "the last blocks": sum(min(n + 1, options.chosen) for n in range(blocks)) / blocks**2}
        shape = Shape(1, length, heads, kv_heads, size)
        yield _of_pairs(f"{options.chosen} chosen blocks of {block}, T={length}, D={size}", shape, entries, density.get, "causal softmax")


def _windows(options):
    """Windows of 7 x 7 tokens with a bias for each pair, beside XLA's materialised maps and each window as a short sequence."""
    for count in options.windows:
        shape = Shape(count, 49, 4, 4, 32)
        small = shape._replace(batch=min(16, count))
        yield Contest(f"{count} windows, T={shape.length}, D={shape.size}", shape, _of_windows, lambda _: 1.0, "XLA", _tokens_and_bias, small)


def _tokens_and_bias(shape: Shape):
    """Query, key, value, a bias and the output's cotangent."""
    *arrays, cotangent = _queries_keys_values(shape)
    return [*arrays, jax.random.normal(jax.random.key(1), (shape.heads, shape.length, shape.length), jnp.bfloat16), cotangent]


def _of_windows(_):
    def attend(implementation, query, key, value, bias):
        return window_attention(query, key, value, bias=bias, implementation=implementation)

    def as_sequences(query, key, value, bias):
        return attnx.attention(query, key, value, scores=scores.bias(bias), implementation="pallas")

    calls = {OURS: partial(attend, "pallas"), "XLA": partial(attend, "reference"), "flash, a window a sequence": as_sequences,
             "cuDNN": lambda query, key, value, bias: jax.nn.dot_product_attention(query, key, value, bias[None], implementation="cudnn")}
    expected = by_definition(partial(attend, "reference"))
    return {name: Entry(of_jax(call), expected) for name, call in calls.items()}


def _eight_bits(options):
    """SageAttention beside attention of 16 bits, causal, forward."""
    size = max(options.sizes)
    heads = options.width // size
    for length in options.eight_bit_lengths:
        shape = Shape(max(1, options.tokens // length), length, heads, heads, size)
        yield _of_pairs(f"eight bits, T={length}, D={size}", shape, _sages, lambda _, share=_causal_share(length): share, "cuDNN")._replace(
            arrays=lambda shape: _queries_keys_values(shape)[:3])


def _sages(_):
    """Each held against what it rounds, in a fold by XLA."""
    attend = lambda implementation: partial(attnx.attention, mask=masks.causal(), implementation=implementation)
    sage = lambda values, implementation: partial(sage_attention, is_causal=True, values=values, implementation=implementation)
    calls = {"cuDNN": (partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn"), attend("reference")),
             f"{OURS}, 16 bits": (attend("pallas"), attend("reference"))}
    for implementation, name in (("pallas", OURS), ("triton", TRITON)) if _has_triton() else (("pallas", OURS),):
        for values in (None, "int8", "float8"):
            calls[f"{name}, values {values or 'bfloat16'}"] = sage(values, implementation), sage(values, "blockwise")
    return {name: Entry(of_jax(call, backward=False), by_definition(expected, backward=False)) for name, (call, expected) in calls.items()}


def _entry(attend):
    return Entry(of_jax(partial(attend, implementation="pallas")), by_definition(partial(attend, implementation="reference")))


# The recurrent engine -----------------------------------------------------------------------------------------------


def _linear(options):
    """Beside the XLA form, flash-linear-attention where it is installed, and what reading and writing the arrays once would take."""
    size = max(options.sizes)
    heads = options.width // size
    for length in options.linear_lengths:
        for decay, channels in (("no decay", 0), ("a decay for each head", 1), ("a decay for each channel", size)):
            shape = Shape(max(1, options.tokens // length), length, heads, heads, size)
            tokens = shape.batch * length * heads
            moved = {"forward": tokens * (4 * 2 * size + 4 * channels), "backward": tokens * (7 * 2 * size + 8 * channels)}
            yield Contest(f"recurrent, {decay}, T={length}, D={size}", shape, partial(_recurrences, channels), None, "XLA", partial(_tokens, channels),
                          shape._replace(batch=1, length=min(256, length)), moved.get)


def _tokens(channels, shape: Shape):
    """Query, key, value, log-decay if there is one, and the output's cotangent."""
    query, key, value, cotangent = _queries_keys_values(shape)
    arrays = [query * shape.size**-0.5, key, value]
    if channels:
        arrays.append(-jax.random.exponential(jax.random.key(1), (*query.shape[:3], *(channels,) * (channels > 1)), jnp.float32) / 16)
    return [*arrays, cotangent]


def _recurrences(channels, length):
    def attend(implementation, query, key, value, log_decay=None):
        return linear_attention(query, key, value, log_decay=log_decay, implementation=implementation)

    expected = by_definition(partial(attend, "recurrent"))
    calls = {OURS: "pallas", "XLA": "chunked"} | ({TRITON: "triton"} if _has_triton() else {})
    entries = {name: Entry(of_jax(partial(attend, implementation)), expected) for name, implementation in calls.items()}
    if importlib.util.find_spec("fla") and _has_torch():
        entries["flash-linear-attention"] = Entry(_of_torch(partial(_fla, channels), by_token=True), expected)
    return entries


def _fla(channels, query, key, value, log_decay=None):
    if channels == 0:
        from fla.ops.linear_attn import chunk_linear_attn

        return chunk_linear_attn(query, key, value, scale=1.0, normalize=False)[0]
    if channels == 1:
        from fla.ops.simple_gla import chunk_simple_gla

        return chunk_simple_gla(query, key, value, g=log_decay, scale=1.0)[0]
    from fla.ops.gla import chunk_gla

    return chunk_gla(query, key, value, g=log_decay, scale=1.0)[0]


# Decoding -----------------------------------------------------------------------------------------------------------


def _decoding(options):
    """One token of each sequence, beside other libraries and what reading the cache once would take."""
    size = max(options.sizes)
    heads = options.width // size
    for batch in options.decode_batches:
        for length in options.decode_lengths:
            shape = Shape(batch, length, heads, max(1, heads // options.group), size)
            cache = 2 * 2 * batch * length * shape.kv_heads * size
            if cache <= options.decode_gib * 2**30:
                yield Contest(f"decoding, batch {batch}, {length} tokens, D={size}, {heads} heads on {shape.kv_heads}", shape, _decoders, None, "cuDNN",
                              _cache, shape._replace(batch=min(2, batch), length=min(1024, length)), {"forward": cache}.get)


def _cache(shape: Shape):
    """The query of the last token, and the keys and values of all."""
    b, length, n, k, h = shape
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, size, jnp.bfloat16) for key, size in zip(keys, ((b, 1, n, h), (b, length, k, h), (b, length, k, h)))]


def _decoders(length):
    attend = lambda implementation, query, key, value: decode(query, key, value, jnp.int32(length), implementation=implementation)
    calls = {OURS: partial(attend, "pallas"), "XLA": partial(attend, "blockwise"), "cuDNN": partial(jax.nn.dot_product_attention, implementation="cudnn")}
    expected = by_definition(partial(attend, "reference"), backward=False)
    entries = {name: Entry(of_jax(call, backward=False), expected) for name, call in calls.items()}
    if _has_torch():
        entries["PyTorch SDPA"] = Entry(_of_torch(partial(_sdpa, False), backward=False), expected)
    return entries


# Contestants --------------------------------------------------------------------------------------------------------


class Work:
    """A pass to be timed: ``run()`` starts it, ``wait(result)`` ends with it, ``arrays(result)`` are its results as numpy's."""

    def __init__(self, run, wait, arrays):
        self.run, self.wait, self.arrays = run, wait, arrays

    def seconds(self, times: int) -> float:
        """The mean time of a run among so many in a row."""
        start = time.perf_counter()
        for _ in range(times):
            result = self.run()
        self.wait(result)
        return (time.perf_counter() - start) / times


def of_jax(attend, backward=True):
    """The passes of a function of JAX; its last array is the output's cotangent where there is a ``backward``."""
    def passes(*arrays):
        as_numpy = lambda results: [np.asarray(x, np.float32) for x in jax.tree.leaves(results)]
        inputs = arrays[:-1] if backward else arrays
        works = {"forward": Work(partial(jax.jit(attend), *inputs), jax.block_until_ready, as_numpy)}
        if backward:
            _, pull = jax.jit(partial(jax.vjp, attend))(*inputs)
            works["backward"] = Work(partial(jax.jit(lambda pull, cotangent: pull(cotangent)), pull, arrays[-1]), jax.block_until_ready, as_numpy)
        return works

    return passes


def by_definition(attend, backward=True):
    """The results of all passes, in float32."""
    def expected(*arrays):
        arrays = [x.astype(jnp.float32) for x in arrays]
        with jax.default_matmul_precision("highest"):
            works = of_jax(attend, backward)(*arrays)
            return [x for work in works.values() for x in work.arrays(work.run())]

    return expected


def _has_triton():
    """Whether kernels in Triton itself can be run."""
    return native.installed() and fused.target() == (False, "gpu")


def _has_torch():
    """Whether PyTorch is installed and sees a GPU."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _of_torch(attend, backward=True, by_token=False):
    """As :func:`of_jax`, of a function of PyTorch; heads before tokens unless ``by_token``."""
    def passes(*arrays):
        import torch

        turn = (lambda x: x) if by_token else (lambda x: x.transpose(1, 2))
        dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
        arrays = [turn(torch.from_numpy(np.asarray(x, np.float32)).to("cuda", dtypes[x.dtype.name])).contiguous() for x in arrays]
        inputs = arrays[:-1] if backward else arrays
        wait = lambda _: torch.cuda.synchronize()
        as_numpy = lambda results: [turn(x).float().detach().cpu().numpy() for x in (results if isinstance(results, tuple) else (results,))]

        def forward():
            with torch.no_grad():
                return attend(*inputs)

        works = {"forward": Work(forward, wait, as_numpy)}
        if backward:
            leaves = [x.detach().requires_grad_() for x in inputs]
            out = attend(*leaves)
            works["backward"] = Work(lambda: torch.autograd.grad(out, leaves, arrays[-1], retain_graph=True), wait, as_numpy)
        return works

    return passes


def _sdpa(causal, q, k, v):
    import torch

    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=k.shape[1] < q.shape[1])


def _flex(causal, length):
    import torch
    from torch.nn.attention import flex_attention as flex

    mask = flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cuda") if causal else None
    attend = torch.compile(flex.flex_attention)
    return lambda q, k, v: attend(q, k, v, block_mask=mask, enable_gqa=k.shape[1] < q.shape[1])
