"""What all tests share: nothing reaches for the network, and how they are spread over workers."""

import os

import pytest

# Set before anything imports these libraries, which read it once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # app.py says why
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # as many threads as cores, or they wait for a core
    threads = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))

# What takes longest begins first, so that no worker is left with it in the end.
LESSON = "test_lesson_runs_offline_first_open_then_solved"
LONG = (
    f"{LESSON}[0_tour]",
    f"{LESSON}[4_distilling]",
    "test_families.py",
    f"{LESSON}[2_layers]",
    "test_lab.py",
    "test_browser.py",
    "test_ablation.py",
    "test_pocket.py",
    LESSON,
)


def pytest_collection_modifyitems(items):
    def place(item):
        return next((i for i, name in enumerate(LONG) if name in item.nodeid), len(LONG))

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file stays on one worker, where its tests share what is dear; each lesson goes alone."""
    from xdist.scheduler import LoadScopeScheduling

    class FilesAndLessons(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return nodeid if LESSON in nodeid else nodeid.split("::", 1)[0]

    config.option.loadscopereorder = False  # the order above stays
    return FilesAndLessons(config, log)
