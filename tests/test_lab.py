"""The lessons in a real JupyterLab: Debian's Chromium, driven by Playwright."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from urllib.request import urlopen

import nbformat
import pytest
from test_browser import CHROMIUM, FLAGS, HOUSE, HOW_TO_GET_IT, REQUIRED

from notebooks import build

pytestmark = [
    pytest.mark.skipif(not CHROMIUM and not REQUIRED, reason=HOW_TO_GET_IT),
    pytest.mark.slow,
]

PATIENCE_MS = 240_000  # two cores, shared
OUTPUT = ".jp-OutputArea-output"


def until(upto):
    """A lesson to the first cell whose source ends so, as its reader gets it."""
    lesson = next(path for path in build.sources() if upto[0] in path.stem)
    notebook = build.write(lesson)
    last = next(i for i, c in enumerate(notebook.cells) if c.source.rstrip().endswith(upto[1]))
    notebook.cells = notebook.cells[: last + 1]
    return notebook


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Start JupyterLab on copies of two lessons, with settings of its own."""
    home = tmp_path_factory.mktemp("lab")
    (home / "work").mkdir()
    nbformat.write(until(("layers", "\npicker")), home / "work" / "layers.ipynb")
    nbformat.write(until(("distilling", "\ndashboard")), home / "work" / "distilling.ipynb")
    for extension, name, settings in (
        ("apputils", "notification", {"fetchNews": "false", "checkForUpdates": False}),
        ("notebook", "tracker", {"windowingMode": "none"}),  # cells out of sight are there, too
    ):
        folder = home / "config/lab/user-settings/@jupyterlab" / f"{extension}-extension"
        folder.mkdir(parents=True)
        (folder / f"{name}.jupyterlab-settings").write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = filter(None, [str(HOUSE), os.environ.get("PYTHONPATH")])
    settings = {
        "HOME": str(home),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "config" / "lab" / "user-settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
    }
    log = home / "log.txt"
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}",
             "--IdentityProvider.token=", "--ServerApp.port_retries=0", "--ip=127.0.0.1"],
            cwd=home / "work", stdout=out, stderr=out, env=os.environ | settings,
        )  # fmt: skip
        address = f"http://127.0.0.1:{port}"
        try:
            end = time.monotonic() + 120
            while True:
                assert server.poll() is None, f"JupyterLab ended by itself:\n{log.read_text()}"
                try:
                    urlopen(f"{address}/api", timeout=2).close()
                    break
                except OSError:
                    assert time.monotonic() < end, log.read_text()
                    time.sleep(0.3)
            yield address
        finally:
            server.terminate()
            server.wait(timeout=30)


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM, HOW_TO_GET_IT
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def run_all(lab, browser):
    """Open a notebook and run all its cells; give the page."""
    contexts = []

    def open_one(name, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 1000}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.goto(f"{lab}/lab/tree/{name}.ipynb?reset")
        page.wait_for_selector(".jp-Notebook .jp-Cell")
        wait_for_kernel(lab, name)
        page.locator(".lm-MenuBar-item", has_text=re.compile("^Run$")).click()
        page.locator(".lm-Menu-item", has_text=re.compile("^Run All Cells$")).first.click()
        return page

    yield open_one
    for context in contexts:
        context.close()


def wait_for_kernel(lab, name):
    """Wait until the notebook's kernel is up: JupyterLab calls one idle that is not there yet."""
    end = time.monotonic() + PATIENCE_MS / 1000
    while time.monotonic() < end:
        sessions = json.load(urlopen(f"{lab}/api/sessions", timeout=30))
        mine = [s["kernel"] for s in sessions if s["path"] == f"{name}.ipynb"]
        if mine and mine[0]["execution_state"] == "idle" and mine[0]["connections"]:
            return
        time.sleep(0.3)
    raise AssertionError("the kernel did not start")


def drawn(page):
    return page.locator(".widget-html svg").first.get_attribute("aria-label")


def test_dragging_the_ratio_changes_the_figures(run_all):
    page = run_all("layers")
    handle = page.locator(".widget-slider .noUi-handle").first
    handle.wait_for()
    handle.scroll_into_view_if_needed()
    assert "Mamba-2: 0, 4, 8, 12" in drawn(page)
    pressed = page.locator(".widget-toggle-button.mod-active")
    assert pressed.count() == 4
    before = page.locator(".widget-html table").first.inner_text()
    box = handle.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 120, box["y"] + box["height"] / 2, steps=8)
    page.mouse.up()
    toggles = "document.querySelectorAll('.widget-toggle-button.mod-active').length"
    page.wait_for_function(f"{toggles} > 4")
    page.wait_for_function(
        "before => document.querySelector('.widget-html table').innerText != before", arg=before
    )
    # The kernel follows the mouse one step after the other: both agree once it has caught up.
    page.wait_for_function(
        f"[...document.querySelectorAll('.widget-html')].at(-1).innerText.includes({toggles}"
        " + ' of 16 layers')"
    )

    handle.press("Home")  # the keyboard does as well as the mouse
    page.wait_for_function(f"{toggles} == 0")
    page.locator(".widget-toggle-button").nth(3).press("Space")
    page.wait_for_function(f"{toggles} == 1")
    page.wait_for_function(
        "document.querySelector('.widget-html svg').ariaLabel.endsWith('Mamba-2: 3')"
    )


def test_the_dashboard_draws_while_it_trains_and_stops(run_all):
    page = run_all("distilling")
    start, pause, stop = (
        page.locator(".widget-button", has_text=name) for name in ("Start", "Pause", "Stop")
    )
    start.wait_for()
    start.click()
    circles = "document.querySelectorAll('.widget-html svg circle').length"
    page.wait_for_function(f"{circles} >= 1")
    page.wait_for_function(f"{circles} >= 2")
    pause.click()
    page.wait_for_function("document.body.innerText.includes('Paused.')")
    page.locator(".widget-button", has_text="Go on").click()
    stop.click()
    page.wait_for_function("document.body.innerText.includes('stopped before step')")
    assert not page.locator(OUTPUT, has_text="Traceback").count()
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
