"""Softmax weights, with an optional sink and an optional temperature.

    w_ij = e^(s_ij / tau_i) / (e^sink_n + sum_j e^(s_ij / tau_i))

Vaswani et al.: "Attention Is All You Need" (2017, arXiv 1706.03762). The sink is an extra logit with no value behind it, which lets a head attend to
nothing: fixed at 0 it is Miller's "softmax1" (2023), learned per head it is that of gpt-oss (2025, arXiv 2508.10925).
"""

from attnx.core.checks import check_real
from pallas_kernels.parts import Exponential, Softmax


def softmax(sink=None, temperature=None) -> Exponential:
    """Softmax over the allowed keys of each row.

    Args:
      sink: an extra logit in the normaliser, a number or real [N], fixed or learned.
      temperature: divides the scores; a positive number or real [T] or [B, T, N] (size 1 broadcasts), fixed or learned.

    >>> import attnx, jax.numpy as jnp
    >>> q = k = jnp.zeros((1, 3, 1, 8))
    >>> w = attnx.attention_weights(q, k, weights=attnx.weights.softmax(sink=0.0))
    >>> [f"{x:.2f}" for x in w[0, 0, 0]]
    ['0.25', '0.25', '0.25']
    """
    if isinstance(temperature, (int, float)) and temperature <= 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    return Softmax(None if sink is None else check_real("sink", sink, ranks=(0, 1)),
                   None if temperature is None else check_real("temperature", temperature, ranks=(0, 1, 3)))
