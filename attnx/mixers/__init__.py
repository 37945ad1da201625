"""Mixing tokens without queries and keys, or before them."""

from attnx import lazy

_LAZY: dict[str, tuple[str, ...]] = {
    "causal_reduction": ("CausalReduceState", "CausalReductionMixer", "causal_reduce", "causal_reduce_init", "causal_reduce_step", "context_vector"),
    "distillation": ("LayerIO", "distill_attention", "distillation_loss", "extract_io", "swap"),
    "extractors": ("Extractor", "ExtractorParams", "ExtractorState", "extractor_he", "extractor_init", "extractor_me", "extractor_she", "extractor_step",
                   "extractor_we"),
    "fftnet": ("FFTNetBlock", "FFTNetClassifier", "FFTNetMixer", "modrelu", "resize_filter", "spectral_mix"),
    "mega": ("EMA", "MegaLayer", "NormalizedFFN", "gated_attention", "multihead_ema", "rotary_table"),
    "sentence_ff": ("CausalSentenceFF", "CrossSentenceFF", "CrossSentenceState", "HeadwiseFF", "SentenceFF", "SentenceState", "hidden_size"),
}
__getattr__, __dir__ = lazy.attach(__name__, _LAZY)
__all__ = [name for names in _LAZY.values() for name in names]
