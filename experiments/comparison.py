"""Tables and figures of the comparison."""

import contextlib
import math
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

_LINES = 8  # the most that a figure can tell apart


def table(summary: dict[str, Any]) -> Table:
    """What the mechanisms reached, and what n-gram models do."""
    (_, *headings), rows = cells(summary)
    result = Table(title=f"Held-out text, mean ± standard deviation over {summary['text']['held_out_files']} files", title_justify="left",
                   box=box.SIMPLE, padding=(0, 0, 0, 1))
    result.add_column("", no_wrap=True)
    for heading in headings:
        result.add_column(heading.replace(", ", "\n"), justify="right", no_wrap=True)
    for index, row in enumerate(rows):
        result.add_row(*map(escape, row), style="dim" if index < len(summary["ngrams"]) else None)
    return result


def cells(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table, n-gram models first, then mechanisms from the best on."""
    length, longer, recall = summary["options"]["length"], _longest(summary), "recall" in summary["mechanisms"][0]
    headings = ["", f"bits/byte, length {length}", f"bits/byte, length {longer}", "training, tokens/s", "memory, of a step", f"state, at {longer}",
                *(["values, recalled"] if recall else [])]
    rows = [[f"n-gram order {row['order']}", _spread(row)] + [""] * (len(headings) - 2) for row in summary["ngrams"]]
    for row in sorted(summary["mechanisms"], key=lambda row: row["bits_per_byte"]):
        rows.append([row["mechanism"], _spread(row), _spread(row["longer"]) if row["longer"] else "", f"{row['tokens_per_second']:,.0f}",
                     _bytes(row["memory_bytes"]), _bytes(row["state_bytes"]), *([f"{row['recall']:.1%}"] if recall else [])])
    return headings, rows


def printable(text: str) -> str:
    """Text from a model, safe to show on a terminal and in rich's markup."""
    return escape("".join(character if character.isprintable() or character in "\n\t" else "\N{REPLACEMENT CHARACTER}" for character in text))


def draw(summary: dict[str, Any], records: dict[str, list[dict[str, float]]], file: Path) -> None:
    """A figure of training (left) and of held-out cost by position in the text (right); of many mechanisms, or with recall, one of the ranking."""
    if len(records) > _LINES or "recall" in summary["mechanisms"][0]:
        _draw_ranking(summary, file)
        return
    with _figure(file, 2) as (left, right):
        _curves(left, records)
        for row in summary["mechanisms"]:
            position_costs = np.array(row["by_position"])
            position, cost = _by_octave(position_costs)
            right.plot(position, cost, marker=".", label=f"{row['mechanism']}: {row['bits_per_byte']:.3f}"
                       + (f", at {len(position_costs)}: {row['longer']['bits_per_byte']:.3f}" if row["longer"] else ""))
        for row in summary["ngrams"]:
            right.axhline(row["bits_per_byte"], color="grey", linewidth=0.8, linestyle=":")
            right.annotate(f"order {row['order']}", (1, row["bits_per_byte"]), color="grey", fontsize="small", va="bottom")
        right.axvline(summary["options"]["length"], color="grey", linewidth=0.8)
        right.set(title="held-out text", xlabel="position in the text (the line: length in training)", ylabel="bits per byte", xscale="log")


def _draw_ranking(summary, file):
    """Dots of cost at both lengths and of recall, best on top."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    ranked = sorted(summary["mechanisms"], key=lambda row: -row["bits_per_byte"])
    length, longer, places = summary["options"]["length"], _longest(summary), np.arange(len(ranked))
    recall = "recall" in ranked[0]
    figure, panels = pyplot.subplots(1, 1 + recall, figsize=(7 + 3 * recall, 1.5 + 0.24 * len(ranked)), layout="constrained", sharey=True, squeeze=False,
                                     width_ratios=(2, 1)[:1 + recall])
    cost = panels[0, 0]
    cost.plot([row["bits_per_byte"] for row in ranked], places, "o", color="#3366aa", label=f"length {length}")
    cost.plot([row["longer"]["bits_per_byte"] if row["longer"] else np.nan for row in ranked], places, "o", color="#cc5544", fillstyle="none", label=f"length {longer}")
    for row in summary["ngrams"]:
        cost.axvline(row["bits_per_byte"], color="grey", linewidth=0.8, linestyle=":")
        cost.annotate(f"order {row['order']}", (row["bits_per_byte"], places[-1] + 0.6), color="grey", fontsize="small", ha="center")
    low = min(row["bits_per_byte"] for row in ranked)
    cost.set(xlabel="bits per byte of held-out text", xlim=(low - 0.1, max(4.0, low + 1)), yticks=places, yticklabels=[row["mechanism"] for row in ranked])
    cost.legend(frameon=False, fontsize="small", loc="lower right")
    if recall:
        panels[0, 1].plot([row["recall"] for row in ranked], places, "o", color="#44995c")
        panels[0, 1].set(xlabel="values recalled", xlim=(-0.02, 1.02))
    for panel in panels[0]:
        panel.grid(axis="y", linewidth=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def draw_training(name: str, records: list[dict[str, float]], file: Path) -> None:
    """A figure of training so far."""
    with _figure(file, 1) as axes:
        _curves(axes, {name: records})


@contextlib.contextmanager
def _figure(file, panels):
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(5.5 * panels, 4.2), layout="constrained")
    yield axes
    for panel in np.ravel(axes):
        panel.legend(frameon=False, fontsize="small")
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _curves(axes, records):
    """Bits per byte of training batches, smoothed."""
    height = 0.0
    for name, run in records.items():
        losses = np.array([record["loss"] for record in run]) / math.log(2)
        step, smooth = _smooth(losses, max(len(losses) // 40, 1))
        axes.plot(step, smooth, label=name)
        height = max(height, 1.1 * smooth[len(smooth) // 20:].max())  # the fall of the first steps would flatten the rest
    axes.set(title="training", xlabel="step", ylabel="bits per byte")
    axes.set_ylim(top=height)


def _smooth(values, width):
    """Means of ``width`` values and the steps at which they end."""
    whole = len(values) // width * width
    return np.arange(width, whole + 1, width), values[:whole].reshape(-1, width).mean(axis=1)


def _by_octave(values):
    """Means over positions 1, 2, 3-4, 5-8, ... and where each ends."""
    edges = np.unique(np.minimum(2 ** np.arange(int(np.ceil(np.log2(len(values)))) + 1), len(values)))
    starts = np.concatenate([[0], edges[:-1]])
    return edges, np.array([values[start:end].mean() for start, end in zip(starts, edges)])


def _longest(summary):
    """The length that models are also evaluated at, if they can read so much."""
    return max(len(row["by_position"]) for row in summary["mechanisms"])


def _spread(row):
    return f"{row['bits_per_byte']:.3f} ± {row['spread']:.2f}"


def _bytes(count):
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
