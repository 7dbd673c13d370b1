"""Headless execution, on small notebooks in a project of their own."""

import base64
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from miniature import papers, run

PARAMETERS = {"scale": "mini", "seed": 0, "device": "cpu", "control": False}
FIELDS = {"alpha": "federated", "beta": "federated", "gamma": "theory", "delta": "theory"}

# A notebook's last cell: a record whose claim C1 fails without the method, as it should.
RECORD = """
verdict = "not reproduced" if control else "reproduced"
claim = {"id": "C1", "claim": "better", "kind": "compare", "paper_value": "85.4", "measured": 0.06,
         "interval": [0.05, 0.07], "unit": "accuracy", "verdict": verdict, "control": True,
         "detail": "", "note": "", "parts": []}
identity = claim | {"id": "C2", "claim": "an identity", "verdict": "inconclusive",
                    "measured": None, "interval": None, "control": False}
record = {"paper": SLUG, "scale": scale, "seed": seed, "control": control,
          "claims": [claim, identity]}
display({"application/vnd.miniature.claims+json": record, "text/plain": "table"}, raw=True)
"""


def add_notebook(slug, *sources, tags=("parameters",)):
    """Write a notebook that has never run, with another machine's kernel and without cell ids."""
    parameters = 'scale = "mini"\nseed = 0\ndevice = "auto"\ncontrol = False'
    codes = [parameters, f"SLUG = {slug!r}", *sources, RECORD]
    cells = [{"cell_type": "markdown", "metadata": {}, "source": f"# {slug}"}]
    for i, source in enumerate(codes):
        cell = {"cell_type": "code", "metadata": {"tags": list(tags)} if i == 0 and tags else {}}
        cells.append(cell | {"execution_count": None, "outputs": [], "source": source})
    kernel = {"name": "conda-env-other", "display_name": "Other", "language": "python"}
    nb = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4}
    path = papers.paper(slug).notebook
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(nb))
    return path


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with four papers and no notebook."""
    entry = (
        "@misc{{{0},\n title = {{{{The {0} paper}}}},\n author = {{Doe and Roe}},\n"
        " year = {{2024}},\n howpublished = {{arXiv}},\n eprint = {{2401.0000{2}}},\n"
        " archivePrefix = {{arXiv}},\n keywords = {{{1}}},\n}}\n"
    )
    root = tmp_path / "project"
    (root / "data").mkdir(parents=True)
    text = "\n".join(entry.format(s, f, i) for i, (s, f) in enumerate(FIELDS.items()))
    (root / "data" / "papers.bib").write_text(text)
    monkeypatch.setenv("MINIATURE_ROOT", str(root))
    monkeypatch.chdir(root)
    return root


def job(slug, folder="runs", parameters=PARAMETERS, **options):
    return run.make_job(papers.paper(slug), folder, parameters, **options)


def printed(path):
    """Everything that a notebook's cells wrote to their streams."""
    return "".join("".join(o["text"]) for o in run.outputs(run.read(path)) if "text" in o)


def leftovers(folder):
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def gone(pid):
    """Whether a process has ended, within a few seconds."""
    for _ in range(50):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_executes_with_parameters_in_this_interpreter_with_one_thread(project):
    source = "import os, sys\nprint(sys.executable, seed, device, os.environ['OMP_NUM_THREADS'])"
    add_notebook(
        "alpha", source, "print(os.getcwd(), os.environ['NUMBA_NUM_THREADS'], os.getpid())"
    )
    result = run.execute(job("alpha", parameters=PARAMETERS | {"seed": 7}))

    assert (result.status, result.error) == ("done", None)
    assert result.record["seed"] == 7
    assert [c["verdict"] for c in result.record["claims"]] == ["reproduced", "inconclusive"]
    words = printed(result.notebook).split()
    assert words[:4] == [sys.executable, "7", "cpu", "1"]
    assert words[4:6] == [str(project / "notebooks" / "federated"), "1"]
    assert gone(int(words[6]))
    assert leftovers(project / "runs") == []
    stamp = run.read(result.notebook)["metadata"]["miniature"]
    assert stamp["parameters"]["seed"] == 7
    assert stamp["seconds"] == result.seconds > 0
    assert stamp["cpu_seconds"] > 0
    assert stamp["versions"]["miniature"] and "cores" in stamp["hardware"]
    # The notebook itself is only read.
    assert "cell_type" in (project / "notebooks/federated/alpha.ipynb").read_text()
    assert run.claims(run.read(papers.paper("alpha").notebook)) is None


def test_failing_cell_is_reported_and_the_rest_goes_on(project):
    add_notebook("alpha", "x = 1\nprint('so far')\nraise ValueError('the reason')")
    add_notebook("beta")
    add_notebook("gamma", "import os\nos._exit(3)")
    jobs = [job(s) for s in ("alpha", "beta", "gamma")]
    results = {r.slug: r for r in run.execute_all(jobs, n_jobs=2)}

    assert results["beta"].status == "done"
    error = results["alpha"].error
    assert (error["name"], error["message"]) == ("ValueError", "the reason")
    assert error["source"].startswith("x = 1") and error["cell"] == 4
    assert "the reason" in error["traceback"] and "\x1b" not in error["traceback"]
    assert results["alpha"].notebook.endswith("alpha.failed.ipynb")
    assert "so far" in printed(results["alpha"].notebook)
    assert not jobs[0].output.exists()
    # A kernel that ends is told from a cell that raises, and its cell is named all the same.
    assert results["gamma"].error["message"] == "the kernel died (out of memory?)"
    assert "os._exit" in results["gamma"].error["source"]
    assert leftovers(project / "runs") == []

    # A later success takes the failed notebook away.
    add_notebook("alpha")
    assert run.execute(job("alpha")).status == "done"
    assert not jobs[0].failed.exists()


def test_too_slow_notebook_fails_with_its_cell(project):
    add_notebook("alpha", "import time\ntime.sleep(60)")
    result = run.execute(job("alpha", timeout=2.0))
    assert result.status == "failed"
    assert (result.error["name"], result.error["message"]) == (
        "TimeoutError",
        "took longer than 2 s",
    )
    assert "sleep(60)" in result.error["source"]


def test_stopped_job_does_not_start(project):
    add_notebook("alpha")
    stopped = job("alpha")
    stopped.stop.parent.mkdir()
    stopped.stop.touch()
    assert run.execute(stopped).status == "interrupted"
    assert not stopped.output.exists() and not stopped.failed.exists()


def test_parameters_need_their_cell(project):
    # papermill would inject them before the notebook's own values, which would then win.
    add_notebook("alpha", tags=())
    result = run.execute(job("alpha"))
    assert result.status == "failed"
    assert "no cell tagged 'parameters'" in result.error["message"]


def test_broken_notebook_file_fails_alone(project):
    add_notebook("alpha")
    broken = job("alpha")
    papers.paper("alpha").notebook.write_text("{")
    result = run.execute(broken)
    assert result.status == "failed" and "not a notebook" in result.error["message"]


def test_resume_keeps_what_depends_on_nothing_that_changed(project):
    add_notebook("alpha")
    assert run.kept(job("alpha")) is None
    run.execute(job("alpha"))
    kept = run.kept(job("alpha"))
    assert kept.status == "kept" and kept.record["claims"][0]["verdict"] == "reproduced"
    assert run.kept(job("alpha", parameters=PARAMETERS | {"seed": 1})) is None

    tuning = project / "data" / "results" / "alpha.tuning.json"
    tuning.parent.mkdir()
    tuning.write_text("{}")
    assert run.kept(job("alpha")) is None
    tuning.unlink()
    assert run.kept(job("alpha"))

    add_notebook("alpha", "more = 1")
    assert run.kept(job("alpha")) is None


def test_resume_repeats_what_failed_since(project):
    add_notebook("alpha")
    run.execute(job("alpha"))
    job("alpha").failed.write_text("{}")
    assert run.kept(job("alpha")) is None


def test_in_place_output_is_fit_for_committing(project):
    path = add_notebook("alpha", "print('a')\nprint({'b', 'c', 'd'})")
    result = run.execute(job("alpha", parameters={}, in_place=True))
    first = path.read_text()
    nb = json.loads(first)

    assert result.notebook == str(path) and first.endswith("}\n")
    assert "papermill" not in first and '"execution":' not in first
    assert nb["metadata"]["kernelspec"]["name"] == "python3"
    assert set(nb["metadata"]["miniature"]) == {"seconds", "cpu_seconds", "version"}
    assert [c["metadata"] for c in nb["cells"]] == [{}, {"tags": ["parameters"]}, {}, {}, {}]
    ids = [c["id"] for c in nb["cells"]]
    assert len(set(ids)) == len(ids) == 5
    assert [c["execution_count"] for c in nb["cells"][1:]] == [1, 2, 3, 4]

    add_notebook("alpha", "print('a')\nprint({'b', 'c', 'd'})")
    run.execute(job("alpha", parameters={}, in_place=True))
    again = run.read(path)
    again["metadata"]["miniature"] = nb["metadata"]["miniature"]  # but for the seconds
    assert again == nb


def test_in_place_failure_leaves_the_notebook_alone(project):
    path = add_notebook("alpha", "1 / 0")
    before = path.read_text()
    result = run.execute(job("alpha", parameters={}, in_place=True))
    assert result.error["name"] == "ZeroDivisionError"
    assert path.read_text() == before
    assert (project / "runs" / "alpha.failed.ipynb").exists()


def picture(size=(2, 2)):
    from PIL import Image

    small = io.BytesIO()
    Image.new("RGB", size, "white").save(small, "png")
    return base64.b64encode(small.getvalue()).decode()


WIDGET = """
import base64, ipywidgets
from IPython.display import Image
def draw(x):
    display(Image(base64.b64decode({png!r}), alt="a dot"))
slider = ipywidgets.IntSlider(1, 1, 5, description={description!r})
ipywidgets.VBox([slider, ipywidgets.interactive_output(draw, {{"x": slider}})])
"""


@pytest.mark.parametrize("description", ["x", "x" * run._MAX_WIDGET_STATE])
def test_widgets_look_right_without_a_kernel(project, description):
    path = add_notebook("alpha", WIDGET.format(png=picture(), description=description))
    run.execute(job("alpha", parameters={}, in_place=True))
    nb = run.read(path)
    data = next(o["data"] for o in run.outputs(nb) if "image/png" in o.get("data", {}))
    # The figure is there for viewers without widgets in any case.
    assert "".join(data["image/png"]).strip() == picture()
    if len(description) > 1:
        assert "widgets" not in nb["metadata"]
        assert run._WIDGET_VIEW not in data
        return
    state = nb["metadata"]["widgets"][run._WIDGET_STATE]["state"]
    assert data[run._WIDGET_VIEW]["model_id"] in state

    run.execute(job("alpha", parameters={}, in_place=True))
    assert run.read(path)["metadata"]["widgets"] == nb["metadata"]["widgets"]  # ids stay


def test_neighboring_pieces_of_a_stream_are_joined():
    import nbformat.v4 as v4

    pieces = [
        v4.new_output("stream", name="stdout", text="a"),
        v4.new_output("stream", name="stdout", text="b"),
        v4.new_output("stream", name="stderr", text="c"),
        v4.new_output("display_data", {"text/plain": "d"}),
        v4.new_output("stream", name="stderr", text="e"),
    ]
    assert [o.get("text") for o in run._merged_streams(pieces)] == ["ab", "c", None, "e"]


def test_processes_that_a_notebook_left_end_with_it(project):
    add_notebook(
        "alpha", "import subprocess\nprint(subprocess.Popen(['sleep', '60'], close_fds=True).pid)"
    )
    result = run.execute(job("alpha"))
    assert result.status == "done"
    assert gone(int(printed(result.notebook)))


def test_negative_control_is_broken_by_what_it_should_break():
    def claim(id, control, verdict, *parts):
        return {"id": id, "control": control, "verdict": verdict, "parts": list(parts)}

    record = {
        "claims": [
            claim("C1", True, "reproduced"),
            claim("C2", True, "inconclusive"),
            claim("C3", False, "reproduced"),
            claim(
                "C4",
                True,
                "not reproduced",
                claim("C4a", True, "reproduced"),
                claim("C4b", False, "reproduced"),
            ),
        ]
    }
    assert run.unbroken(record) == ["C1", "C4a"]


def test_only_full_scale_results_are_recorded(project):
    add_notebook("alpha")
    run.execute(job("alpha"))
    with pytest.raises(ValueError, match="scale 'mini': only 'full'"):
        run.full_scale_record("alpha", "runs/alpha.ipynb")

    run.execute(job("alpha", parameters=PARAMETERS | {"scale": "full", "control": True}))
    with pytest.raises(ValueError, match="negative control"):
        run.full_scale_record("alpha", "runs/alpha.ipynb")

    run.execute(job("alpha", parameters=PARAMETERS | {"scale": "full"}))
    with pytest.raises(ValueError, match="about 'alpha', not 'beta'"):
        run.full_scale_record("beta", "runs/alpha.ipynb")
    record = run.full_scale_record("alpha", "runs/alpha.ipynb")
    assert record["claims"][0]["id"] == "C1" and record["parameters"]["scale"] == "full"
    assert record["hardware"] and record["date"] and record["versions"]["python"]

    nb = run.read("runs/alpha.ipynb")
    del nb["metadata"]["miniature"]["hardware"]
    (project / "runs" / "alpha.ipynb").write_text(json.dumps(nb))
    with pytest.raises(ValueError, match="does not say where it ran"):
        run.full_scale_record("alpha", "runs/alpha.ipynb")
    with pytest.raises(ValueError, match="is not a notebook"):
        run.full_scale_record("alpha", "nowhere.ipynb")


def test_killed_worker_is_reported(project):
    add_notebook("alpha", "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)")
    add_notebook("beta", "import time\ntime.sleep(1)")
    results = list(run.execute_all([job("alpha"), job("beta")], n_jobs=2))
    assert sorted(r.slug for r in results) == ["alpha", "beta"]
    error = next(r.error for r in results if r.slug == "alpha")
    assert error["message"] == "a worker process died"
    assert job("alpha").failed.exists()
    assert not list(Path(tempfile.gettempdir()).glob(f"miniature-{os.getpid()}-*"))
    assert leftovers(project / "runs") == []


def test_dask_cluster(project):
    distributed = pytest.importorskip("distributed", reason="dask is not installed")
    add_notebook("alpha")
    add_notebook("beta", "raise ValueError('the reason')")
    threads = {"processes": False, "protocol": "tcp://", "dashboard_address": None}
    with distributed.LocalCluster(n_workers=1, threads_per_worker=2, **threads) as cluster:
        address = cluster.scheduler_address
        jobs = [job("alpha"), job("beta")]
        results = {r.slug: r for r in run.execute_all(jobs, backend="dask", scheduler=address)}
    assert results["alpha"].status == "done" and results["alpha"].record
    assert results["beta"].error["message"] == "the reason"
    assert leftovers(project / "runs") == []


def test_dask_missing_is_said_with_its_command(project, monkeypatch):
    add_notebook("alpha")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'miniature\[dask\]'"):
        list(run.execute_all([job("alpha")], backend="dask", scheduler="tcp://127.0.0.1:1"))


def test_command_line_starts_light():
    heavy = ("torch", "numpy", "papermill", "nbformat", "joblib", "matplotlib", "IPython", "PIL")
    code = f"import sys, miniature.cli; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
