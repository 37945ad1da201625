"""Numbers of few bits: formats, their layouts in memory, and products of a tile whose operands are rounded to them."""
