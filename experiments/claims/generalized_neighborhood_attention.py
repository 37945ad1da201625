"""The paper: sliding neighbourhoods waste tiles at their edges; with strides, many cases become perfectly block-sparse and reach the speed that their sparsity promises.

Here: (1) a count of the tiles visited, on grids of 64 by 64 (tiles of 8 by 8) and 16 by 32 by 32 tokens (tiles of 2 by 4 by 8), with windows of a quarter, a half and
three quarters of each side and strides of 1, a quarter, a half and all of the window: all tiles over visited ones, against all pairs over those of the neighbourhoods.
(2) Seconds of the blockwise execution on the CPU for all cases of the plane (4096 tokens, four heads of 32), the least of several, against those of dense attention in
the same tiles. The claim holds if in every case a stride of 1 loses at least 25% of what sparsity promises and a stride of the window less than 2%, speed never falls as
the stride grows, and the rank correlation of counted and measured speed-ups is at least 0.9.
"""

import functools

import jax
import numpy as np
from scipy import stats

from attnx import masks
from experiments.evidence import Claim, Criterion, Trial
from experiments.timing import least_seconds

GRIDS = {(64, 64): (8, 8), (16, 32, 32): (2, 4, 8)}
SHARES, STRIDES, HEADS, SIZE = (0.25, 0.5, 0.75), (0, 0.25, 0.5, 1), 4, 32
PLANE = (64, 64)


def _case(grid, share, stride):
    window = tuple(int(n * share) for n in grid)
    return dict(window=window, stride=tuple(max(int(w * stride), 1) for w in window), query_tile=GRIDS[grid], key_tile=GRIDS[grid])


@functools.cache
def _plans():
    """{(grid, share, stride): (what sparsity promises, what tiles allow)}."""
    plans = {(grid, share, stride): masks.neighborhood_plan(grid, **_case(grid, share, stride)) for grid in GRIDS for share in SHARES for stride in STRIDES}
    return {case: (plan.dense, plan.speedup) for case, plan in plans.items()}


def _seconds(seed, times, **case):
    q, k, v = jax.random.normal(jax.random.key(seed), (3, 1, *PLANE, HEADS, SIZE))
    attend = jax.jit(lambda q, k, v: masks.neighborhood_attention(q, k, v, implementation="blockwise", **case))
    return least_seconds(lambda: attend(q, k, v), times)


def run(trial: Trial):
    """Counts, and takes the time."""
    plans = _plans()
    reached = {stride: [speed / promised for (_, _, s), (promised, speed) in plans.items() if s == stride] for stride in STRIDES}
    steps = np.array([[plans[grid, share, stride][1] for stride in STRIDES] for grid in GRIDS for share in SHARES])
    cases = [case for case in plans if case[0] == PLANE][:trial.scaled(12, 2)]
    times = trial.scaled(5, 1)
    dense = _seconds(trial.seed, times, window=PLANE, query_tile=GRIDS[PLANE], key_tile=GRIDS[PLANE])
    measured = []
    for index, case in enumerate(cases):
        measured.append(dense / _seconds(trial.seed, times, **_case(*case)))
        trial.report((index + 1) / len(cases), f"window {case[1]:.0%}, {measured[-1]:.1f} times as fast")
    counted = [plans[case][1] for case in cases]
    return {**{f"stride {stride:.0%}, reached": 100 * float(np.mean(values)) for stride, values in reached.items()},
            "stride 0%, best": 100 * max(reached[0]), "stride 100%, worst": 100 * min(reached[1]), "rises": float(np.diff(steps, axis=1).min()),
            "correlation": float(stats.spearmanr(counted, measured).statistic), "counted": counted, "measured": measured,
            "measured over counted": float(np.mean(np.array(measured) / counted)), "dense, ms": 1e3 * dense}


def draw(figure, seeds):
    """What is reached of the promise, by stride; and measured against counted."""
    left, right = figure.subplots(1, 2)
    for (grid, share), marker in zip([(grid, share) for grid in GRIDS for share in SHARES], "os^vD*"):
        left.plot(range(len(STRIDES)), [100 * np.divide(*_plans()[grid, share, stride][::-1]) for stride in STRIDES], marker + "-",
                  label=f"{' x '.join(map(str, grid))}, windows {share:.0%}")
    left.set(xticks=range(len(STRIDES)), xticklabels=["1", *(f"{stride:.0%}" for stride in STRIDES[1:])], xlabel="stride, of the window",
             ylabel="% of the promised speed-up that tiles allow", ylim=(0, 105))
    left.legend(fontsize=7, frameon=False)
    for seed in seeds:
        right.loglog(seed["counted"], seed["measured"], "o", fillstyle="none")
    right.plot((1, 16), (1, 16), color="grey", linewidth=0.8)
    right.set(xlabel="speed-up by counted tiles", ylabel="speed-up measured on a CPU")


claim = Claim(
    id="generalized-neighborhood-attention",
    run=run,
    criteria=(
        Criterion("% of the promise: a stride of 1 loses at least 25 in the best case", lambda m: 75 - m["stride 0%, best"]),
        Criterion("% of the promise: a stride of the window loses less than 2 in the worst case", lambda m: m["stride 100%, worst"] - 98),
        Criterion("the speed-up never falls as the stride grows", lambda m: m["rises"] + 1e-9),
        Criterion("rank correlation of counted and measured speed-ups at least 0.9", lambda m: m["correlation"] - 0.9)),
    table=(("", "% of the promise", "in the extreme case"),
           {"stride of 1": ("stride 0%, reached", "stride 0%, best"), "a quarter of the window": ("stride 25%, reached", ""), "half": ("stride 50%, reached", ""),
            "the window": ("stride 100%, reached", "stride 100%, worst"), "measured over counted": ("measured over counted", ""),
            "rank correlation": ("correlation", "")}),
    draw=draw)
