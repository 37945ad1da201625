"""Mechanisms on the selected engine: which keys a query attends to depends on the data."""

from attnx.sparse.topk_blocks import topk_blocks

__all__ = ["topk_blocks"]
