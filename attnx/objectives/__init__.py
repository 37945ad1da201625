"""Losses and training that act on attention."""

from attnx import lazy

_LAZY: dict[str, tuple[str, ...]] = {
    "entropy_guided": ("SoftmaxOnlyBlock", "TemperatureAttention", "attention_entropy", "entropy_reg_loss", "head_entropy_bins", "row_entropy",
                       "temperature_attention"),
    "tap_adl": ("TAPBlock", "TokenAwarePooling", "attention_diversification_loss", "dilated_average_pool", "token_aware_pool"),
}
__getattr__, __dir__ = lazy.attach(__name__, _LAZY)
__all__ = [name for names in _LAZY.values() for name in names]
