"""Widgets for notebooks: one call each, read back as data, and a static picture elsewhere.

They are ipywidgets around drawings in plain HTML and SVG: no script of their own, so JupyterLab,
VS Code and Colab show the same, light or dark. Where no widget can live (nbconvert, GitHub), the
same drawing stands still.
"""

from workbench.views.widgets.answers import answer_viewer
from workbench.views.widgets.dashboard import distill_dashboard
from workbench.views.widgets.inits import init_bench
from workbench.views.widgets.layers import layer_picker
from workbench.views.widgets.profiles import profile_explorer

__all__ = ["answer_viewer", "distill_dashboard", "init_bench", "layer_picker", "profile_explorer"]
