"""Trains a small language model with each of several mechanisms and compares them."""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from attnx import training
from attnx.cli import UsageError
from experiments import markdown
from experiments.comparison import cells, draw, printable, table
from experiments.evidence import Trial
from experiments.fit import accuracy, cross_entropy, fit
from experiments.mechanisms import ALL_CAUSAL, MECHANISMS, expand
from experiments.ngrams import ngram_bits
from experiments.options import parse
from experiments.progress import Meter
from experiments.run import Recipe, Run, claim
from experiments.tasks import recall

LONGER = 4  # times the training length, at which models are evaluated too
_ORDERS = (1, 2, 3)  # of the n-gram baselines
_OVERHEAD = 0.25  # what compiling and evaluating cost, in the training of a mechanism
_PAIRS = 8  # to be recalled
_RECALL_COST = 2.0  # of an update of recall, in updates of text


@dataclasses.dataclass(frozen=True)
class Options(Recipe):
    """Trains a small decoder of bytes on real text with each of several attention mechanisms, under the same budget: same sizes, initial
    seed, batches and number of steps. Whole files are held out; on them it measures bits per byte, with n-gram models for comparison.

    Ends with a table, best first, a figure, checkpoints (for `attnx generate`) and a sample of each model. Stopped and called again, it goes on
    where it was.
    """

    attention: tuple[str, ...] = tuple(MECHANISMS)
    """Mechanisms to compare, by name: those of the default, ids of papers (`attnx list`), all-causal for all of both, or module:function for your own, a
    function (length, heads)."""
    out: Path = Path("runs/compare")
    """Folder of the results."""
    windows: int = 8
    """Windows of four times the training length to evaluate in each held-out file."""
    recall_steps: int | None = None
    """Updates of a second model of each kind, which learns to recall the values of keys; none by default, 1000 with all-causal."""
    write: Path | None = None
    """A Markdown file whose part between the marks of this command is replaced by the table."""
    smoke: bool = False
    """The same in seconds, with models too small and too little trained to mean anything; in runs/smoke unless --out says otherwise."""


def main(program: str, arguments: Sequence[str]) -> int:
    """The command ``compare``."""
    options = _settle(parse(Options, program, arguments))
    compare(options, Console())
    return 0


def _settle(options: Options) -> Options:
    names = expand(options.attention)
    if not names or len(set(names)) < len(names):
        raise UsageError(f"--attention: expected one or more different names, got {' '.join(options.attention) or 'none'}")
    recall = options.recall_steps if options.recall_steps is not None else 1000 if ALL_CAUSAL in options.attention else 0
    if recall < 0:
        raise UsageError(f"--recall-steps: expected 0 or more, got {recall}")
    options = dataclasses.replace(options, attention=names, recall_steps=recall)
    if not options.smoke:
        return options
    out = Path("runs/smoke") if options.out == Options.out else options.out
    return dataclasses.replace(options, features=32, layers=2, heads=2, length=32, steps=40, save_every=20, windows=1, out=out,
                               recall_steps=min(recall, 5))


def compare(options: Options, console: Console) -> dict[str, Any]:
    """Trains, evaluates and reports; returns what it also writes to ``compare.json``."""
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(options) if field.name not in ("out", "attention", "write", "smoke")}
    recipe = Recipe(**{field.name: given[field.name] for field in dataclasses.fields(Recipe)})
    runs = [Run(options.out / _folder(name), name, recipe) for name in options.attention]
    train, held = training.read(options.data).split()
    spans = training.spans(held, LONGER * options.length, options.windows)
    if not spans.valid.all(axis=1).any():
        raise training.DataError(f"no held-out file has {LONGER * options.length} bytes; try a smaller --length or more text")
    claim(options.out / "options.json", given)
    console.print(f"Training on {len(train.names)} files, {len(train.tokens) / 1e6:.1f} MB; held out: {len(held.names)} files, of which "
                  f"{spans.valid.sum() / 1e3:.0f} kB are predicted.", highlight=False)
    ngrams = [{"order": order, **_per_file(bits[spans.positions], spans)}
              for order, bits in enumerate(ngram_bits(train, held, max(_ORDERS))) if order in _ORDERS]
    work, recall = options.steps * (1 + _OVERHEAD), (options.recall_steps or 0) * _RECALL_COST
    with Meter((work + recall) * len(runs), console) as meter:
        results = [_measure(run, train, spans, meter, index * (work + recall), console) for index, run in enumerate(runs)]
        if recall:
            for index, (run, result) in enumerate(zip(runs, results)):
                result["recall"] = _recall(run, options.recall_steps, meter, index * (work + recall) + work)
    summary = {"text": {"training_files": len(train.names), "training_bytes": len(train.tokens), "held_out_files": len(held.names),
                        "predicted_bytes": int(spans.valid.sum())},
               "options": json.loads(json.dumps(given)), "ngrams": ngrams, "mechanisms": results}
    (options.out / "compare.json").write_text(json.dumps(summary, indent=2))
    draw(summary, {run.name: run.metrics.read() for run in runs},
         options.out / "compare.png")
    for result in results:
        console.rule(result["mechanism"], style="dim")
        console.print(f"[dim]{printable(result['prompt'])}[/]{printable(result['sample'])}", highlight=False)
    console.print(table(summary))
    if options.write:
        names = ALL_CAUSAL if options.attention == expand([ALL_CAUSAL]) else " ".join(options.attention)
        asked = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in summary["options"].items() if value != getattr(Options, name))
        markdown.replace(options.write, "attnx compare", [f"`attnx compare --attention {names} {asked}`: {len(results)} mechanisms; mean ± standard deviation over "
                                                          f"{summary['text']['held_out_files']} held-out files.", "", *markdown.table(*cells(summary)), ""])
    console.print(f"Figure, numbers and checkpoints are in {options.out}; try: attnx generate {options.out / _folder(options.attention[0])}",
                  highlight=False)
    return summary


def _measure(run: Run, train: training.Corpus, spans: training.Spans, meter: Meter, before: float,
             console: Console) -> dict[str, Any]:
    """Trains and evaluates one mechanism, unless that has been done; ``before`` is where the meter stands."""
    file, steps = run.folder / "result.json", run.recipe.steps
    if file.exists():
        meter.skip(before + steps * (1 + _OVERHEAD))
        return json.loads(file.read_text())
    run.claim()
    meter.at(before, f"{run.name}: compiling")
    prepared = run.prepare()
    memory = prepared.step.memory_analysis()

    def report(step, values):
        if values:
            meter.at(before + step, f"{run.name}: step {step} of {steps}, {values['loss'] / np.log(2):.2f} bits per byte")
        else:
            meter.skip(before + step)

    params = run.train(prepared, train, report=report, notify=lambda message: console.print(f"{run.name}: {message}", highlight=False))
    records = run.metrics.read()
    meter.at(before + steps, f"{run.name}: evaluating")
    cut, reach = _cut(spans, run.recipe.length), LONGER * run.recipe.length
    near = run.model.evaluate(params, cut)
    if reads := run.model.reads(reach):
        longest, bits = spans, run.model.evaluate(params, spans)
    else:  # weights that stand at positions
        longest, bits, reach = cut, near, run.recipe.length
    prompt = spans.tokens[spans.valid.all(axis=1)][0, 1:1 + min(64, reach // 2)].astype(np.uint8).tobytes()
    sample = bytes(run.model.stream(params, prompt, min(160, reach - len(prompt) - 1), temperature=0.7))
    result = {"mechanism": run.name, **_per_file(near, cut), "longer": _per_file(bits, longest) if reads else None,
              "by_position": (np.sum(bits * longest.valid, axis=0) / np.sum(longest.valid, axis=0)).tolist(),
              "tokens_per_second": steps * run.recipe.batch * run.recipe.length / records[-1]["seconds"],
              "memory_bytes": memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
              - memory.alias_size_in_bytes,
              "state_bytes": run.model.state_bytes(reach),
              "parameters": sum(x.size for x in jax.tree.leaves(params)),
              "prompt": prompt.decode(errors="replace"), "sample": sample.decode(errors="replace")}
    _write(file, result)
    meter.at(before + steps * (1 + _OVERHEAD), f"{run.name}: done")
    return result


def _recall(run: Run, steps: int, meter: Meter, before: float) -> float:
    """The share of values that a model recalls which was trained to."""
    file = run.folder / "recall.json"
    if file.exists():
        meter.skip(before + steps * _RECALL_COST)
        return json.loads(file.read_text())["accuracy"]
    logits = lambda params, tokens: recall.answers(run.model.decoder(params)(tokens[:, :-1]))
    trial = Trial(run.recipe.seed, report=lambda share, text: meter.at(before + share * steps * _RECALL_COST, text))
    params = fit(lambda params, tokens, key: cross_entropy(logits(params, tokens), recall.answers(tokens[:, 1:])), run.model.init(),
                 recall.sampler(_PAIRS, 32), steps=steps, trial=trial, name=f"{run.name}, recall")
    tokens = recall.sampler(_PAIRS, 512)(jax.random.key(run.recipe.seed + 1))
    found = float(accuracy(jax.jit(logits)(params, tokens), recall.answers(tokens[:, 1:])))
    _write(file, {"accuracy": found})
    return found


def _write(file, result):
    finished = file.with_suffix(".tmp")
    finished.write_text(json.dumps(result, indent=2))
    finished.replace(file)


def _cut(spans: training.Spans, length: int) -> training.Spans:
    """The same predictions in shorter windows."""
    count = spans.valid.shape[1] // length
    windows = [slice(i * length, (i + 1) * length + 1) for i in range(count)]
    return training.Spans(np.concatenate([spans.tokens[:, window] for window in windows]),
                          *(np.concatenate(np.split(x, count, axis=1)) for x in (spans.valid, spans.positions)),
                          np.tile(spans.file, count))


def _per_file(bits: np.ndarray, spans: training.Spans) -> dict[str, float]:
    """Mean and standard deviation over files of the bits per byte of a file."""
    files = (np.bincount(spans.file, (bits * spans.valid).sum(axis=1)) / np.bincount(spans.file, spans.valid.sum(axis=1)))
    return {"bits_per_byte": float(files.mean()), "spread": float(files.std())}


def _folder(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)
