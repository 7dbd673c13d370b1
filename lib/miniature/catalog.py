"""The front door: which papers there are, which are finished, and what came out."""

import html

from . import papers, run
from .claims import COLORS, SYMBOLS, VERDICTS

_ANY = "any"


def find(text="", field=_ANY, status=_ANY):
    """Return the papers that match.

    Parameters
    ----------
    text : str
        Words that all must occur in slug, title, authors, venue or year; case is ignored.
    field : str
        A field of the bibliography, or "any".
    status : str
        "finished", "not yet", a verdict that at least one claim must have, or "any".

    Returns
    -------
    list of (miniature.papers.Paper, dict)
        Each paper with what is known about its notebook (see `miniature.run.entry`).

    Raises
    ------
    ValueError
        If field or status is not one of those.
    """
    for name, value, known in (("field", field, fields()), ("status", status, statuses())):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}: use one of {', '.join(known)}")
    words = text.lower().split()
    found = []
    for paper in papers.all():
        everything = " ".join(
            [paper.slug, paper.title, *paper.authors, paper.venue or "", str(paper.year)]
        ).lower()
        if field not in (_ANY, paper.field) or not all(w in everything for w in words):
            continue
        entry = run.entry(paper)
        finished = entry["status"] == "finished"
        if (
            status == _ANY
            or (status == "finished" and finished)
            or (status == "not yet" and not finished)
            or status in entry["verdicts"].values()
        ):
            found.append((paper, entry))
    return found


def fields():
    """Return the choices for a field."""
    return [_ANY, *papers.fields()]


def statuses():
    """Return the choices for a status."""
    return [_ANY, "finished", "not yet", *VERDICTS]


def table(found, limit=40):
    """Return papers as an HTML table; finished ones link to their notebook.

    Parameters
    ----------
    found : list
        From `find`.
    limit : int
        Rows shown; the rest is counted.
    """
    if not found:
        return "<p>No paper matches.</p>"
    cell = '<td style="text-align:left;vertical-align:top;padding:4px 10px">{}</td>'
    rows = "".join(
        "<tr>" + "".join(cell.format(c) for c in _cells(paper, entry)) + "</tr>"
        for paper, entry in found[:limit]
    )
    head = "".join(
        f'<th scope="col" style="text-align:left;padding:4px 10px">{h}</th>'
        for h in ("Paper", "Field", "Verdicts", "Time")
    )
    more = f"<p>… and {len(found) - limit} more: narrow the search.</p>" if found[limit:] else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>{more}"


def _cells(paper, entry):
    title = html.escape(paper.title)
    if entry["status"] == "finished":
        title = f'<a href="{paper.field}/{paper.slug}.ipynb">{title}</a>'
    small = '<div style="opacity:.75;font-size:12px">{}</div>'
    verdicts = " ".join(
        f'<span style="color:{COLORS[v]};white-space:nowrap" title="{v}">{html.escape(i)} '
        f"{SYMBOLS[v]}</span>"
        for i, v in entry["verdicts"].items()
    )
    seconds = f"{entry['seconds']:.0f} s" if entry["seconds"] else ""
    return (
        title + small.format(html.escape(paper.byline)),
        html.escape(paper.field),
        verdicts or '<span style="opacity:.75">not yet</span>',
        seconds,
    )


def show(found, limit=40):
    """Show papers as a table, and as plain text where there is no browser."""
    from IPython.display import display

    text = "\n".join(
        f"{paper.field:12} {paper.slug:32} {' '.join(f'{i} {v}' for i, v in e['verdicts'].items())}"
        for paper, e in found[:limit]
    )
    display({"text/html": table(found, limit), "text/plain": text}, raw=True)


def path(*slugs):
    """Show a reading path: papers in the given order."""
    show([(p, run.entry(p)) for p in map(papers.paper, slugs)])


def browse():
    """Return a search box with filters over all papers."""
    import ipywidgets as w

    text = w.Text(
        placeholder="title, author, venue, year", description="Search", continuous_update=False
    )
    field = w.Dropdown(options=fields(), description="Field")
    status = w.Dropdown(options=statuses(), description="Status")
    output = w.interactive_output(
        lambda text, field, status: show(find(text, field, status)),
        {"text": text, "field": field, "status": status},
    )
    return w.VBox([w.HBox([text, field, status]), output])
