"""Figures, tables and controls in one house style.

Figures are drawn on white, so that they read the same in JupyterLab's light and dark themes;
tables and text take the theme's own colors.
"""

import html
import inspect
import io
import json
import re
import textwrap
from pathlib import Path

# Okabe and Ito's palette (black last, yellow left out: it fades on white). Colors never carry a
# meaning alone: each comes with its own marker.
C = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F4FC9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MAX_BYTES = 60_000

_names = {}


def color(name):
    """Return the color of a method: the same wherever the notebook draws that name."""
    return C[_index(name)]


def kind(name):
    """Return a method's name without its size: "LoRA" for "LoRA, r = 4"."""
    return name.partition(",")[0].strip()


def marker(name):
    """Return the marker that goes with `color`."""
    return MARKERS[_index(name)]


def _index(name):
    return _names.setdefault(name, len(_names)) % len(C)


def style():
    """Set matplotlib's defaults to the house style."""
    import matplotlib as mpl

    mpl.use("agg")  # figures are shown by `figure`, never by a backend of their own
    mpl.rcParams.update(
        {
            "figure.figsize": (5.0, 3.4),
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "axes.titlesize": 10.5,
            "axes.titleweight": "bold",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#e4e4e4",
            "grid.linewidth": 0.7,
            "axes.axisbelow": True,
            "axes.prop_cycle": mpl.cycler(color=C),
            "lines.linewidth": 1.8,
            "lines.markersize": 5,
            "legend.frameon": False,
            "legend.fontsize": 9,
        }
    )


def subplots(nrows=1, ncols=1, width=None, height=None, **options):
    """Make a figure in the house style.

    Parameters
    ----------
    nrows, ncols : int
    width, height : float, optional
        Inches for the whole figure. Default: 4.2 wide and 3.2 high a panel.
    **options
        Passed to `matplotlib.pyplot.subplots`.

    Returns
    -------
    figure, axes
    """
    style()
    import matplotlib.pyplot as plt

    size = (width or max(5.0, 4.2 * ncols), height or 3.2 * nrows + 0.1)
    return plt.subplots(nrows, ncols, figsize=size, **options)


def band(ax, x, ys, label, **options):
    """Draw the mean over seeds with its 95 % interval as a band.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
    x : array_like, shape [T]
    ys : array_like, shape [S, T]
        A curve per seed. With fewer than three seeds only the mean is drawn.
    label : str
        Also chooses color and marker (see `color`).
    **options
        Passed to ``ax.plot``.
    """
    import numpy as np

    from .claims import _array, interval

    x, ys = _array(x), _array(ys)
    if ys.ndim != 2 or ys.shape[1] != len(x):
        raise ValueError(f"ys must have shape [S, {len(x)}], got {list(ys.shape)}")
    if "color" not in options:
        options["color"] = color(label)
    if "marker" not in options:
        options["marker"] = marker(label) if label in _names else "o"
    options.setdefault("markevery", max(1, len(x) // 8))
    ax.plot(x, ys.mean(0), label=label, **options)
    if len(ys) >= 3:
        _, lo, hi = interval(ys)
        if ax.get_yscale() == "log":
            lo = np.maximum(lo, ys.min(0) * 0.5)  # a t interval can cross zero, a log axis cannot
        ax.fill_between(x, lo, hi, color=options["color"], alpha=0.18, linewidth=0)


def png(fig):
    """Render a figure as PNG bytes of less than 60 KB, and close it.

    Raises
    ------
    ValueError
        If the figure is too busy for that even at a coarse resolution.
    """
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(fig)
    for dpi in (130, 110, 90, 72):
        fig.set_dpi(dpi)
        canvas.draw()  # `savefig` would draw a second time, without a trace, for the layout alone
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        small = io.BytesIO()
        # An octree keeps every color within a few steps of itself, rare ones too.
        picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
            small, "png", optimize=True
        )
        if small.tell() <= MAX_BYTES:
            plt.close(fig)
            return small.getvalue()
    plt.close(fig)
    raise ValueError(
        f"the figure takes {small.tell()} bytes, more than {MAX_BYTES}: draw fewer points, or "
        "rasterize less"
    )


def figure(fig, alt):
    """Show a figure with a text for those who cannot see it, and close it.

    Parameters
    ----------
    fig : matplotlib.figure.Figure
    alt : str
        What the picture shows, in a sentence.
    """
    from IPython.display import Image, display

    if not alt.strip():
        raise ValueError("a figure needs an alt text that says what it shows")
    display(Image(png(fig), format="png", alt=alt))


def source(obj, start=None, end=None):
    """Show lines of the library's own source, so that what is read is what runs.

    They are named by file and function, not by number: what stands above them may change without
    making the stored output of a notebook wrong.

    Parameters
    ----------
    obj : function, class or module
    start, end : str, optional
        Regular expressions: the first line to show, and the last one (searched from `start` on).

    Raises
    ------
    ValueError
        If a pattern matches no line.
    """
    from IPython.display import Markdown, display

    obj = inspect.unwrap(getattr(obj, "py_func", obj))  # as numba found it, without decorators
    lines, _ = inspect.getsourcelines(obj)
    a = _find(lines, start, 0, obj) if start else 0
    b = _find(lines, end, a, obj) if end else len(lines) - 1
    path = Path(inspect.getsourcefile(obj))
    path = path.relative_to(path.parents[len(_module_name(obj).split(".")) - 1])
    code = textwrap.dedent("".join(lines[a : b + 1])).rstrip()
    place = f"`{path}`" if inspect.ismodule(obj) else f"`{path}`, `{obj.__qualname__}`"
    display(Markdown(f"{place}\n\n```python\n{code}\n```"))


def _module_name(obj):
    return obj.__name__ if inspect.ismodule(obj) else obj.__module__


def _find(lines, pattern, begin, obj):
    for i, line in enumerate(lines[begin:], begin):
        if re.search(pattern, line):
            return i
    raise ValueError(f"no line of {obj.__name__} matches {pattern!r}")


def table(rows, caption=""):
    """Show a list of dicts (one a row) as a table in the theme's colors.

    Parameters
    ----------
    rows : list of dict
        Same keys in each; floats are shown with four significant digits.
    caption : str
    """
    from IPython.display import HTML, display

    display(HTML(table_html(rows, caption)))


def table_html(rows, caption=""):
    """Return the HTML of `table`."""
    from .claims import _number

    def text(value):
        return html.escape(_number(value) if isinstance(value, float) else str(value))

    cell = '<{0} style="text-align:left;padding:3px 10px">{1}</{0}>'
    head = "".join(cell.format("th", html.escape(str(k))) for k in rows[0])
    body = "".join(
        "<tr>" + "".join(cell.format("td", text(v)) for v in row.values()) + "</tr>" for row in rows
    )
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def interact(draw, **values):
    """Show controls and redraw when one is moved.

    Parameters
    ----------
    draw : callable
        Called with a keyword per control; shows its figure with `figure`. Should answer in less
        than a second.
    **values
        ``(low, high, step)`` or ``(low, high, step, start)`` for a slider, a list for a choice
        (its first entry is the start), a bool for a check box.

    Returns
    -------
    ipywidgets.VBox
        The controls and the output; the last line of a cell shows it.
    """
    import ipywidgets as w

    controls = {name: _control(w, name, value) for name, value in values.items()}
    output = w.interactive_output(draw, controls)
    return w.VBox([w.HBox(list(controls.values())), output])


def _control(w, name, value):
    look = {"description": name, "style": {"description_width": "initial"}}
    if isinstance(value, bool):
        return w.Checkbox(value=value, **look)
    if isinstance(value, list):
        return w.SelectionSlider(options=value, value=value[0], continuous_update=False, **look)
    if isinstance(value, tuple) and len(value) in (3, 4):
        low, high, step, *start = value
        kind = w.IntSlider if all(isinstance(v, int) for v in value) else w.FloatSlider
        start = start[0] if start else low
        return kind(start, min=low, max=high, step=step, continuous_update=False, **look)
    raise ValueError(
        f"control {name!r}: use (low, high, step), (low, high, step, start), a list or a bool, "
        f"not {value!r}"
    )


def tuning(record):
    """Show the curves of a hyperparameter search and what it chose.

    Parameters
    ----------
    record : dict
        From ``run.tuned(tune)``: see `miniature.scale.Run.tuned`.
    """
    import numpy as np

    methods = record["methods"]
    rows = -(-len(methods) // 5)
    across = -(-len(methods) // rows)  # at most five panels a row, rows of about equal length
    fig, axes = subplots(
        rows,
        across,
        width=max(5.0, 1.9 * across),
        height=0.4 + 2.1 * rows,
        sharey=True,
        squeeze=False,
    )
    for ax in axes.flat[len(methods) :]:
        ax.remove()
    best = max if record["higher_is_better"] else min
    everything = np.concatenate(
        [np.ravel(list(m["scores"].values())).astype(float) for m in methods.values()]
    )
    if everything.min() > 0 and everything.max() > 30 * everything.min():
        axes[0][0].set_yscale("log")  # one diverged run would flatten all the rest
    grids = [list(m["scores"]) for m in methods.values()]
    for i, (ax, (name, method)) in enumerate(zip(axes.flat, methods.items())):
        labels = grids[i]
        scores = np.array([method["scores"][k] for k in labels], dtype=float)
        means = scores.mean(1)
        ax.plot(range(len(labels)), scores, color="#bbbbbb", linewidth=0.8)
        own = kind(name)  # sizes of one method share its color
        ax.plot(range(len(labels)), means, color=color(own), marker=marker(own))
        at = int(np.flatnonzero(means == best(means))[0])
        ax.plot(at, means[at], "o", markersize=13, markerfacecolor="none", color="black")
        ax.minorticks_off()
        same = i + across < len(grids) and grids[i + across] == labels  # said by the panel below
        words = [""] * len(labels) if same else labels
        ax.set_xticks(range(len(labels)), words, rotation=45, ha="right", fontsize=8)
        ax.set_title(name, fontsize=10)
    fig.supylabel(record["metric"], fontsize=10)
    fig.supxlabel(", ".join(record["grid"]) + " (chosen value circled)", fontsize=9)
    chosen = "; ".join(
        f"{name}: {', '.join(f'{k} = {v}' for k, v in m['chosen'].items())}"
        for name, m in methods.items()
    )
    figure(fig, alt=f"{record['metric']} over the tuning grid of every method. Chosen: {chosen}.")


def recorded(run):
    """Show the full-scale results that have been recorded for a paper, or say how to record them.

    Parameters
    ----------
    run : miniature.scale.Run
    """
    from IPython.display import Markdown, display

    from . import papers

    path = papers.root() / "data" / "results" / f"{run.slug}.json"
    if not path.exists():
        display(
            Markdown(
                "No full-scale run has been recorded. On a machine with a GPU, "
                f"`miniature record {run.slug} --device cuda` makes one."
            )
        )
        return
    record = json.loads(path.read_text(encoding="utf-8"))
    table(
        [
            {
                "id": c["id"],
                "claim": c["claim"],
                "measured": "" if c["measured"] is None else float(c["measured"]),
                "interval": c["interval"] or "",
                "verdict": c["verdict"],
            }
            for c in record["claims"]
        ],
        caption=f"Full scale, {record['date']}, {record['hardware']}",
    )
