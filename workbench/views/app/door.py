"""Serving the page on this machine, and showing it to whoever sits in front of it."""

import os
import sys

import gradio as gr

from workbench.errors import WorkbenchError
from workbench.views.app.theme import STYLE, theme


def open_app(app: gr.Blocks, *, host: str = "127.0.0.1", port: int | None = None) -> None:
    """Serve the page until Ctrl+C, print its address, and open a browser where there is one.

    Args:
        app: What `build_app` returned.
        host: Who may come in: "127.0.0.1" this machine only, "0.0.0.0" the network.
        port: Where; None takes the first free one from 7860 on.

    Raises:
        WorkbenchError: The port is taken, or the host is not this machine.
    """
    try:
        app.launch(
            server_name=host,
            server_port=port,
            inbrowser=_has_window(),
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            theme=theme(),
            css_paths=STYLE,
            footer_links=[],
            run_history=False,
            max_file_size="100mb",
        )
    except OSError as error:
        where = f"port {port}" if port else "any port from 7860 on"
        raise WorkbenchError(
            f"The app cannot listen on {host} at {where}: choose another --port or --host."
        ) from error
    print(f"The workbench is open at {app.local_url} (Ctrl+C ends it)", flush=True)
    app.block_thread()


def _has_window() -> bool:
    """Tell whether a browser has a screen; without one, a text browser would take the terminal."""
    screens = ("DISPLAY", "WAYLAND_DISPLAY")
    return sys.platform != "linux" or any(os.environ.get(name) for name in screens)
