"""A browser for the built site, and a server of its files."""

import contextlib
import functools
import http.server
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
SITE = DOCS / "_build" / "html"
sys.path[:0] = [str(DOCS), str(DOCS / "_ext")]  # the site's own modules
built = [
    pytest.mark.site,
    pytest.mark.skipif(not (SITE / "index.html").is_file(), reason="the site is not built: python docs/build.py"),
]
"""The marks of a test that reads the built site."""
narrow = pytest.mark.parametrize("width", [pytest.param(390, marks=built)])
widths = pytest.mark.parametrize("width", [pytest.param(390, marks=built), pytest.param(1280, marks=built)])
"""A phone's, and a phone's and a desk's."""
TOOLS = ("docs", "equations", "pages", "pictures", "questions")


def pytest_itemcollected(item):
    """Leave what is about the site's own tools out of the default run, for it is not about the package."""
    if item.path.stem.removeprefix("test_") in TOOLS and not item.get_closest_marker("site"):
        item.add_marker(pytest.mark.long)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@contextlib.contextmanager
def served(folder):
    """Serve the files of a folder, and give the address."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="session")
def address():
    with served(SITE) as address:
        yield address


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no Chromium here: apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"):
        options.add_argument(f"--{flag}")
    options.add_argument("--disable-background-networking")
    options.add_argument("--disable-component-update")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def resize(browser, width):
    """Make the window as wide as that, of a phone or of a desk."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def wait(true, seconds=30):
    """Wait until a function returns something true."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture
def visit(browser, address):
    """Return a function that opens a page at a width and waits for its scripts, or with scripts switched off."""

    def go(page, width, script=True):
        resize(browser, width)
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not script})
        browser.get(address + page)
        return browser

    yield go
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
