"""How long a reader of the app waits, in a real browser: from opening the page, from each click.

    make app                                                  (in another terminal)
    python -m benchmarks.speed.page [--url http://127.0.0.1:7860/] [--answers 7] [--shot APP.png]

Asks the example that stands there already (with the pocket models a description, 66 tokens by each)
as soon as the page can be clicked, then again and again. An answer is there when the sentence that
compares both is. Needs Chromium and the package's extra `dev`.
"""

import argparse
import shutil
import statistics
import time

from playwright.sync_api import Page, sync_playwright

VERDICT = ".verdict"  # the app draws it when both models have answered
PAUSE = 1.5  # seconds in which what an answer leaves to do comes to an end
VIEW = {"width": 1280, "height": 900}


def seconds_to_verdict(page: Page) -> float:
    """Click on Ask, and wait for the sentence about both answers that belongs to this click."""
    began = time.perf_counter()
    page.click("#ask")
    page.wait_for_selector(VERDICT, state="detached")
    page.wait_for_selector(VERDICT)
    return time.perf_counter() - began


def waits(url: str, n_answers: int, shot: str | None) -> tuple[float, list[float]]:
    """Seconds to the first answers since the page was asked for, and of each later click."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("There is no Chromium here (Debian and Ubuntu: apt install chromium).")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=VIEW)
        began = time.perf_counter()
        page.goto(url)
        page.click("#ask")
        page.wait_for_selector(VERDICT)
        first, later = time.perf_counter() - began, []
        for _ in range(n_answers):
            time.sleep(PAUSE)
            later.append(seconds_to_verdict(page))
        if shot:
            page.screenshot(path=shot)
        browser.close()
    return first, later


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:7860/")
    parser.add_argument("--answers", type=int, default=7, help="after the first")
    parser.add_argument("--shot", help="PNG of the page after the last answer")
    args = parser.parse_args()
    first, later = waits(args.url, args.answers, args.shot)
    print(f"first answers {first:.1f} s after the page was asked for; later ones "
          f"{', '.join(f'{seconds:.2f}' for seconds in later)} s after the click, "
          f"median {statistics.median(later):.2f} s")  # fmt: skip


if __name__ == "__main__":
    main()
