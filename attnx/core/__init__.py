"""The engines, argument checks and small primitives."""
