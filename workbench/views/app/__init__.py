"""The app: a picture and a question, answered by a teacher and its hybrid side by side."""

from workbench.views.app.door import open_app
from workbench.views.app.page import build_app

__all__ = ["build_app", "open_app"]
