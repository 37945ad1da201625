"""Reading attention: what a model's heads do."""

from attnx.analysis.sinks import activation_kurtosis, sink_rate, sparsity

__all__ = ["activation_kurtosis", "sink_rate", "sparsity"]
