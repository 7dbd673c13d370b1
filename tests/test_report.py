"""The HTML report."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from test_run import add_notebook, picture, project  # noqa: F401

from miniature import papers, report, run


def claim(id, verdict, **more):
    return {
        "id": id,
        "claim": f"claim <{id}>",
        "paper_value": "85.4",
        "measured": 0.061234,
        "interval": [0.05, 0.07],
        "unit": "accuracy",
        "verdict": verdict,
        "note": "",
        "parts": [],
    } | more


def executed(slug, *claims, png=None, seconds=9.4, control=False):
    """What a notebook looks like after a run, without running it."""
    record = {"paper": slug, "scale": "mini", "seed": 0, "control": control, "claims": list(claims)}
    outputs = [{"output_type": "display_data", "data": {run.MIME: record}, "metadata": {}}]
    if png:
        alt = {"image/png": {"alt": 'A "figure" & more'}}
        data = {"image/png": png}
        outputs.insert(0, {"output_type": "display_data", "data": data, "metadata": alt})
    cell = {"cell_type": "code", "source": "", "metadata": {}, "outputs": outputs}
    stamp = {"seconds": seconds, "version": "0"}
    return json.dumps({"cells": [cell], "metadata": {"miniature": stamp}, "nbformat": 4})


class Page(HTMLParser):
    """Tags with attributes, checked for closing in order."""

    VOID = ("meta", "input", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def page(project):  # noqa: F811
    path = papers.paper("alpha").notebook
    path.parent.mkdir(parents=True)
    parts = [claim("C2a", "reproduced"), claim("C2b", "not reproduced")]
    path.write_text(
        executed(
            "alpha",
            claim("C1", "reproduced"),
            claim("C2", "not reproduced", measured=None, interval=None, parts=parts, note="Why."),
            png=picture((800, 400)),
        )
    )
    papers.paper("beta").notebook.write_text(executed("beta", claim("C1", "inconclusive")))
    add_notebook("gamma")
    report.write("pages/report.html")
    text = (project / "pages" / "report.html").read_text()
    return text, Page(text)


def test_every_paper_is_there_with_its_state(page):
    rows = [a for a in page[1].all("li") if a["class"] == "paper"]
    assert [r["data-status"] for r in rows] == ["finished", "finished", "unrun", "missing"]
    assert [r["data-verdicts"] for r in rows] == [
        "not-reproduced reproduced",
        "inconclusive",
        "",
        "",
    ]
    assert [r["data-field"] for r in rows] == ["federated", "federated", "theory", "theory"]
    assert "2401.00000" in rows[0]["data-text"] and "the alpha paper" in rows[0]["data-text"]
    assert "2 of 4 papers finished, 3 claims checked" in page[0]
    assert "9.4 s" in page[0]


def test_verdicts_are_told_by_symbol_word_and_color(page):
    for name, text in (
        ("reproduced", "✓ C1 reproduced"),
        ("inconclusive", "~ C1 inconclusive"),
        ("not-reproduced", "✗ C2 not reproduced"),
    ):
        assert f'<span class="chip {name}">{text}</span>' in page[0]


def test_claims_are_shown_with_paper_value_and_interval(page):
    assert page[0].count("<details>") == 2
    assert "0.06123 [0.05, 0.07] accuracy" in page[0]
    assert "claim &lt;C2b&gt;" in page[0] and "<small>Why.</small>" in page[0]


def test_thumbnail_is_small_and_has_its_alt_text(page):
    from PIL import Image

    (image,) = page[1].all("img")
    assert image["alt"] == 'A "figure" & more'
    kind, data = image["src"].split(",")
    assert kind == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (280, 140)


def test_page_needs_no_network_and_every_control_has_a_label(page):
    text, tags = page
    assert not tags.all("link") and not re.search(r"@import|url\(", text)
    assert all("src" not in a for a in tags.all("script"))
    links = [a["href"] for a in tags.all("a")]
    assert links[0] == "../notebooks/federated/alpha.ipynb"
    controls = len(tags.all("input")) + len(tags.all("select"))
    assert controls == 4 == len(re.findall(r"<label[^>]*>[^<]+<(?:input|select)", text))
    assert "prefers-color-scheme: dark" in text


def test_results_of_a_run(project):  # noqa: F811
    (project / "runs").mkdir()
    (project / "runs" / "alpha.ipynb").write_text(
        executed("alpha", claim("C1", "not reproduced"), control=True)
    )
    (project / "runs" / "beta.ipynb").write_text(executed("beta", claim("C1", "reproduced")))
    (project / "runs" / "beta.failed.ipynb").write_text(executed("beta"))
    entries = report.write("report.html", "runs")
    assert [e["status"] for e in entries] == ["finished", "failed", "missing", "missing"]
    assert entries[1]["verdicts"] == {}  # of an earlier run
    text = (project / "report.html").read_text()
    assert 'href="runs/alpha.ipynb"' in text and "negative control" in text


def test_recorded_full_scale_results_stand_beside(project):  # noqa: F811
    papers.paper("alpha").notebook.parent.mkdir(parents=True)
    papers.paper("alpha").notebook.write_text(executed("alpha", claim("C1", "inconclusive")))
    full = {"date": "2025-01-02", "hardware": "NVIDIA H200", "claims": [claim("C1", "reproduced")]}
    (project / "data" / "results").mkdir()
    (project / "data" / "results" / "alpha.json").write_text(json.dumps(full))
    report.write("report.html")
    text = (project / "report.html").read_text()
    assert "Recorded at full scale, 2025-01-02, NVIDIA H200" in text


def test_two_versions_of_a_paper_share_a_row(project):  # noqa: F811
    bib = project / "data" / "papers.bib"
    bib.write_text(
        bib.read_text() + "@misc{alpha_two,\n title = {{Alpha again}},\n author = {Doe},\n"
        " year = {2025},\n keywords = {federated},\n notebook = {alpha},\n}\n"
    )
    papers._read.cache_clear()
    assert len(report.write("report.html")) == 4
    text = (project / "report.html").read_text()
    assert "Also covers: Alpha again (alpha_two)." in text


@pytest.mark.browser
def test_filters(page, project):  # noqa: F811
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as p:
        try:
            browser = p.chromium.launch(executable_path=shutil.which("chromium"))
        except sync_api.Error as e:
            pytest.skip(f"Chromium does not start: {e.message.splitlines()[0]}")
        view, problems = browser.new_page(), []
        view.on("pageerror", lambda error: problems.append(str(error)))
        view.on("request", lambda r: r.url.startswith("http") and problems.append(r.url))
        view.goto((project / "pages" / "report.html").as_uri())

        def shown():
            return [row.inner_text() for row in view.locator(".paper h2:visible").all()]

        every = ["The alpha paper", "The beta paper", "The gamma paper", "The delta paper"]
        assert shown() == every and view.inner_text("#shown") == "4 of 4 papers"
        view.get_by_label("Search").fill("doe BETA")
        assert shown() == every[1:2] and view.inner_text("#shown") == "1 of 4 papers"
        view.get_by_label("Search").fill("")
        view.get_by_label("Field").select_option("theory")
        assert shown() == every[2:]
        view.get_by_label("Notebook").select_option("missing")
        assert shown() == every[3:]
        view.get_by_label("Notebook").select_option("")
        view.get_by_label("Field").select_option("")
        view.get_by_label("Verdict").select_option("not-reproduced")
        assert shown() == every[:1]
        view.get_by_label("Verdict").select_option("reproduced")
        assert shown() == []  # no paper has every claim reproduced
        view.get_by_label("Verdict").select_option("")
        assert not view.get_by_text("Why.").is_visible()
        view.locator("summary").first.click()
        assert view.get_by_text("Why.").is_visible()
        assert problems == []
        browser.close()
