"""The site in a browser: links, search, filters, a phone, the dark, accessibility, no other host."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[1]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NEEDED = ("playwright", "axe_playwright_python", "sphinx", "myst_nb", "furo")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium"),
    pytest.mark.skipif(not all(map(find_spec, NEEDED)), reason="needs pip install 'i2f[docs]'"),
]
LOOKED_AT = (
    "docs/index",
    "docs/ledger",
    "docs/mathematics",
    "docs/api",
    "docs/play",
    "notebooks/03_influence_vs_attack",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", "docs", ".", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def address(site):
    """Where the site is served, as a web server would."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@contextmanager
def watched(browser, address):
    """A page that notes every request to another host, and every error of a script."""
    found, foreign, errors = browser.new_page(), [], []
    found.on("request", lambda r: r.url.startswith((address, "data:", "blob:")) or foreign.append(r.url))
    found.on("pageerror", lambda error: errors.append(str(error)))
    yield found
    assert foreign == []
    assert errors == []
    found.close()


@pytest.fixture
def page(browser, address):
    with watched(browser, address) as found:
        yield found


@pytest.fixture(scope="module", params=LOOKED_AT)
def shown(request, browser, address):
    """One of the pages, loaded once for all that is looked at."""
    with watched(browser, address) as found:
        found.goto(f"{address}/{request.param}.html")
        yield found


def test_every_link_within_the_site_leads_somewhere(site):
    broken = []
    for path in site.rglob("*.html"):
        for target in re.findall(r'(?:href|src)="([^"]+)"', path.read_text(encoding="utf-8")):
            address, anchor = urldefrag(target)
            if re.match(r"[a-z]+:", address) or not (address or anchor):
                continue
            there = path.parent / unquote(urlsplit(address).path) if address else path
            if not there.exists() or (
                anchor and there.suffix == ".html" and f'id="{anchor}"' not in there.read_text(encoding="utf-8")
            ):
                broken.append(f"{path.relative_to(site)}: {target}")
    assert broken == []


def violations(page, context=None, **options):
    """The serious ones."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, context, {"resultTypes": ["violations"], **options}).response["violations"]
    serious = [v for v in found if v["impact"] in ("serious", "critical")]
    return [f"{v['id']}: {v['nodes'][0]['html'][:120]}" for v in serious]


def test_a_page_is_drawn_and_accessible(shown):
    shown.emulate_media(color_scheme="light")
    assert shown.locator("h1").count() == 1
    assert shown.locator("article").inner_text().count("\\(") == 0  # every equation was drawn
    assert violations(shown) == []


def test_a_page_has_contrast_in_the_dark(shown):
    """All that depends on the scheme; of what repeats its markup, signatures and rows of a table, the first ones."""
    shown.emulate_media(color_scheme="dark")
    shown.evaluate("Promise.all(document.getAnimations().map(animation => animation.finished))")
    few = {"exclude": [["dl.py ~ dl.py"], ["tr:nth-child(n + 20)"]]}
    assert violations(shown, few, runOnly={"type": "rule", "values": ["color-contrast"]}) == []


def test_the_dark_is_dark(address, page):
    page.emulate_media(color_scheme="dark")
    page.goto(f"{address}/index.html")
    page.wait_for_url("**/docs/index.html")
    red, *_ = map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor")))
    assert red < 60


def test_a_phone_never_scrolls_sideways(shown):
    shown.set_viewport_size({"width": 390, "height": 800})
    assert shown.evaluate("document.documentElement.scrollWidth") <= 390


def test_search_finds_a_function(address, page):
    page.goto(f"{address}/search.html?q=lower_bound")
    page.wait_for_selector("#search-results li")
    assert "lower_bound" in page.locator("#search-results").inner_text()


def test_the_ledger_is_searched_and_filtered(address, page):
    page.goto(f"{address}/docs/ledger.html")
    rows = page.locator(".ledger tbody tr:visible")
    every = rows.count()
    page.select_option("select[name=verdict]", "fails")
    failing = rows.count()
    assert 0 < failing < every
    page.fill(".ledger input", "nothing has this word")
    assert rows.count() == 0
    page.select_option("select[name=verdict]", "")
    page.fill(".ledger input", "leakage-mnist")
    assert rows.count() == 1
    assert page.locator(".ledger output").inner_text() == f"1 of {every}"


def test_the_page_to_play_with_shows_the_row_that_is_chosen(site, browser):
    """From a file, as somebody who was sent it would."""
    with watched(browser, "file:") as page:
        choose_every_row(page, site)


def choose_every_row(page, site):
    page.goto(f"file://{site}/docs/play.html")
    networks = json.loads(page.locator("#play-rows").inner_text())
    for network, about in networks.items():
        page.select_option(".play select", network)
        numbers = list(about["images"])
        assert page.locator(".play-images input").count() == len(numbers)
        page.locator(f".play-images label:has(input[value='{numbers[-1]}'])").click()
        image = about["images"][numbers[-1]]
        for level, row in enumerate(image["levels"]):
            page.locator(".play input[type=range]").fill(str(level))
            assert page.locator("#play-variance").inner_text() == f"variance {row['variance']}"
            assert page.locator("#play-private").get_attribute("src") == image["private"]
            for name in ("predicted", "recovered"):
                shown = page.locator(f"#play-{name}")
                assert shown.get_attribute("src") == row[name]
                assert shown.evaluate("image => image.naturalWidth") >= 28
            assert page.locator("#play-predicted-error").inner_text() == f"RMSE {row['expected']}"
            assert bool(page.locator("#play-note").inner_text()) != row["converged"]
