"""A person's way through: JupyterLab in a browser, a slider, and the report page."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from miniature import papers

playwright = pytest.importorskip("playwright.sync_api")

ROOT = papers.root()
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on loopback over a copy of the notebooks (the browser saves what it runs)."""
    folder = tmp_path_factory.mktemp("lab")
    for source in (ROOT / "notebooks").rglob("*.ipynb"):
        nb = json.loads(source.read_text(encoding="utf-8"))
        nb["metadata"].pop("widgets", None)
        for cell in nb["cells"]:  # without outputs: what the page shows has been run in it
            if cell["cell_type"] == "code":
                cell |= {"outputs": [], "execution_count": None}
        copy = folder / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(json.dumps(nb))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    config = folder / "config"
    options = [f"--port={port}", "--ip=127.0.0.1", "--no-browser", "--allow-root"]
    options += ["--IdentityProvider.token=", "--ServerApp.password=", "--port-retries=0"]
    options.append("--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate")
    tracker = config / "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    tracker.parent.mkdir(parents=True)
    tracker.write_text('{"windowingMode": "none"}')  # cells out of sight stay in the page
    env = os.environ | {
        "JUPYTER_CONFIG_DIR": str(config),
        "JUPYTERLAB_SETTINGS_DIR": str(config / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(config / "workspaces"),
        "MINIATURE_ROOT": str(ROOT),
    }
    log = open(folder / "lab.log", "w")
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *options],
        cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{url}/api/status", timeout=2).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "lab.log").read_text()
                time.sleep(0.25)
        else:
            pytest.fail("JupyterLab did not start: " + (folder / "lab.log").read_text())
        yield url
    finally:
        server.terminate()
        server.wait(20)
        log.close()


def shortest():
    """The finished paper that runs fastest."""
    from miniature import run

    finished = [run.entry(p) for p in papers.all() if p.notebook.exists()]
    return min(finished, key=lambda e: e["seconds"] or 1e9)


def open_and_run(page, url, path):
    """Open a notebook, run all its cells, and wait for the last one."""
    page.goto(f"{url}/lab/tree/{path}?reset", timeout=90_000)
    page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=90_000)
    for _ in range(240):
        with urllib.request.urlopen(f"{url}/api/sessions", timeout=5) as reply:
            sessions = json.load(reply)
        states = [s["kernel"] for s in sessions if s["path"] == path]
        if any(k["execution_state"] == "idle" and k["connections"] for k in states):
            break
        page.wait_for_timeout(250)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function(
        """() => {
            const code = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')];
            return code.length && code.every(e => /\\[\\d+\\]/.test(e.innerText));
        }""",
        timeout=180_000,
    )


def test_a_paper_runs_in_jupyterlab_and_its_slider_redraws(browser, lab):
    paper = shortest()
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    open_and_run(page, lab, f"notebooks/{paper['field']}/{paper['slug']}.ipynb")
    knob = page.get_by_role("heading", name="Turn the knob").first
    knob.scroll_into_view_if_needed(timeout=60_000)
    slider = page.locator(".widget-slider [role=slider], .noUi-handle").first
    slider.wait_for(timeout=60_000)
    slider.scroll_into_view_if_needed()
    picture = page.locator(".widget-output img, .jupyter-widgets-output-area img").first
    picture.wait_for(timeout=60_000)
    before = picture.get_attribute("src")
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        """before => { const i = document.querySelector(
             '.widget-output img, .jupyter-widgets-output-area img');
             return i && i.src && i.src !== before; }""",
        arg=before,
        timeout=30_000,
    )
    page.close()


def test_the_index_finds_a_paper(browser, lab):
    paper = shortest()
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    open_and_run(page, lab, "notebooks/index.ipynb")
    box = page.get_by_placeholder("title, author, venue, year")
    box.scroll_into_view_if_needed(timeout=60_000)
    box.fill(paper["title"][:25])
    box.press("Enter")
    rows = page.locator(".jupyter-widgets tbody tr, .widget-output tbody tr")
    page.wait_for_function(
        """() => document.querySelectorAll('.jupyter-widgets tbody tr').length in {1: 0, 2: 0}""",
        timeout=30_000,
    )
    rows.get_by_role("link", name=paper["title"]).first.click()
    page.locator(".jp-mod-current", has_text=f"{paper['slug']}.ipynb"[:15]).first.wait_for(
        timeout=60_000
    )
    page.close()


def test_the_report_is_searched(browser, tmp_path):
    paper = shortest()
    path = tmp_path / "report.html"
    subprocess.run([sys.executable, "-m", "miniature", "report", "--out", str(path)], check=True)
    page = browser.new_page()
    requests = []
    page.on("request", lambda r: requests.append(r.url))
    page.goto(path.as_uri())
    row = page.locator(".paper h2", has_text=paper["title"]).first
    assert row.is_visible()
    page.get_by_role("searchbox").fill("no paper has such a title")
    assert not row.is_visible()
    page.get_by_role("searchbox").fill(paper["title"][:25])
    assert row.is_visible()
    assert all(u.startswith(("file:", "data:")) for u in requests), "the report uses the network"
    page.close()
