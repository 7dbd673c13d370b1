"""Figures, tables and controls."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from miniature import show
from miniature.peft.ladder_side_tuning import states
from miniature.scale import start


@pytest.fixture
def shown(monkeypatch):
    """Everything that would appear under the cell."""
    objects = []
    monkeypatch.setattr("IPython.display.display", lambda *o, **_: objects.extend(o))
    return objects


def busy_figure(points):
    fig, ax = show.subplots()
    ax.scatter(*np.random.default_rng(0).random((2, points)), s=3)
    return fig


def test_a_figure_is_a_small_png_with_an_alt_text_and_is_closed(shown):
    import matplotlib.pyplot as plt

    fig, ax = show.subplots(1, 2)
    show.band(ax[0], range(20), np.random.default_rng(0).random((5, 20)), label="FedAvg")
    show.figure(fig, alt="Noise.")
    data, metadata = shown[0]._repr_mimebundle_()
    assert metadata["image/png"]["alt"] == "Noise."
    assert not plt.get_fignums()
    assert "image/png" in data


def test_busy_figures_get_coarser_and_impossible_ones_are_refused(monkeypatch):
    sizes = [Image.open(io.BytesIO(show.png(busy_figure(n)))).width for n in (10, 4000)]
    assert len(show.png(busy_figure(4000))) <= show.MAX_BYTES
    assert sizes[1] <= sizes[0]
    monkeypatch.setattr(show, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="draw fewer points"):
        show.png(busy_figure(10))


def test_rare_colors_survive_the_compression():
    fig, ax = show.subplots()
    for i in range(2000):  # a thousand shades, and one thin line of each method
        ax.plot([0, 1], [i, i + 1], color=(i / 2000, 1 - i / 2000, 0.5), linewidth=0.3)
    for name, color in zip("ABCD", show.C):
        ax.plot([0, 0.02], [0, 1], color=color, label=name)
    ax.legend()
    picture = np.asarray(Image.open(io.BytesIO(show.png(fig))).convert("RGB")).astype(int)
    for color in show.C[:4]:
        wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert np.abs(picture - wanted).sum(-1).min() <= 12


def test_an_alt_text_is_required():
    with pytest.raises(ValueError, match="alt text"):
        show.figure(busy_figure(1), alt=" ")


def test_band_draws_mean_and_interval():
    from miniature.claims import interval

    _, ax = show.subplots()
    ys = np.random.default_rng(0).random((5, 4))
    show.band(ax, [1, 2, 3, 4], ys, label="ours")
    np.testing.assert_allclose(ax.lines[0].get_ydata(), ys.mean(0))
    vertices = ax.collections[0].get_paths()[0].vertices[:, 1]
    _, lo, hi = interval(ys)
    assert vertices.min() == pytest.approx(lo.min()) and vertices.max() == pytest.approx(hi.max())
    with pytest.raises(ValueError, match=r"\[S, 4\]"):
        show.band(ax, [1, 2, 3, 4], ys[0], label="ours")


def test_a_name_keeps_its_color():
    assert show.color("a name") == show.color("a name") != show.color("another name")


def test_source_shows_the_lines_that_run(shown):
    show.source(show.marker)
    assert "miniature/show.py" in shown[0].data and "def marker(name):" in shown[0].data
    show.source(show.marker, start="return", end="return")
    assert shown[1].data.endswith("```python\nreturn MARKERS[_index(name)]\n```")
    show.source(states, start="try", end="backbone.x")  # its decorator is torch's
    assert shown[2].data.startswith("`miniature/peft/ladder_side_tuning.py`, `states`\n")
    show.source(show, start="^C = ", end="^C = ")
    assert shown[3].data.startswith("`miniature/show.py`\n\n```python\nC = (")
    with pytest.raises(ValueError, match="nowhere"):
        show.source(show.marker, start="nowhere")


def test_interact_redraws(shown):
    seen = []
    box = show.interact(lambda **v: seen.append(v), K=(1, 40, 1, 5), rho=[0.0, 0.1], on=True)
    k, rho, on = box.children[0].children
    k.value, rho.value, on.value = 7, 0.1, False
    assert seen[0] == {"K": 5, "rho": 0.0, "on": True}
    assert seen[-1] == {"K": 7, "rho": 0.1, "on": False}
    with pytest.raises(ValueError, match="'bad'"):
        show.interact(print, bad="x")


def test_table_and_tuning(shown):
    show.table([{"method": "<a>", "accuracy": 0.12345}], caption="t")
    assert "&lt;a&gt;" in shown[0].data and "0.1235" in shown[0].data
    record = {
        "metric": "accuracy",
        "higher_is_better": True,
        "grid": {"lr": [0.1, 0.2]},
        "methods": {"A": {"scores": {"0.1": [1, 2], "0.2": [3, 4]}, "chosen": {"lr": 0.2}}},
    }
    show.tuning(record)
    assert "A: lr = 0.2" in shown[1]._repr_mimebundle_()[1]["image/png"]["alt"]


def test_recorded(shown, tmp_path, monkeypatch):
    run = start("fedspeed")
    monkeypatch.setattr("miniature.papers.root", lambda: tmp_path)
    show.recorded(run)
    assert "miniature record fedspeed" in shown[0].data
    (tmp_path / "data/results").mkdir(parents=True)
    claim = {"id": "C1", "claim": "c", "measured": 1, "interval": None, "verdict": "reproduced"}
    record = {"date": "2026-01-01", "hardware": "a GPU", "claims": [claim]}
    (tmp_path / "data/results/fedspeed.json").write_text(json.dumps(record))
    show.recorded(run)
    assert "a GPU" in shown[1].data
