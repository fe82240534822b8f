"""The app in a real browser: Debian's Chromium, driven by Playwright."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
from PIL import Image, ImageDraw

HOUSE = Path(__file__).resolve().parents[1]
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
REQUIRED = os.environ.get("WORKBENCH_REQUIRE_BROWSER") == "1"
HOW_TO_GET_IT = "no Chromium here: install it (Debian and Ubuntu: apt install chromium)"
FLAGS = [
    "--no-sandbox",  # the tests may run as root, where the sandbox refuses to start
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
]

pytestmark = pytest.mark.skipif(not CHROMIUM and not REQUIRED, reason=HOW_TO_GET_IT)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """Start the app as a user does, on a free port; end it after the last test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("app") / "log.txt"
    with log.open("w") as out:
        app = subprocess.Popen(
            [sys.executable, "app.py", "--port", str(port)], cwd=HOUSE, stdout=out, stderr=out,
            env={key: value for key, value in os.environ.items() if key != "DISPLAY"},
        )  # fmt: skip
        address = f"http://127.0.0.1:{port}/"
        try:
            wait_for(address, app, log)
            yield address
        finally:
            app.terminate()
            app.wait(timeout=20)


def wait_for(address: str, app: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert app.poll() is None, f"the app ended by itself:\n{log.read_text()}"
        try:
            urlopen(address, timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"the app did not open within a minute:\n{log.read_text()}")


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM, HOW_TO_GET_IT
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, url):
    """Open the app in a page of its own, as often as wanted; note each host that it speaks to."""
    contexts = []

    def open_one(**options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.addresses = []
        page.on("request", lambda request: page.addresses.append(request.url))
        page.goto(url)
        page.wait_for_selector(".card.hybrid")
        page.wait_for_selector("#pictures img")
        return page

    yield open_one
    for context in contexts:
        context.close()


@pytest.fixture
def drawing(tmp_path):
    picture = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(picture).ellipse((60, 60, 190, 190), fill="red")
    picture.save(tmp_path / "drawing.png")
    return tmp_path / "drawing.png"


def upload(page, path):
    page.locator("#pictures input[type=file]").first.set_input_files(path)


def ask(page, question=None):
    if question is not None:
        page.locator("#question textarea").fill(question)
    page.locator("#ask").click()


def answers(page):
    """Wait until both models are done; return two names, two answers, two lists of figures."""
    page.wait_for_selector(".verdict")
    return (
        page.locator(".card h2").all_inner_texts(),
        page.locator(".card .answer").all_inner_texts(),
        page.locator(".card .figures").all_inner_texts(),
    )


def test_a_picture_and_a_question_get_two_answers(open_page, drawing):
    page = open_page()
    assert page.title() == "MaTVLM Workbench"
    upload(page, drawing)
    page.wait_for_function("document.querySelectorAll('#pictures .thumbnail-item').length == 1")
    ask(page, "What colour is the circle?")
    names, texts, figures = answers(page)
    assert len(set(names)) == 2
    assert all(text.strip() for text in texts)
    for shown in figures:
        for unit in ("ms", "KiB", "MiB"):
            assert re.search(rf"\d\s+{unit}\b", shown), f"no figure in {unit}: {shown}"
    page.wait_for_selector("#figure .main-svg")
    foreign = [a for a in page.addresses if not a.startswith((page.url, "data:", "blob:"))]
    assert foreign == [], "the page speaks to its own server and to nobody else"


def test_the_first_screen_answers_at_once_on_enter(open_page):
    page = open_page()
    assert page.locator("#question textarea").input_value()
    page.locator("#question textarea").press("Enter")
    _, texts, figures = answers(page)
    assert all(text.strip() for text in texts)
    assert all(re.search(r"\d\s+tokens/s", shown) for shown in figures)


def test_a_bad_upload_leaves_the_app_alive(open_page, tmp_path):
    page = open_page()
    letter = tmp_path / "letter.png"
    letter.write_text("Dear reader")
    upload(page, letter)
    page.wait_for_selector(".alert")
    assert "'letter.png' is not a picture" in page.locator(".alert").inner_text()
    ask(page, "")
    page.wait_for_function(
        "document.querySelector('.alert')?.innerText.includes('question is empty')"
    )
    ask(page, "How many objects are there?")
    _, texts, _ = answers(page)
    assert all(text.strip() for text in texts)
    assert page.locator(".alert").count() == 0


def test_two_people_at_once_both_get_their_own_answers(open_page):
    first, second = open_page(), open_page()
    examples = first.locator(".chip")
    assert examples.count() >= 5
    second.locator(".chip").nth(1).click()
    question = first.locator("#question textarea").input_value()
    second.wait_for_function(
        "before => document.querySelector('#question textarea').value != before", arg=question
    )
    ask(first)
    ask(second)
    together = answers(first)[1], answers(second)[1]
    ask(second)
    second.wait_for_function("document.querySelectorAll('.verdict').length == 0")
    alone = answers(second)[1]
    assert together[1] == alone
    assert together[0] != together[1]


def test_stop_ends_the_answer_and_the_next_question_works(open_page):
    page = open_page()
    ask(page, "Describe the picture.")  # long enough to be stopped on a busy machine
    page.wait_for_selector(".card.teacher[data-state=reading], .card.teacher[data-state=writing]")
    page.locator("#stop").click()
    page.wait_for_selector(".card.hybrid[data-state=stopped]")
    ask(page)
    assert all(text.strip() for text in answers(page)[1])


def test_another_hybrid_takes_its_place(open_page):
    page = open_page()
    before = page.locator(".card.hybrid h2").inner_text()
    page.locator("#hybrid label", has_text="50%").click()
    page.wait_for_function(
        "before => document.querySelector('.card.hybrid h2').innerText != before", arg=before
    )
    page.wait_for_selector(".card.hybrid[data-state=idle]")  # after its loading
    assert page.locator(".card.hybrid .stack .mamba").count() == 8


@pytest.mark.parametrize("width", [390, 1280, 1920])
def test_nothing_sticks_out_of_the_page(open_page, width):
    page = open_page(viewport={"width": width, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cards = [card.bounding_box() for card in page.locator(".card").all()]
    beside = cards[0]["y"] == cards[1]["y"]
    assert beside == (width > 720)
