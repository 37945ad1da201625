"""Flax (nnx) blocks that are handed any mechanism of any engine."""

from attnx.nn.attention import Attention, CrossState, SelfState
from attnx.nn.attention_fn import as_attention_fn
from attnx.nn.block import TransformerBlock
from attnx.nn.common import constrain, logical_axes
from attnx.nn.embedding import Embedding
from attnx.nn.frozen import Constant
from attnx.nn.layers import Layers, unstack
from attnx.nn.lstm import LSTMState, StackedLSTM
from attnx.nn.mlp import MLP
from attnx.nn.norms import HeadNorm, make_norm
from attnx.nn.recording import record
from attnx.nn.stack import Stack
from attnx.nn.switch import set_mechanism

__all__ = ["Attention", "Constant", "CrossState", "Embedding", "HeadNorm", "LSTMState", "Layers", "MLP", "SelfState", "Stack", "StackedLSTM", "TransformerBlock",
           "as_attention_fn", "constrain", "logical_axes", "make_norm", "record", "set_mechanism", "unstack"]
