"""Tile mathematics and fused kernels, usable without the rest of the library."""
