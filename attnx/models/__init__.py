"""Whole architectures, composed from blocks and mechanisms."""

from attnx import lazy
from attnx.models.attention_is_all_you_need import OriginalTransformer, label_smoothed_cross_entropy, noam_schedule, original_config
from attnx.models.config import TransformerConfig
from attnx.models.decoder import Decoder
from attnx.models.encoder import Encoder
from attnx.models.encoder_decoder import EncoderDecoder
from attnx.models.generation import generate
from attnx.models.search import Hypotheses, beam_search, greedy_search, length_penalty, rows_of
from attnx.models.transformer import Transformer, TransformerState

_LAZY: dict[str, tuple[str, ...]] = {
    "nat": ("NAT", "ConvDownsampler", "ConvTokenizer", "DiNATConfig", "NATConfig", "PatchMerging", "PatchTokenizer"),
    "ravlt": ("RAVLT", "RAVLTConfig", "Stage"),
    "single_headed": ("ShaRnn", "ShaRnnBlock", "ShaRnnState", "SingleHead", "SingleHeadParams", "boom", "single_head_attention", "value_gate"),
}
__getattr__, __dir__ = lazy.attach(__name__, _LAZY)
__all__ = ["Decoder", "Encoder", "EncoderDecoder", "Hypotheses", "OriginalTransformer", "Transformer", "TransformerConfig", "TransformerState",
           "beam_search", "generate", "greedy_search", "label_smoothed_cross_entropy", "length_penalty", "noam_schedule", "original_config", "rows_of",
           *(name for names in _LAZY.values() for name in names)]
