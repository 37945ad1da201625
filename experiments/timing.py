"""How long a call takes."""

import time
from collections.abc import Callable

import jax


def least_seconds(call: Callable, times: int) -> float:
    """The least of several times of ``call()``, after one that may compile.

    >>> least_seconds(lambda: sum(range(10)), times=3) < 1
    True
    """
    jax.block_until_ready(call())
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - began)
    return min(taken)
