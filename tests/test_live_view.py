"""The live view in a kernel: hours of pictures in one cell leave nothing behind."""

import nbformat
from nbclient import NotebookClient

CODE = """
import gc
from matplotlib.figure import Figure
from difflit.tracking import LiveView, Tracker
tracker = Tracker(None, ["loss", "lr", "grad_norm", "images_per_second"])
tracker.rows = [dict(step=s, loss=1 / s, lr=1e-3, grad_norm=1.0, images_per_second=100.0, memory_gb=1.0) for s in range(1, 20)]
view = LiveView(tracker, steps=20, plot_every_seconds=0)
for step in range(5):
    view._line_at, view._rest = view._line_at - 60, 0
    view.show(step)
gc.collect()
print(sum(isinstance(each, Figure) for each in gc.get_objects()), "figures are left")
"""


def test_pictures_of_a_long_cell_are_not_kept():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CODE)])
    NotebookClient(notebook, timeout=300).execute()
    outputs = notebook.cells[0].outputs
    assert any("image/png" in output.get("data", {}) for output in outputs)  # a live picture there was
    assert "0 figures are left" in "".join(output.get("text", "") for output in outputs)
