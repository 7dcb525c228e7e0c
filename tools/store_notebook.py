"""Run a tutorial whose outputs are stored, and write them.

    python tools/store_notebook.py docs/tutorials/linearize_dinov2.md

The site runs the other tutorials when it is built. This one needs weights (DINOV2_WEIGHTS), so its outputs lie in the
repository, in a notebook beside the text. Edit the text, then run this.
"""

import sys
import tempfile
from pathlib import Path

import nbformat
from myst_nb.core.read import read_myst_markdown_notebook
from nbclient import NotebookClient

# Of the kernel and the run, which would be another one each time.
_CELL_METADATA = ("tags",)


def store(text: Path, timeout_s: int = 1800) -> Path:
    """Run the cells of a text notebook in an empty folder and write the notebook with its outputs.

    Args:
        text: MyST text notebook.
        timeout_s: Longest time of a cell in seconds.

    Returns:
        Path of the notebook.
    """
    notebook = read_myst_markdown_notebook(text.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=timeout_s, resources={"metadata": {"path": folder}})
        client.execute()
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {key: cell.metadata[key] for key in _CELL_METADATA if key in cell.metadata}
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    path = text.with_suffix(".ipynb")
    nbformat.write(notebook, path)
    return path


if __name__ == "__main__":
    print(store(Path(sys.argv[1]).resolve()))
