"""The tokenizer inside a GGUF file: byte-level byte-pair encoding, rebuilt from the file's metadata.

Source: Rico Sennrich, Barry Haddow, Alexandra Birch, "Neural Machine Translation of Rare Words with Subword Units", 2016, arXiv:1508.07909; on bytes,
Alec Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
"""

from typing import Any

from attnx.pretrained.sources import PretrainedError, require

_CONTROL, _USER_DEFINED = 3, 4  # token types of the GGUF format

# Text is cut into words before pairs are merged. GPT-2's cut is built into `tokenizers`; some have every digit apart, before it.
_DIGITS_APART = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"}
_GPT2 = {"gpt-2", "default", *_DIGITS_APART}
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {"llama-bpe": _WORDS % r"\p{N}{1,3}", "qwen2": _WORDS % r"\p{N}"}


def tokenizer(fields: dict[str, Any]):
    """The ``tokenizers.Tokenizer`` that the metadata of a GGUF file describe.

    Args:
      fields: the metadata: ``tokenizer.ggml.model``, ``pre``, ``tokens``, ``token_type``, ``merges``, ``add_bos_token`` and ``bos_token_id``.

    Raises:
      PretrainedError: for another kind of tokenizer, or one that cuts text in an unknown way.
    """
    def field(name, default=None):
        return fields.get(f"tokenizer.ggml.{name}", default)

    if field("model") != "gpt2":
        raise PretrainedError(f"expected a tokenizer of byte pairs ('gpt2'), the GGUF file has {field('model')!r}")
    library = require("tokenizers")
    tokens = field("tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in field("merges", [])]
    name = field("pre", "default")
    result = library.Tokenizer(library.models.BPE(dict(zip(tokens, range(len(tokens)))), merges, ignore_merges=name == "llama-bpe"))
    result.pre_tokenizer = _pre_tokenizer(library, name)
    result.decoder = library.decoders.ByteLevel()
    for kind, add in ((_CONTROL, result.add_special_tokens), (_USER_DEFINED, result.add_tokens)):
        add([library.AddedToken(token, normalized=False, special=kind == _CONTROL)
             for token, own in zip(tokens, field("token_type", [])) if own == kind])
    if field("add_bos_token", False):
        first = int(field("bos_token_id"))
        result.post_processor = library.processors.TemplateProcessing(single=f"{tokens[first]} $A", special_tokens=[(tokens[first], first)])
    return result


def _pre_tokenizer(library, name: str):
    parts = library.pre_tokenizers
    if name in _GPT2:
        digits = [parts.Digits(individual_digits=True)] if name in _DIGITS_APART else []
        return parts.Sequence([*digits, parts.ByteLevel(add_prefix_space=False)])
    if name in _PATTERNS:
        return parts.Sequence([parts.Split(library.Regex(_PATTERNS[name]), "isolated"), parts.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise PretrainedError(f"the GGUF file's tokenizer cuts text as {name!r}; expected one of: {', '.join(sorted({*_GPT2, *_PATTERNS}))}")
