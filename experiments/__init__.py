"""Experiments on attnx: training, comparing and measuring mechanisms."""
