"""Run the notebooks in full and keep their outputs, without what differs every time.

`python tools/execute_notebooks.py notebooks/quickstart.ipynb ...`
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def main() -> None:
    """Execute the notebooks that the command names, in place."""
    for path in map(Path, sys.argv[1:]):
        notebook = nbformat.read(path, as_version=4)
        resources = {"metadata": {"path": str(path.parent)}}
        NotebookClient(notebook, timeout=600, resources=resources).execute()
        nbformat.write(strip(notebook), path)


def strip(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Drop times, the kernel's version and what was written to standard error."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            for output in cell.outputs:
                if "metadata" in output:
                    output.metadata = {}
    return notebook


if __name__ == "__main__":
    main()
