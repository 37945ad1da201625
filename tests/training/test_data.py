"""Reading, splitting and batching text."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from attnx.training import Corpus, DataError, Windows, batches, read, spans

HELD = {"file13", "file14", "file15", "file16", "file20", "file22", "file24", "file26", "file34", "file38", "file6", "file7", "file8"}


@pytest.fixture
def folder(tmp_path):
    for i in range(40):
        file = tmp_path / f"part{i % 3}" / f"file{i}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes([65 + i % 26]) * (10 + i))
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "empty.txt").touch()
    return tmp_path


def test_whole_files_are_held_out_by_name_alone(folder):
    train, held = read(folder).split(0.3)
    assert len(train.names) + len(held.names) == 40 and not set(train.names) & set(held.names)
    for corpus in (train, held):
        for i, name in enumerate(corpus.names):
            assert corpus.file(i).tobytes() == b"\0" + (folder / name).read_bytes()
    (folder / "another.txt").write_text("one more")
    again = read(folder).split(0.3)[1]
    assert set(held.names) <= set(again.names) <= {*held.names, "another.txt"}
    assert {Path(name).stem for name in held.names} == HELD  # today, tomorrow and on every machine


def test_some_file_is_always_held_out_and_some_is_not():
    corpus = Corpus.of([("a", np.ones(3, int)), ("b", np.ones(4, int))])
    for fraction in (0.0, 1.0):
        assert [len(part.names) for part in corpus.split(fraction)] == [1, 1]


def test_one_file_is_cut_into_parts(tmp_path):
    content = bytes(range(256)) * 5
    (tmp_path / "text").write_bytes(content)
    corpus = read(tmp_path / "text")
    assert len(corpus.names) == 64
    assert b"".join(corpus.file(i)[1:].tobytes() for i in range(64)) == content


def test_standard_library():
    corpus = read()
    assert len(corpus.tokens) > 5e6 and "json/decoder.py" in corpus.names
    assert not any(part in ("test", "site-packages") for name in corpus.names for part in name.split("/"))


def test_a_tokenizer(folder):
    corpus = read(folder, encode=lambda content: [1000 + len(content), 7])
    assert corpus.tokens.dtype == np.int32 and corpus.file(0).tolist() == [0, 1010, 7]


def test_unreadable_text_is_named(tmp_path):
    for path, message in ((tmp_path / "absent", "cannot read .*absent: No such file"), (tmp_path, "no text in")):
        with pytest.raises(DataError, match=message):
            read(path)
    (tmp_path / "a").write_text("x")
    with pytest.raises(DataError, match="two files or more"):
        read(tmp_path).split()
    with pytest.raises(DataError, match="needs 5 tokens or more to fill a window, got 2"):
        Windows(read(tmp_path), 4)


CORPUS = Corpus.of([("a", np.arange(1, 60, dtype=np.uint8)), ("b", np.arange(60, 90, dtype=np.uint8))])  # 91 tokens: 22 windows of 4


def first_tokens(iterator, count):
    return [next(iterator)["tokens"][:, 0].tolist() for _ in range(count)]


def test_an_epoch_has_every_window_once_in_an_order_of_its_own():
    epochs = [sorted(sum(first_tokens(batches(CORPUS, length=4, batch_size=2, seed=5), 11), []))]
    iterator = batches(CORPUS, length=4, batch_size=2, seed=5)
    orders = [sum(first_tokens(iterator, 11), []) for _ in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == epochs[0] == sorted(Windows(CORPUS, 4)[i]["tokens"][0] for i in range(22))
    assert orders[0] != orders[1]
    assert orders[0] == sum(first_tokens(batches(CORPUS, length=4, batch_size=2, seed=5), 11), [])
    assert orders[0] != sum(first_tokens(batches(CORPUS, length=4, batch_size=2, seed=6), 11), [])


@pytest.mark.parametrize("taken", [0, 3, 16])
def test_resumes_anywhere(taken):
    iterator = batches(CORPUS, length=4, batch_size=2)
    first_tokens(iterator, taken)
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = batches(CORPUS, length=4, batch_size=2)
    resumed.set_state(state)
    assert first_tokens(iterator, 12) == first_tokens(resumed, 12)


def test_processes_share_each_batch():
    whole = first_tokens(batches(CORPUS, length=4, batch_size=4), 9)
    shares = [first_tokens(batches(CORPUS, length=4, batch_size=4, process_index=i, process_count=2), 9) for i in range(2)]
    assert [sorted(a + b) for a, b in zip(*shares)] == [sorted(batch) for batch in whole]
    with pytest.raises(ValueError, match="batch_size: expected a multiple of process_count = 3, got 4"):
        batches(CORPUS, length=4, batch_size=4, process_count=3)


def test_segments_number_the_files_of_a_window():
    window = Windows(CORPUS, 8)[7]
    assert window["tokens"].tolist() == [56, 57, 58, 59, 0, 60, 61, 62, 63]
    assert window["segment_ids"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]


def test_spans_stay_within_files_and_predict_nothing_twice():
    corpus = Corpus.of([(str(n), np.arange(1, n + 1, dtype=np.uint8)) for n in (3, 8, 50)])
    result = spans(corpus, length=8, per_file=3)
    assert np.bincount(result.file).tolist() == [1, 1, 3]
    seen = result.positions[result.valid]
    assert len(seen) == len(set(seen)) == 3 + 8 + 3 * 8 - (8 - 50 % 8) % 8
    for tokens, valid, positions, file in zip(*result):
        inside = (positions > corpus.starts[file]) & (positions < corpus.starts[file + 1])
        assert inside[valid].all()
        assert (tokens[1:][valid] == corpus.tokens[positions[valid]]).all()
        assert tokens[0] == corpus.tokens[positions[0] - 1]
    everything = spans(corpus, length=8, per_file=100)
    assert everything.valid.sum() == 3 + 8 + 50 and len(everything.tokens) == sum(math.ceil(n / 8) for n in (3, 8, 50))
