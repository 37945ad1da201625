"""The notebooks run from top to bottom."""

import os
import pathlib
import re

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
ROOT = pathlib.Path(__file__).parent.parent
NEEDS = {"03_look_inside_a_real_model": ("smollm2-135m", "minilm-l6")}


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "colab").glob("*.ipynb"))])
def test_notebook(name, tmp_path, monkeypatch):
    """All cells but the one that installs, trainings cut short."""
    if name in NEEDS:
        from attnx import pretrained
        for model in NEEDS[name]:
            try:
                pretrained.find(model)
            except pretrained.PretrainedError as error:
                pytest.skip(str(error))
    notebook = nbformat.read(ROOT / "colab" / f"{name}.ipynb", as_version=4)
    installs = [cell for cell in notebook.cells if "install" in cell.metadata.get("tags", ())]
    assert len(installs) == 1
    notebook.cells = [cell for cell in notebook.cells if cell not in installs]
    for cell in notebook.cells:
        cell.source = re.sub(r"\bsteps=\d+00\b", "steps=20", cell.source)  # that they learn something is for the reader to see
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    monkeypatch.setenv("XLA_FLAGS", "")  # those of the tests compile fast and run slowly
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
