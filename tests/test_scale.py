"""The four parameters of a notebook, and the record of its tuning."""

import json
import math

import pytest

from miniature import papers, scale
from miniature.scale import start, write_json


def test_profiles_and_seeds():
    run = start("fedspeed")
    assert run.pick(mini={"a": 1}, full={"a": 2}).a == 1
    assert start("fedspeed", "full").pick(mini={"a": 1}, full={"a": 2}).a == 2
    with pytest.raises(ValueError, match="b"):
        run.pick(mini={"a": 1}, full={"a": 2, "b": 3})
    seen = set(run.seeds(50)) | set(start("fedspeed", seed=1).seeds(50)) | set(run.tuning_seeds(50))
    assert len(seen) == 150
    with pytest.raises(ValueError, match="n must be"):
        run.seeds(0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scale": "huge"}, "unknown scale 'huge': use 'mini' or 'full'"),
        ({"seed": -1}, "seed"),
        ({"seed": True}, "seed"),
        ({"control": 1}, "control"),
        ({"device": "toaster"}, "unknown device 'toaster'"),
        ({"device": "cuda:99"}, "cuda:99"),
    ],
)
def test_bad_parameters_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        start("fedspeed", **options)


def test_unknown_paper():
    with pytest.raises(papers.UnknownPaper, match="fedspeed"):
        start("fedsped")


def test_json_is_whole_or_not_there(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json(path, {"x": "é"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"x": "é"}
    with pytest.raises(ValueError):
        write_json(path, {"x": math.nan})
    assert json.loads(path.read_text(encoding="utf-8")) == {"x": "é"}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_tuning_is_recorded_only_when_asked(tmp_path, monkeypatch):
    run, full = start("fedspeed"), start("fedspeed", "full")
    monkeypatch.setattr(papers, "root", lambda: tmp_path)
    monkeypatch.delenv("MINIATURE_TUNE", raising=False)
    path = tmp_path / "data/results/fedspeed.tuning.json"
    calls = []

    def tune():
        calls.append(1)
        return {"grid": {"lr": (0.1, 0.2)}, "calls": len(calls)}

    assert run.tuned(tune) == {"grid": {"lr": [0.1, 0.2]}, "calls": 1}
    assert not path.exists()
    monkeypatch.setenv("MINIATURE_TUNE", "1")
    assert run.tuned(tune)["calls"] == 2 and path.exists()
    monkeypatch.delenv("MINIATURE_TUNE")
    record = run.tuned(tune)
    assert record["calls"] == 2 and len(calls) == 2 and record["date"]
    # The other profile keeps a record of its own.
    assert full.tuned(tune)["calls"] == 3
    assert list(json.loads(path.read_text())) == ["mini"]


def test_import_is_light():
    import subprocess
    import sys

    code = (
        "import sys, miniature; heavy = {'torch', 'numpy', 'matplotlib', 'IPython'} "
        "& set(sys.modules); assert not heavy, heavy; assert 'claims' in dir(miniature)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert scale.SCALES == ("mini", "full")
