"""Execute quickstart.ipynb and save it with its outputs. Needs the extra `notebook`.

python notebooks/execute.py
"""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parent / "quickstart.ipynb"


def main() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=folder).execute()
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {}  # the times of this run
        if cell.cell_type == "code":  # messages name the machine's devices and files
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):  # beside it stands an address in memory
                    output.data["text/plain"] = "a picture"
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
