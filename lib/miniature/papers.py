"""The bibliography: one BibTeX entry per paper in ``data/papers.bib``, key = slug.

`paper` looks one up, `all` lists the papers that have a notebook of their own, `entries` lists
every entry. Two versions of one paper share a notebook, so there is one entry more than papers.
"""

import functools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

_PROTECTED = re.compile(r"[\\{}]|``|''|--")


class UnknownPaper(KeyError):
    """No entry of ``data/papers.bib`` has this slug."""

    def __init__(self, slug, nearest=()):
        super().__init__(slug)
        self.slug = slug
        self.nearest = tuple(nearest)

    def __str__(self):  # KeyError would print the repr of its argument
        if self.nearest:
            return f"no paper {self.slug!r}; did you mean {' or '.join(map(repr, self.nearest))}?"
        return f"no paper {self.slug!r}; `miniature list` shows them all"


@dataclass(frozen=True)
class Paper:
    """One entry of the bibliography; a notebook shows it as a header.

    Attributes
    ----------
    slug : str
        BibTeX key, and name of the notebook.
    title : str
    authors : tuple of str
        In the paper's order. A last element ``"others"`` stands for authors not listed.
    year : int
    venue : str
        Conference, journal or ``"arXiv"``.
    arxiv : str or None
        arXiv identifier, such as ``"2302.10429"``.
    field : str
        The folder of ``notebooks/`` it belongs to.
    code : str or None
        Official repository on GitHub, ``"owner/name"``.
    note : str or None
        Remark on this version, such as a change of title.
    notebook : pathlib.Path
        Absolute path of the notebook; two versions of one paper share it.
    bibtex : str
        The entry as it stands in the file, for citing.
    """

    slug: str
    title: str
    authors: tuple
    year: int
    venue: str
    arxiv: str | None
    field: str
    code: str | None
    note: str | None
    notebook: Path = field(repr=False)  # absolute: not for a notebook's output
    bibtex: str = field(repr=False)

    @property
    def url(self):
        """Address of the abstract on arXiv, or None."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else None

    @property
    def code_url(self):
        """Address of the official repository, or None."""
        return f"https://github.com/{self.code}" if self.code else None

    @property
    def byline(self):
        """Authors as one string: all of them, or the listed ones and "et al."."""
        if self.authors[-1] == "others":
            return ", ".join(self.authors[:-1]) + " et al."
        if len(self.authors) == 1:
            return self.authors[0]
        return ", ".join(self.authors[:-1]) + " and " + self.authors[-1]

    def __str__(self):
        where = f" arXiv:{self.arxiv}" if self.arxiv else ""
        return f"{self.byline.rstrip('.')}. {self.title}. {self.venue} {self.year}.{where}"

    def _repr_markdown_(self):
        lines = [
            f"**{_escape(self.title)}**",
            f"{_escape(self.byline)}, *{self.venue}* {self.year}",
        ]
        if self.note:
            lines.append(_escape(self.note))
        links = []
        if self.url:
            links.append(f"[arXiv:{self.arxiv}]({self.url})")
        if self.code:
            links.append(f"[code: {_escape(self.code)}]({self.code_url})")
        if links:
            lines.append(" · ".join(links))
        return "  \n".join(lines)


def root():
    """Return the folder of the checkout that this package runs from.

    ``MINIATURE_ROOT`` in the environment overrides it.

    Raises
    ------
    FileNotFoundError
        If ``data/papers.bib`` is not in it: the package was installed without its checkout.
    """
    override = os.environ.get("MINIATURE_ROOT")
    folder = Path(override).expanduser() if override else Path(__file__).parents[2]
    folder = folder.resolve()
    if not (folder / "data" / "papers.bib").is_file():
        raise FileNotFoundError(
            f"{folder / 'data' / 'papers.bib'} does not exist: the notebooks and data live in a "
            "checkout; run `pip install -e .` there, or set MINIATURE_ROOT to its folder"
        )
    return folder


def paper(slug):
    """Return the entry with this slug.

    Parameters
    ----------
    slug : str
        BibTeX key, such as ``"fedspeed"``.

    Returns
    -------
    Paper

    Raises
    ------
    UnknownPaper
        If there is none; the message names the nearest ones.
    """
    known = _read(root())
    if slug not in known:
        raise UnknownPaper(slug, _nearest(str(slug), known))
    return known[slug]


def entries():
    """Return every entry as a list of `Paper`, in the order of the file."""
    return list(_read(root()).values())


def all():
    """Return the papers that have a notebook of their own, in the order of the file."""
    return [p for p in entries() if p.notebook.stem == p.slug]


def fields():
    """Return the fields, sorted by name."""
    return sorted({p.field for p in entries()})


@functools.lru_cache(maxsize=4)
def _read(folder):
    """Parse the bibliography of a checkout into {slug: Paper}."""
    import bibtexparser

    path = folder / "data" / "papers.bib"
    library = bibtexparser.parse_string(path.read_text(encoding="utf-8"))
    for block in library.failed_blocks:
        raise ValueError(f"{path}, line {block.start_line + 1}: {block.error}")
    return {e.key: _entry(e, folder, path) for e in library.entries}


def _entry(e, folder, path):
    value = {f.key.lower(): str(f.value) for f in e.fields}
    missing = [k for k in ("title", "author", "year", "keywords") if not value.get(k)]
    if missing:
        raise ValueError(f"{path}: entry {e.key!r} lacks {', '.join(missing)}")
    venue = next(
        (value[k] for k in ("booktitle", "journal", "howpublished") if k in value), "arXiv"
    )
    notebook = value.get("notebook", e.key)
    return Paper(
        slug=e.key,
        title=_plain(value["title"]),
        authors=tuple(_name(a) for a in re.split(r"\s+and\s+", value["author"])),
        year=int(value["year"]),
        venue=_plain(venue),
        arxiv=value.get("eprint") if value.get("archiveprefix") == "arXiv" else None,
        field=value["keywords"],
        code=value.get("code"),
        note=_plain(value["note"]) if "note" in value else None,
        notebook=folder / "notebooks" / value["keywords"] / f"{notebook}.ipynb",
        bibtex=e.raw.strip(),
    )


def _name(author):
    """Turn BibTeX's "Last, First" into "First Last"."""
    last, comma, first = author.partition(", ")
    return _plain(f"{first} {last}" if comma else author)


def _plain(text):
    """Decode LaTeX into plain text, and put it on one line."""
    text = " ".join(text.split())
    if text.startswith("{") and text.find("}") == len(text) - 1:
        text = text[1:-1]  # the common case by far, a title protected as a whole
    return _decoder().latex_to_text(text) if _PROTECTED.search(text) else text


@functools.lru_cache(maxsize=1)
def _decoder():
    from pylatexenc.latex2text import LatexNodes2Text  # comes with bibtexparser

    return LatexNodes2Text()


def _nearest(slug, known, n=3):
    """Slugs that contain the text, or whose title or arXiv identifier does, or spelled like it."""
    from difflib import get_close_matches

    wanted = slug.strip().lower()
    if not wanted:
        return []
    squeezed = re.sub(r"[\W_]+", "", wanted)
    found = []
    if squeezed:
        found += [s for s in known if squeezed in s.replace("_", "")]
        titles = {s: re.sub(r"[\W_]+", "", p.title.lower()) for s, p in known.items()}
        found += [s for s in known if len(squeezed) > 2 and squeezed in titles[s]]
        found += [s for s in known if known[s].arxiv and wanted == known[s].arxiv]
    found += get_close_matches(wanted, known, n=n, cutoff=0.6)
    by_title = {p.title.lower(): s for s, p in known.items()}
    found += [by_title[t] for t in get_close_matches(wanted, by_title, n=n, cutoff=0.6)]
    return list(dict.fromkeys(found))[:n]


def _escape(text):
    """Escape what Markdown or MathJax would interpret."""
    return re.sub(r"([\\`*_\[\]<>$|])", r"\\\1", text)
