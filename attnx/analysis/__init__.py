"""Reading attention: what a model's heads do."""

from attnx import lazy

_LAZY = {
    "attention_rank": ("spectrum",),
    "bert_heads": ("coreference_antecedent", "embed_heads", "head_as_parser", "head_distances", "head_entropy", "offset_baseline", "separator_gradient",
                   "surface_statistics", "token_to_word", "uas_by_relation"),
    "bert_probes": ("AttentionProbe", "AttentionWordProbe", "WordDistanceProbe", "distance_features", "probe_maps"),
    "concentration": ("log_variance", "row_entropy", "spectral_gap"),
    "quantization": ("calibrate", "fake_quantize", "max_inf_norm", "quantize_weights", "quantized"),
    "signed": ("layer_cosine_collapse", "negative_mass"),
    "sinks": ("activation_kurtosis", "sink_rate", "sparsity"),
}
__getattr__, __dir__ = lazy.attach(__name__, _LAZY)
__all__ = [name for names in _LAZY.values() for name in names]
