"""Run the lessons and store what they may store: `python notebooks/refresh.py [NAME ...]`.

Two kinds of cells keep their output, by their tag: `nbval-check-output` (text that is the same on
every machine; the tests compare it) and `figure` (worth seeing on GitHub). All others are stored
without output, because it holds times, sizes or paths of one machine.
"""

import sys
from pathlib import Path

import nbformat
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent


class ThisPython(KernelSpecManager):
    """Whatever kernels the machine knows, the lessons run in this Python."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(**get_kernel_dict())


def refresh(path: Path) -> None:
    lesson = nbformat.read(path, as_version=4)
    manager = AsyncKernelManager(kernel_spec_manager=ThisPython())
    NotebookClient(
        lesson, km=manager, timeout=300, record_timing=False, resources={"metadata": {"path": HERE}}
    ).execute()
    for cell in (cell for cell in lesson.cells if cell.cell_type == "code"):
        tags = cell.metadata.get("tags", [])
        if "figure" in tags:
            for output in cell.outputs:  # GitHub shows the picture, and its text is the table
                output.data.pop("text/html", None)
        elif "nbval-check-output" not in tags:
            cell.outputs, cell.execution_count = [], None
    lesson.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(lesson, path)


if __name__ == "__main__":
    chosen = [HERE / name for name in sys.argv[1:]] or sorted(HERE.glob("[0-9][0-9]_*.ipynb"))
    for path in chosen:
        print(path.name, flush=True)
        refresh(path)
