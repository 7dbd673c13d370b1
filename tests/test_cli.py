"""The command line, on small notebooks in a project of their own."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from test_run import add_notebook, gone, leftovers, printed, project  # noqa: F401
from typer.testing import CliRunner

from miniature import papers, run
from miniature.cli import app

SEARCH = """
from miniature.scale import Run
def tune():
    scores = {"0.1": [0.5, 0.7], "0.3": [0.8, 0.9]}
    return {"metric": "test accuracy", "higher_is_better": True, "grid": {"lr": [0.1, 0.3]},
            "methods": {"FedAvg": {"scores": scores, "chosen": {"lr": 0.3}}}}
tuning = Run(SLUG, scale, seed, None, control).tuned(tune)
"""


def call(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.mark.parametrize(
    "command", ["list", "run", "refresh", "report", "new", "tune", "record", ""]
)
def test_help_explains_with_examples(command):
    result = call(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"miniature {command}".strip() in result.output


def test_version():
    assert call("--version").output.strip() == f"miniature {run.__version__}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run alphq", "no paper 'alphq'; did you mean 'alpha'?"),
        ("run alpha --scale huge", "unknown scale 'huge': use one of mini, full"),
        ("run alpha --device tpu", "unknown device 'tpu': use one of auto, cpu, cuda"),
        ("run alpha --seed -1", "--seed must be from 0 to 999999, got -1"),
        ("run alpha -j 0", "-j must be at least 1, got 0"),
        ("run --field physics", "unknown field 'physics': use one of federated, theory"),
        ("run --field theory", "no paper of theory has a notebook yet"),
        ("run beta", "`miniature new beta` starts notebooks/federated/beta.ipynb"),
        ("run", "name papers, or give --field FIELD, or --all"),
        ("run alpha --all", "one of the three"),
        ("run alpha --backend ray", "unknown backend 'ray': use one of loky, dask"),
        ("run alpha --backend dask", "needs --scheduler ADDRESS, such as tcp://"),
        ("run alpha --scheduler tcp://a:1", "needs --backend dask"),
        ("run alpha --backend dask --scheduler here", "'here' is no address: use one such as"),
        ("list --field physics", "unknown field 'physics'"),
        ("list --status good", "unknown status 'good': use one of finished, missing"),
        ("refresh alphq", "did you mean 'alpha'?"),
        ("new alphq", "did you mean 'alpha'?"),
        ("tune alpha --scale huge", "unknown scale 'huge'"),
        ("record alpha --from nowhere.ipynb", "nowhere.ipynb is not a notebook"),
        ("report --from nowhere", "no folder nowhere"),
    ],
)
def test_errors_take_one_line_and_name_what_is_right(project, arguments, message):  # noqa: F811
    add_notebook("alpha")
    result = call(*arguments.split())
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (project / "runs").exists()


def test_cuda_is_refused_before_anything_runs(project, monkeypatch):  # noqa: F811
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    add_notebook("alpha")
    for command in ("run", "tune", "record"):
        result = call(command, "alpha", "--device", "cuda")
        assert result.exit_code == 2 and "no CUDA device here: use cpu or auto" in result.stderr
    assert not (project / "runs").exists()


def test_no_checkout_is_an_error_too(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIATURE_ROOT", str(tmp_path))
    for arguments in (["list"], ["run", "alpha"], ["run", "--all"], ["report"], ["new", "alpha"]):
        result = call(*arguments)
        assert result.exit_code == 2 and "papers.bib does not exist" in result.stderr


def test_list(project):  # noqa: F811
    add_notebook("alpha")
    call("refresh", "alpha")
    add_notebook("beta")
    everything = json.loads(call("list", "--json").stdout)
    assert [e["slug"] for e in everything] == ["alpha", "beta", "gamma", "delta"]
    assert [e["status"] for e in everything] == ["finished", "unrun", "missing", "missing"]
    assert everything[0]["verdicts"] == {"C1": "reproduced", "C2": "inconclusive"}
    assert everything[0]["seconds"] > 0 and everything[0]["scale"] == "mini"

    def slugs(*arguments):
        return [e["slug"] for e in json.loads(call("list", "--json", *arguments).stdout)]

    assert slugs("--field", "theory") == ["gamma", "delta"]
    assert slugs("--status", "missing") == ["gamma", "delta"]
    assert slugs("--status", "inconclusive") == ["alpha"]
    assert slugs("--status", "reproduced") == []  # not every claim
    table = call("list").output
    assert "C1 ✓  C2 ~" in table and "4 papers, 1 finished; 2 claims: ✓ 1 reproduced" in table


def test_run_resume_and_summary(project):  # noqa: F811
    add_notebook("alpha")
    add_notebook("beta", "raise ValueError('the reason')")
    result = call("run", "--field", "federated", "-j", 1, "--seed", 3, "--out", "here")
    assert result.exit_code == 1
    assert "beta failed in cell [4]" in result.output
    assert "raise ValueError('the reason')" in result.output
    assert "ValueError: the reason" in result.output
    assert "C1 ✓  C2 ~" in result.output
    summary = json.loads((project / "here" / "summary.json").read_text())
    assert summary["parameters"]["seed"] == 3
    assert [p["status"] for p in summary["papers"]] == ["done", "failed"]
    assert summary["papers"][0]["record"]["claims"][0]["verdict"] == "reproduced"
    assert summary["papers"][1]["error"]["name"] == "ValueError"

    add_notebook("beta")
    result = call("run", "--all", "--seed", 3, "--out", "here", "--resume", "-j", 1)
    assert result.exit_code == 0
    summary = json.loads((project / "here" / "summary.json").read_text())
    assert [p["status"] for p in summary["papers"]] == ["kept", "done"]
    assert sorted(p.name for p in (project / "here").iterdir()) == [
        "alpha.ipynb",
        "beta.ipynb",
        "summary.json",
    ]


def test_control_fails_where_a_comparison_survives_it(project):  # noqa: F811
    add_notebook("alpha")
    result = call("run", "alpha", "--control")
    assert result.exit_code == 0 and "No comparison with a method" in result.output

    # A check that does not depend on the method at all.
    add_notebook("beta", "control_was, control = control, False")
    result = call("run", "alpha", "beta", "--control", "-j", 1)
    assert result.exit_code == 1
    assert "beta C1 is reproduced without its method" in result.output
    assert "alpha C1 is" not in result.output


def test_interrupt_stops_kernels_and_keeps_what_was_done(project):  # noqa: F811
    add_notebook("alpha")
    note = "import os, time, pathlib\nprint('begun', flush=True)\n"
    wait = "pathlib.Path('{}.pid').write_text(str(os.getpid()))\ntime.sleep(120)"
    for slug in ("beta", "gamma"):
        add_notebook(slug, note + wait.format(slug))
    pids = [papers.paper(s).notebook.with_name(f"{s}.pid") for s in ("beta", "gamma")]
    code = "from miniature.cli import app; app()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "run", "beta", "gamma", "alpha", "-j", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    for _ in range(600):
        if all(p.exists() and p.read_text() for p in pids):
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does: the workers get it as well
    output, _ = process.communicate(timeout=60)

    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert all(gone(int(p.read_text())) for p in pids)
    summary = json.loads((project / "runs" / "summary.json").read_text())
    assert [p["status"] for p in summary["papers"]] == ["interrupted"] * 3
    for slug in ("beta", "gamma"):
        assert "begun" in printed(project / "runs" / f"{slug}.failed.ipynb")
        assert not (project / "runs" / f"{slug}.ipynb").exists()
    assert not (project / "runs" / "alpha.ipynb").exists()
    assert leftovers(project / "runs") == []


def test_refresh(project):  # noqa: F811
    path = add_notebook("alpha")
    add_notebook("beta", "1 / 0")
    result = call("refresh", "alpha", "beta", "-j", 1)
    assert result.exit_code == 1 and "ZeroDivisionError" in result.output
    nb = run.read(path)
    assert run.claims(nb)["claims"][0]["verdict"] == "reproduced"
    assert nb["metadata"]["miniature"]["version"] == run.__version__
    assert "injected-parameters" not in path.read_text()


def test_refresh_renews_the_indexes(project):  # noqa: F811
    add_notebook("alpha")
    source = run.papers.paper("alpha").notebook
    indexes = [project / "notebooks" / "index.ipynb", source.with_name("index.ipynb")]
    for path in indexes:
        path.write_text(source.read_text())
    assert call("refresh", "alpha", "-j", 1).exit_code == 0
    for path in indexes:
        assert run.claims(run.read(path)) is not None


def test_tune_runs_the_search_again_and_tells_the_choice(project):  # noqa: F811
    add_notebook("alpha", SEARCH)
    assert call("run", "alpha").exit_code == 0
    record = project / "data" / "results" / "alpha.tuning.json"
    assert not record.exists()  # only `tune` records
    result = call("tune", "alpha", "--scale", "full")
    assert run.claims(run.read(project / "runs" / "tune" / "alpha.ipynb")) is None
    assert result.exit_code == 0, result.output
    assert json.loads(record.read_text())["full"]["methods"]["FedAvg"]["chosen"] == {"lr": 0.3}
    assert "lr = 0.3" in result.output and "0.85" in result.output

    add_notebook("beta")
    result = call("tune", "beta")
    assert result.exit_code == 1 and "does not call run.tuned(tune)" in result.stderr
    add_notebook("beta", "1 / 0")
    assert call("tune", "beta").exit_code == 1


def test_record(project):  # noqa: F811
    add_notebook("alpha")
    result = call("record", "alpha")
    assert result.exit_code == 0, result.output
    path = project / "data" / "results" / "alpha.json"
    record = json.loads(path.read_text())
    assert record["scale"] == "full" and record["paper"] == "alpha"
    assert record["parameters"] == {"scale": "full", "seed": 0, "device": "auto", "control": False}

    path.unlink()
    assert call("record", "alpha", "--from", "runs/full/alpha.ipynb").exit_code == 0
    assert json.loads(path.read_text()) == record

    path.unlink()
    call("run", "alpha")
    result = call("record", "alpha", "--from", "runs/alpha.ipynb")
    assert result.exit_code == 2 and "only 'full' is recorded" in result.stderr
    assert not path.exists()


def test_new_starts_three_files_and_never_overwrites(project):  # noqa: F811
    result = call("new", "gamma")
    assert result.exit_code == 0
    names = [
        "lib/miniature/theory/gamma.py",
        "notebooks/theory/gamma.ipynb",
        "tests/theory/test_gamma.py",
    ]
    assert result.output.splitlines() == names
    texts = [(project / n).read_text() for n in names]
    compile(texts[0], names[0], "exec")
    assert "The gamma paper" in texts[0] and "arXiv:2401.00002" in texts[0]

    import nbformat

    nb = nbformat.reads(texts[1], as_version=4)
    nbformat.validate(nb)
    assert nb.cells[0].source == "# The gamma paper"
    headings = [c.source.split("\n")[0] for c in nb.cells if c.source.startswith("## ")]
    assert headings == [
        "## The problem",
        "## The idea",
        "## Experiment",
        "## Turn the knob",
        "## Against the paper",
        "## Paper and code",
        "## What the miniature cannot show",
        "## Exercises",
    ]
    tagged = {t: c.source for c in nb.cells for t in c.metadata.get("tags", ())}
    assert tagged["parameters"].splitlines() == [
        'scale = "mini"',
        "seed = 0",
        'device = "auto"',
        "control = False",
    ]
    assert "solution" in tagged
    assert any(c.source.startswith("# NBVAL_CHECK_OUTPUT") for c in nb.cells)
    for cell in nb.cells:
        if cell.cell_type == "code":
            compile(cell.source, "cell", "exec")

    # The test fails until it is written, and says so.
    with pytest.raises(pytest.fail.Exception, match="gamma are still to be written"):
        space = {}
        exec(texts[2], space)
        space["test_gamma"]()

    (project / names[0]).write_text("mine")
    (project / names[2]).unlink()
    result = call("new", "gamma")
    assert result.exit_code == 2 and "already there, so nothing was written" in result.stderr
    assert (project / names[0]).read_text() == "mine"
    assert not (project / names[2]).exists()
