"""Positions: transforms of queries and keys, and embeddings added to tokens. Pure functions, one mechanism a file."""

from attnx.positions.learned import learned
from attnx.positions.rotary import Rotary, rotary
from attnx.positions.sinusoidal import sinusoidal

__all__ = ["Rotary", "learned", "rotary", "sinusoidal"]
