"""Charts that experiments share."""

from collections.abc import Mapping, Sequence

import numpy as np

COLOURS = ("#3366aa", "#cc5544", "#44995c", "#aa77bb", "#e0a030", "#668899", "#885533", "#999999")


def bars(axes, values: Mapping[str, Sequence[float]], label: str) -> None:
    """One bar a name, of the mean over seeds, with the seeds as dots."""
    for index, seeds in enumerate(values.values()):
        axes.bar(index, np.mean(seeds), color=COLOURS[index % len(COLOURS)], alpha=0.75)
        axes.plot([index] * len(seeds), seeds, "k.", markersize=4)
    axes.set_xticks(range(len(values)), list(values), rotation=20, ha="right")
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)


def lines(axes, x: Sequence[float], values: Mapping[str, Sequence[Sequence[float]]], xlabel: str, ylabel: str) -> None:
    """One line a name, of the mean over seeds [seeds, len(x)], with the range of the seeds as a band."""
    for index, (name, seeds) in enumerate(values.items()):
        seeds, colour = np.asarray(seeds, float), COLOURS[index % len(COLOURS)]
        axes.plot(x, seeds.mean(0), color=colour, label=name, marker="." if len(x) < 30 else "")
        axes.fill_between(x, seeds.min(0), seeds.max(0), color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
