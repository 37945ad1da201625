"""Event files for TensorBoard say what the records say, also after a restart."""

import struct

import pytest

from attnx.training import Metrics

event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")


def events(folder):
    """{step: value} as TensorBoard shows it: a restart at step n makes it forget steps from n on."""
    shown = {}
    for file in sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (size,) = struct.unpack_from("<Q", content, at)
            event = event_pb2.Event.FromString(content[at + 12: at + 12 + size])
            at += 16 + size
            if event.HasField("session_log"):
                shown = {step: value for step, value in shown.items() if step < event.step}
            shown |= dict((event.step, value.simple_value) for value in event.summary.value if value.tag == "loss")
    return shown


def test_tensorboard_files_follow_the_records(tmp_path):
    first = Metrics(tmp_path / "metrics.jsonl", tensorboard=True)
    for step in range(1, 6):
        first.write(step, {"loss": 1 / step, "grad_norm": 1.0})
    first.close()
    second = Metrics(tmp_path / "metrics.jsonl", tensorboard=True)
    second.truncate(3)
    for step in (4, 5, 6):
        second.write(step, {"loss": 2.0})
    second.close()
    records = {record["step"]: record["loss"] for record in second.read()}
    assert records == pytest.approx({1: 1, 2: 1 / 2, 3: 1 / 3, 4: 2, 5: 2, 6: 2})
    assert events(tmp_path / "tensorboard") == pytest.approx(records)
