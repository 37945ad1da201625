"""The user's table of tile sizes: where it is, what it may hold, and when it counts."""

import json
import re
import warnings

import jax
import jax.numpy as jnp
import pytest

import attnx
from attnx.core import fused
from attnx.core.attention import prepare
from attnx.pretrained.sources import cache_directory
from pallas_kernels import tiles, tuned
from pallas_kernels.tiles import TABLE, Columns, Slab, Tile, Tiles, default, look_up

ENTRY = {"kernel": "flash, tpu", "device": "TPU v5 lite", "size": 128, "bytes": 2, "length": 0, "sizes": {"bq": 256, "bk": 1024}}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes a table that the kernels read."""
    file = tmp_path / "tiles.json"
    monkeypatch.setenv("ATTNX_TILES", str(file))

    def write(*entries, text=None):
        file.write_text(json.dumps({"version": 1, "entries": entries}) if text is None else text)
        tuned.table.cache_clear()
        return file

    tuned.table.cache_clear()
    yield write
    tuned.table.cache_clear()


def test_lies_where_checkpoints_do(monkeypatch, tmp_path):
    monkeypatch.delenv("ATTNX_TILES")
    for name, value in (("ATTNX_CACHE", ""), ("XDG_CACHE_HOME", str(tmp_path)), ("ATTNX_CACHE", str(tmp_path / "own"))):
        monkeypatch.setenv(name, value)
        assert tuned.location() == cache_directory() / "tiles.json"
    monkeypatch.setenv("ATTNX_TILES", "")
    assert tuned.location() is None


def test_tests_see_no_table():
    assert tuned.table() == {}


def test_counts_before_the_defaults(table):
    table(ENTRY, {**ENTRY, "length": 4096, "sizes": {"bq": 1024, "bk": 128}})
    assert look_up("flash, tpu", "TPU v5 lite", 128, 2) == look_up("flash, tpu", "TPU v5 lite", 65, 2, 4095) == Tile(256, 1024)
    assert look_up("flash, tpu", "TPU v5 lite", 128, 2, 4096) == Tile(1024, 128)
    for device, size, itemsize in (("TPU v5", 128, 2), ("TPU v5 lite2", 128, 2), ("", 128, 2), ("TPU v5 lite", 64, 2), ("TPU v5 lite", 129, 2), ("TPU v5 lite", 128, 4)):
        assert look_up("flash, tpu", device, size, itemsize) == default("flash, tpu", device, size, itemsize)
    with tiles.using(**{"flash, tpu": Tile(128, 128)}):
        assert look_up("flash, tpu", "TPU v5 lite", 128, 2) == Tile(128, 128)
        assert look_up("linear, tpu", "TPU v5 lite", 128, 2) == default("linear, tpu", "TPU v5 lite", 128, 2)
    assert look_up("flash, tpu", "TPU v5 lite", 128, 2) == Tile(256, 1024)


def test_is_read_once(table):
    file = table(ENTRY)
    first = look_up("flash, tpu", "TPU v5 lite", 128, 2)
    file.unlink()
    assert look_up("flash, tpu", "TPU v5 lite", 128, 2) == first


@pytest.mark.parametrize("kernel, sizes, expected", [
    ("linear, tpu", {"chunk": 256, "chunks": 4, "memory": 1000}, Slab(256, 4, 1000)),
    ("decode, tpu", {"least": 128, "most": 1024, "pairs": 3, "memory": 5}, Columns(128, 1024, 3, 5)),
    ("flash, gpu", {name: {"bq": 64, "bk": 32, "warps": 4, "stages": 2} for name in Tiles._fields}, Tiles(*[Tile(64, 32, 4, 2)] * 4)),
])
def test_holds_sizes_of_every_kernel(kernel, sizes, expected):
    assert tuned.check(kernel, sizes) == expected


def test_every_default_could_stand_in_a_table():
    for kernel, entries in TABLE.items():
        for _, sizes in entries:
            as_json = {name: x._asdict() if isinstance(x, tuple) else x for name, x in sizes._asdict().items()}
            assert tuned.check(kernel, json.loads(json.dumps(as_json))) == sizes


@pytest.mark.parametrize("change, message", [
    ({"sizes": {"bq": 64, "bk": 512}}, "entry 2: bq: expected a power of two and at least 128, got 64"),
    ({"sizes": {"bq": 384, "bk": 512}}, "entry 2: bq: expected a power of two and at least 128, got 384"),
    ({"sizes": {"bq": 512.0, "bk": 512}}, "entry 2: bq: expected a power of two and at least 128, got 512.0"),
    ({"sizes": {"bq": True, "bk": 512}}, "entry 2: bq: expected .* got true"),
    ({"sizes": {"bq": 512}}, "entry 2: sizes: expected bq, bk, warps, stages, got"),
    ({"sizes": {"bq": 512, "bk": 512, "heads": 1}}, "entry 2: sizes: expected bq, bk, warps, stages, got"),
    ({"kernel": "sparse, tpu"}, "entry 2: kernel: expected one of flash, gpu; flash, tpu; .* got 'sparse, tpu'"),
    ({"kernel": "flash, gpu", "sizes": {name: {"bq": 8, "bk": 32} for name in Tiles._fields}}, "entry 2: bq: expected a power of two and at least 16, got 8"),
    ({"kernel": "flash, gpu", "sizes": {name: 3 for name in Tiles._fields}}, "entry 2: sizes: expected bq, bk, warps, stages, got 3"),
    ({"kernel": "linear language, gpu", "sizes": {"none": "pallas", "head": "cuda", "channel": "pallas"}}, "entry 2: head: expected one of pallas, triton, got"),
    ({"size": 100}, "entry 2: size: expected a power of two from 64, got 100"),
    ({"device": None}, "entry 2: device: expected a str, got null"),
    ({"length": -1}, "entry 2: length: expected 0 or more, got -1"),
])
def test_names_the_entry_that_cannot_be_used(table, change, message):
    file = table(ENTRY, {**ENTRY, **change})
    with pytest.raises(tuned.TableError, match=f"{re.escape(str(file))}, {message}"):
        tuned.read(file)


@pytest.mark.parametrize("text", ["{", "[1]", '{"version": 2, "entries": []}', '{"version": 1}', '{"version": 1, "entries": [3]}', "[" * 100_000, "\udc80"])
def test_warns_once_of_a_file_that_is_no_table(table, text):
    file = table(text="")
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.warns(UserWarning, match=f"{re.escape(str(file))}.*; the default tile sizes serve"):
        assert look_up("flash, tpu", "TPU v5 lite", 128, 2) == default("flash, tpu", "TPU v5 lite", 128, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        look_up("flash, tpu", "TPU v5 lite", 128, 2)


def _tiling(length, size=128, dtype=jnp.bfloat16, **parts):
    x = jax.ShapeDtypeStruct((1, length, 1, size), dtype)

    def choose(x):
        _, program, data = prepare(x, x, x, **parts)
        with fused.forced():
            chosen.append(fused.choose_fused(program, data).tiling[:2])
        return x

    chosen = []
    jax.eval_shape(choose, x)
    return chosen[0]


def test_tiles_grow_with_the_length_where_little_is_wasted():
    causal = {"mask": attnx.masks.causal()}
    assert _tiling(2048, **causal) == _tiling(4095 - 511, **causal) == (512, 512)
    assert _tiling(4096, **causal) == _tiling(4096) == (1024, 1024)
    assert _tiling(4608) == (512, 512)  # larger tiles would be a tenth padding
    assert _tiling(20000 + 32) == (1024, 1024)
    for parts in (dict(mask=attnx.masks.sliding_window(512)), dict(scores=attnx.scores.soft_cap(30.0)), dict(weights=attnx.weights.softpick()),
                  dict(query_positions=jnp.arange(8192), key_positions=jnp.arange(8192)), dict(mask=attnx.masks.causal() & attnx.masks.sliding_window(512))):
        assert _tiling(8192, **parts) == (512, 512)


def test_knows_the_kind_of_the_device_at_hand(monkeypatch):
    monkeypatch.setattr(fused, "look_up", lambda *call: call)
    key, value = jnp.zeros((1, 1, 1, 64), jnp.bfloat16), jnp.zeros((1, 1, 1, 128))
    for device in (None, jax.devices()[1]):
        with jax.default_device(device):
            assert fused.default_sizes("flash", "cpu", key, None, value, length=7) == ("flash, cpu", jax.devices()[0].device_kind, 128, 4, 7)
            assert fused.default_sizes("flash", "tpu", key) == ("flash, tpu", "", 64, 2, 0)
