"""Reading attention: what a model's heads do."""

from attnx import lazy

_LAZY = {"quantization": ("calibrate", "fake_quantize", "max_inf_norm", "quantize_weights", "quantized"),
         "sinks": ("activation_kurtosis", "sink_rate", "sparsity")}
__getattr__, __dir__ = lazy.attach(__name__, _LAZY)
__all__ = [name for names in _LAZY.values() for name in names]
