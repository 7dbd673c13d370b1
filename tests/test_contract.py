"""Every notebook keeps the contract that makes 286 of them read alike and run headlessly."""

import ast
import base64
import importlib
import json
import re
from pathlib import Path

import pytest

from miniature import papers, show
from miniature.claims import MIME, VERDICTS

ROOT = papers.root()
CARDS = ROOT.parent / "shared" / "papers"
NOTEBOOKS = sorted(p for p in (ROOT / "notebooks").glob("*/*.ipynb") if p.stem != "index")
SECTIONS = [
    "The problem",
    "The idea",
    "Experiment",
    "Turn the knob",
    "Against the paper",
    "What the miniature cannot show",
    "Exercises",
]
PARAMETERS = 'scale = "mini"\nseed = 0\ndevice = "auto"\ncontrol = False'
ESTIMATES = ("compare", "slope", "order")  # kinds of check that come with an interval
ABSOLUTE = re.compile(r"(?<![\w.:/])(/home/|/Users/|/root/|/tmp/|/work/|/var/|[A-Z]:\\\\?Users)")


class Notebook:
    """A committed notebook, read once."""

    def __init__(self, path):
        self.path, self.slug, self.field = path, path.stem, path.parent.name
        self.json = json.loads(path.read_text(encoding="utf-8"))
        self.cells = [
            c | {"source": "".join(c["source"]), "tags": c["metadata"].get("tags", [])}
            for c in self.json["cells"]
        ]
        self.code = [c for c in self.cells if c["cell_type"] == "code"]

    def section(self, title):
        """Return the cells between a heading and the next one of its level."""
        at = [i for i, c in enumerate(self.cells) if _heading(c) == title]
        assert len(at) == 1, f"section {title!r} stands {len(at)} times"
        rest = self.cells[at[0] + 1 :]
        ends = [i for i, c in enumerate(rest) if _heading(c)]
        return [self.cells[at[0]], *rest[: ends[0] if ends else len(rest)]]

    def images(self, cells=None):
        return [
            (out["data"]["image/png"], out.get("metadata", {}))
            for c in (self.cells if cells is None else cells)
            for out in c.get("outputs", [])
            if "image/png" in out.get("data", {})
        ]

    def records(self):
        found = [
            out["data"][MIME]
            for c in self.code
            for out in c["outputs"]
            if MIME in out.get("data", {})
        ]
        return [json.loads(r) if isinstance(r, str) else r for r in found]


def _heading(cell):
    first = cell["source"].lstrip().split("\n")[0]
    markdown = cell["cell_type"] == "markdown"
    return first[3:].strip() if markdown and first.startswith("## ") else None


def _with_parts(claims):
    for claim in claims:
        yield claim
        yield from _with_parts(claim["parts"])


@pytest.fixture(params=NOTEBOOKS, ids=lambda p: p.stem, scope="module")
def notebook(request):
    return Notebook(request.param)


def test_it_is_in_the_bibliography_and_has_a_method_file_and_tests(notebook):
    paper = papers.paper(notebook.slug)
    assert paper.field == notebook.field
    assert (ROOT / "lib/miniature" / notebook.field / f"{notebook.slug}.py").is_file()
    assert (ROOT / "tests" / notebook.field / f"test_{notebook.slug}.py").is_file()


def test_header(notebook):
    first, second = notebook.cells[:2]
    assert first["cell_type"] == "markdown" and first["source"].startswith("# ")
    assert f'paper("{notebook.slug}")' in second["source"]
    assert any("text/markdown" in out.get("data", {}) for out in second["outputs"])
    summary = notebook.cells[2]
    assert summary["cell_type"] == "markdown"
    assert re.search(r"\bs(econds)?\b.*\b(core|CPU)\b", summary["source"]), "no run time stated"


def test_parameters(notebook):
    tagged = [c for c in notebook.code if "parameters" in c["tags"]]
    assert [re.sub(r"\s*#.*", "", c["source"]).strip() for c in tagged] == [PARAMETERS]


def test_sections_stand_in_order(notebook):
    headings = [_heading(c) for c in notebook.cells if _heading(c)]
    assert [h for h in headings if h in SECTIONS] == SECTIONS


def test_the_problem_has_a_picture(notebook):
    assert notebook.images(notebook.section("The problem"))


def test_the_idea_shows_equations_and_the_librarys_own_lines(notebook):
    cells = notebook.section("The idea")
    assert any("$" in c["source"] for c in cells if c["cell_type"] == "markdown")
    assert any("show.source(" in c["source"] for c in cells)
    assert any("```python" in json.dumps(c.get("outputs", [])) for c in cells)


def test_the_lines_shown_are_those_that_run(notebook, monkeypatch):
    """Stored outputs of `show.source` go stale when the library is edited: refresh the notebook."""
    now = []
    monkeypatch.setattr("IPython.display.display", lambda shown: now.append(shown.data))
    for c in notebook.code:
        if "show.source(" not in c["source"]:
            continue
        texts = ["".join(out.get("data", {}).get("text/markdown", "")) for out in c["outputs"]]
        stored = [text for text in texts if "```python" in text]
        calls = [
            node
            for node in ast.walk(ast.parse(c["source"]))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "show.source"
        ]
        assert len(calls) == len(stored), f"miniature refresh {notebook.slug}"
        for call, text in zip(sorted(calls, key=lambda node: node.lineno), stored):
            path, _, name = text.split("\n")[0].replace("`", "").partition(", ")
            shown = importlib.import_module(path.removesuffix(".py").replace("/", "."))
            for part in filter(None, name.split(".")):
                shown = getattr(shown, part)
            patterns = [ast.literal_eval(arg) for arg in call.args[1:]]
            show.source(
                shown, *patterns, **{k.arg: ast.literal_eval(k.value) for k in call.keywords}
            )
            assert text == now[-1], f"{path}, {name} has changed: miniature refresh {notebook.slug}"


def test_the_experiment_has_figures(notebook):
    assert notebook.images(notebook.section("Experiment"))


def test_figures_are_small_and_have_alt_texts(notebook):
    for data, metadata in notebook.images():
        assert len(base64.b64decode(data)) < 60_000
        assert metadata.get("image/png", {}).get("alt", "").strip(), "use show.figure(fig, alt=...)"


def test_a_knob_can_be_turned(notebook):
    cells = notebook.section("Turn the knob")
    assert any("show.interact(" in c["source"] or "widgets." in c["source"] for c in cells)
    view = "application/vnd.jupyter.widget-view+json"
    assert any(view in out.get("data", {}) for c in cells for out in c.get("outputs", []))


def test_it_runs_clean_in_order_and_in_time(notebook):
    assert [c["execution_count"] for c in notebook.code] == list(range(1, len(notebook.code) + 1))
    kinds = {out["output_type"] for c in notebook.code for out in c["outputs"]}
    assert "error" not in kinds
    # Of one core; on a busy machine the wall clock says something about its other work.
    assert 0 < notebook.json["metadata"]["miniature"]["cpu_seconds"] < 15


def test_no_absolute_path_and_no_runner_metadata(notebook):
    text = json.dumps([[c["source"], c.get("outputs")] for c in notebook.cells])
    text = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not ABSOLUTE.search(text), ABSOLUTE.search(text)
    assert "papermill" not in notebook.json["metadata"]
    assert not any("papermill" in c["metadata"] for c in notebook.cells)


def test_the_verdict_table(notebook):
    (record,) = notebook.records()
    head = (record["paper"], record["scale"], record["seed"], record["control"])
    assert head == (notebook.slug, "mini", 0, False)
    for claim in _with_parts(record["claims"]):
        assert claim["claim"].strip() and claim["verdict"] in VERDICTS
        if claim["kind"] in ESTIMATES and claim["measured"] is not None:
            lo, hi = claim["interval"]
            assert lo <= claim["measured"] <= hi
    for claim in record["claims"]:
        assert claim["paper_value"].strip(), f"{claim['id']}: no value of the paper"
        if claim["verdict"] != "reproduced":
            notes = [c["note"] for c in _with_parts([claim])]
            assert any(notes), f"{claim['id']} is {claim['verdict']}: .note() the cause"
    assert any(c["control"] for c in record["claims"]), "no claim that control=True must break"


def test_every_claim_of_the_card_is_there(notebook):
    card = CARDS / notebook.field / f"{notebook.slug}.md"
    if not card.exists():
        pytest.skip("the paper cards are not on this machine")
    wanted = dict.fromkeys(re.findall(r"^\s*[-*]\s*\**(C\d+)", card.read_text(), re.M))
    (record,) = notebook.records()
    ids = [c["id"] for c in record["claims"]]
    assert [i for i in ids if i in wanted] == list(wanted)
    for extra in set(ids) - set(wanted):  # a notebook may say more than the card: "C1x"
        assert extra[:-1] in wanted, extra


def test_the_verdicts_are_checked_as_text(notebook):
    cells = notebook.section("Against the paper")
    checked = [c for c in cells if "NBVAL_CHECK_OUTPUT" in c["source"]]
    assert len(checked) == 1 and "print(table.text())" in checked[0]["source"]
    printed = "".join("".join(out["text"]) for out in checked[0]["outputs"])
    (record,) = notebook.records()
    lines = [line.split(maxsplit=1) for line in printed.splitlines()]
    assert [(i, v.startswith(c["verdict"])) for (i, v), c in zip(lines, record["claims"])] == [
        (c["id"], True) for c in record["claims"]
    ]
    others = [c for c in notebook.code if c is not checked[0]]
    assert not any("NBVAL_CHECK_OUTPUT" in c["source"] for c in others)


def test_the_baseline_can_stand_in_the_methods_place(notebook):
    assert any("if control else" in c["source"] for c in notebook.code)


def test_both_profiles_run_the_same_code(notebook):
    source = "\n".join(c["source"] for c in notebook.code)
    assert f'start("{notebook.slug}", scale, seed, device, control)' in source
    assert re.search(r"run\.pick\(\s*mini=", source)
    assert "show.recorded(run)" in source


def test_tuning_is_recorded_with_one_budget_for_all(notebook):
    if not any("run.tuned(" in c["source"] for c in notebook.code):
        return
    path = ROOT / "data/results" / f"{notebook.slug}.tuning.json"
    record = json.loads(path.read_text(encoding="utf-8"))["mini"]
    assert record["metric"] and isinstance(record["higher_is_better"], bool) and record["grid"]
    seeds = {len(s) for m in record["methods"].values() for s in m["scores"].values()}
    assert len(seeds) == 1 and seeds.pop() >= 3, "every method is tuned on the same seeds"
    for name, method in record["methods"].items():
        assert len(method["scores"]) >= 2 and method["chosen"], f"{name} has not been tuned"


def test_exercises_have_solutions(notebook):
    cells = notebook.section("Exercises")
    assert 2 <= sum("solution" in c["tags"] for c in cells if c["cell_type"] == "code")


def test_there_are_notebooks_to_check():
    assert NOTEBOOKS
    assert Path(ROOT / "notebooks/index.ipynb").is_file()
