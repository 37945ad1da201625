"""Whole architectures, composed from blocks and mechanisms."""

from attnx.models.config import TransformerConfig
from attnx.models.decoder import Decoder
from attnx.models.encoder import Encoder
from attnx.models.encoder_decoder import EncoderDecoder
from attnx.models.generate import generate
from attnx.models.transformer import Transformer, TransformerState

__all__ = ["Decoder", "Encoder", "EncoderDecoder", "Transformer", "TransformerConfig", "TransformerState", "generate"]
