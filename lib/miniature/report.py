"""The HTML report: one page with the verdicts of every paper, without network resources."""

import base64
import html
import io
import json
import os
from datetime import date
from pathlib import Path
from string import Template
from urllib.parse import quote

from . import papers
from . import run as runner

STATUS_WORDS = {
    "finished": "finished",
    "failed": "failed",
    "unrun": "not run yet",
    "missing": "no notebook yet",
}
THUMBNAIL = (280, 200)  # pixels, shown at half that size or less


def write(path, folder=None):
    """Write the report.

    Parameters
    ----------
    path : path-like
        The page. Links to notebooks are relative to it.
    folder : path-like, optional
        Take the notebooks that `miniature run` wrote there. Default: the committed ones.

    Returns
    -------
    list of dict
        What is known about each paper (see `miniature.run.entry`).
    """
    path = Path(path).resolve()
    known = papers.all()
    entries = [runner.entry(p, folder) for p in known]
    first = sorted(zip(known, entries), key=lambda pair: pair[1]["status"] != "finished")
    verdicts = [v for e in entries for v in e["verdicts"].values()]
    finished = sum(e["status"] == "finished" for e in entries)
    page = _template("report.html").substitute(
        papers=len(entries),
        finished=finished,
        claims=len(verdicts),
        counts=" ".join(_chip(v, f"{verdicts.count(v)} {v}") for v in runner.VERDICTS),
        source=_escape(f"notebooks in {folder}" if folder else "committed notebooks"),
        date=date.today().isoformat(),
        fields="".join(
            f'<option value="{_escape(f)}">{_escape(f)}</option>' for f in papers.fields()
        ),
        rows="\n".join(_row(p, e, path.parent) for p, e in first),
    )
    runner.write_text(path, page)
    return entries


def _template(name):
    return Template((Path(__file__).parent / "templates" / name).read_text(encoding="utf-8"))


def _row(paper, entry, here):
    """One paper as a list item."""
    twins = [p for p in papers.entries() if p.notebook == paper.notebook and p != paper]
    title = _escape(paper.title)
    if entry["notebook"]:
        link = quote(Path(os.path.relpath(entry["notebook"], here)).as_posix())
        title = f'<a href="{link}">{title}</a>'
    source = f"{paper.byline.rstrip('.')}. {paper.venue} {paper.year}."
    also = "".join(f" Also covers: {p.title} ({p.slug})." for p in twins)
    search = " ".join([paper.slug, paper.title, source, paper.field, paper.arxiv or "", also])
    chips = "".join(_chip(v, f"{i} {v}") for i, v in entry["verdicts"].items())
    if not chips:
        chips = f'<span class="chip {entry["status"]}">{STATUS_WORDS[entry["status"]]}</span>'
    seconds = f"{entry['seconds']:.1f} s" if entry["seconds"] is not None else ""
    verdicts = " ".join(sorted({v.replace(" ", "-") for v in entry["verdicts"].values()}))
    return (
        f'<li class="paper" data-field="{_escape(paper.field)}" data-status="{entry["status"]}" '
        f'data-verdicts="{verdicts}" data-text="{_escape(search.lower())}">'
        f'<div class="picture">{_thumbnail(entry, paper)}</div>'
        f"<div><h2>{title}</h2>"
        f'<p class="source">{_escape(source + also)} <span class="field">{_escape(paper.field)}'
        f"</span> <code>{_escape(paper.slug)}</code>"
        f"{f' <span class=seconds>{seconds}</span>' if seconds else ''}</p>"
        f'<p class="chips">{chips}</p>{_details(paper, entry)}</div></li>'
    )


def _chip(verdict, text):
    name = verdict.replace(" ", "-")
    return f'<span class="chip {name}">{runner.SYMBOLS[verdict]} {_escape(text)}</span>'


def _details(paper, entry):
    """The claims of a paper, and its recorded full-scale results, behind a disclosure."""
    if not entry["record"]:
        return ""
    blocks = [_claims_table(entry["record"], f"Scale {entry['scale']}")]
    path = papers.root() / "data" / "results" / f"{paper.slug}.json"
    if path.exists():
        full = json.loads(path.read_text(encoding="utf-8"))
        where = f"Recorded at full scale, {full['date']}, {full['hardware']}"
        blocks.append(_claims_table(full, where))
    label = f'<span class="hidden"> of {_escape(paper.title)}</span>'
    return f"<details><summary>Claims{label}</summary>{''.join(blocks)}</details>"


def _claims_table(record, caption):
    if record.get("control"):
        caption += ", negative control"
    rows = "".join(
        _claim_row(c, part)
        for claim in record["claims"]
        for c, part in [(claim, False), *((p, True) for p in claim.get("parts") or ())]
    )
    head = "".join(
        f'<th scope="col">{h}</th>'
        for h in ("Claim", "Statement", "Paper", "Measured, 95 % interval", "Verdict")
    )
    return (
        f'<div class="scroll"><table><caption>{_escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _claim_row(claim, part):
    measured = _number(claim["measured"])
    if claim.get("interval"):
        measured += f" [{', '.join(map(_number, claim['interval']))}]"
    cells = [
        _small(claim["claim"], claim.get("note")),
        _escape(claim["paper_value"]),
        _small(f"{measured} {claim.get('unit') or ''}", claim.get("detail")),
        _chip(claim["verdict"], claim["verdict"]),
    ]
    return (
        f'<tr{" class=part" if part else ""}><th scope="row">{_escape(claim["id"])}</th>'
        + "".join(f"<td>{c}</td>" for c in cells)
        + "</tr>"
    )


def _small(text, remark):
    """Text, and a remark below it in small print."""
    return _escape(text) + (f"<small>{_escape(remark)}</small>" if remark else "")


def _thumbnail(entry, paper):
    """The notebook's first figure as an image with a data address, or nothing."""
    from PIL import Image

    nb = runner.read(entry["notebook"]) if entry["notebook"] else None
    for output in runner.outputs(nb) if nb else ():
        if "image/png" not in output.get("data", {}):
            continue
        picture = Image.open(io.BytesIO(base64.b64decode("".join(output["data"]["image/png"]))))
        picture = picture.convert("RGB")
        picture.thumbnail(THUMBNAIL)
        small = io.BytesIO()
        picture.quantize(64, dither=Image.Dither.NONE).save(small, "png", optimize=True)
        alt = output.get("metadata", {}).get("image/png", {}).get("alt")
        return (
            f'<img src="data:image/png;base64,{base64.b64encode(small.getvalue()).decode()}" '
            f'alt="{_escape(alt or f"First figure of {paper.title}")}" '
            f'width="{picture.width // 2}" height="{picture.height // 2}">'
        )
    return ""


def _number(value):
    return "" if value is None else value if isinstance(value, str) else f"{value:.4g}"


def _escape(text):
    return html.escape(str(text))
