import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from miniature import papers

SHIPPED = Path(__file__).resolve().parents[1]
BIB = """
% a comment
@inproceedings{first_one,
  title = {{A {GPT} \\& a Title: 50\\% -- done}},
  author = {Sch{\\"o}lkopf, B. and {van Trees and Sons} and de Vos},
  year = {2024},
  booktitle = {ICLR},
  eprint = {2401.00001},
  archivePrefix = {arXiv},
  keywords = {theory},
  code = {owner/na_me},
  note = {Published as ``Another''},
}
@misc{second_one,
  title = {Plain},
  author = {Doe and others},
  year = 2023,
  keywords = {theory},
  notebook = {first_one},
}
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with a bibliography of its own; returns the path of that file."""
    (tmp_path / "data").mkdir()
    bib = tmp_path / "data" / "papers.bib"
    bib.write_text(BIB, encoding="utf-8")
    monkeypatch.setenv("MINIATURE_ROOT", str(tmp_path))
    papers._read.cache_clear()
    yield bib
    papers._read.cache_clear()


def test_the_bibliography_is_complete():
    entries = papers.entries()
    assert len(entries) == 287
    assert len(papers.all()) == 286
    assert len({p.slug for p in entries}) == 287
    assert papers.fields() == sorted(
        "continual distributed federated generative merging peft science sequence theory "
        "training".split()
    )


@pytest.mark.parametrize("p", papers.entries(), ids=lambda p: p.slug)
def test_every_entry_is_clean(p):
    assert re.fullmatch(r"[a-z0-9_]+", p.slug)
    assert p.title and p.title == p.title.strip() and not set(p.title) & set("{}\\\n#")
    assert p.authors and p.authors[0] != "others"
    assert all(a and not set(a) & set("{}\\\n,()#") for a in p.authors)
    assert not any("et al" in a for a in p.authors)
    assert 2010 <= p.year <= 2026
    assert p.venue and "(by memory)" not in p.venue and not re.search(r"\d{4}", p.venue)
    assert p.note is None or "memory" not in p.note
    assert re.fullmatch(r"\d{4}\.\d{5}", p.arxiv) or re.fullmatch(r"\d{4}\.\d{4}", p.arxiv)
    assert p.url == f"https://arxiv.org/abs/{p.arxiv}"
    assert p.code is None or re.fullmatch(r"[\w.-]+/[\w.-]+", p.code)
    assert p.notebook.parent == SHIPPED / "notebooks" / p.field
    assert "\n" not in str(p) and p.title in str(p) and str(p.year) in str(p)
    assert p.bibtex.startswith("@") and f"{{{p.slug}," in p.bibtex


def test_no_two_entries_are_the_same_paper():
    titles = [p.title.lower() for p in papers.entries()]
    arxiv = [p.arxiv for p in papers.entries()]
    assert len(set(titles)) == len(titles)
    assert len(set(arxiv)) == len(arxiv)


def test_two_versions_share_a_notebook():
    first, main = papers.paper("video_salmonn2_rebirth"), papers.paper("video_salmonn2_mrdpo")
    assert first.notebook == main.notebook and main.notebook.stem == "video_salmonn2_mrdpo"
    assert main in papers.all() and first not in papers.all()


def test_one_entry_in_full():
    p = papers.paper("fedspeed")
    assert p.title.startswith("FedSpeed: Larger Local Interval, Less Communication Round")
    assert p.authors == ("Sun", "others") and p.byline == "Sun et al."
    assert (p.year, p.venue, p.arxiv, p.field) == (2023, "ICLR", "2302.10429", "federated")
    assert p.code_url == "https://github.com/woodenchild95/FL-Simulator"
    assert str(p).startswith("Sun et al. FedSpeed: ") and str(p).endswith(
        "ICLR 2023. arXiv:2302.10429"
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.year = 2000


def test_markdown_header():
    header = papers.paper("fedspeed")._repr_markdown_()
    assert header.startswith("**FedSpeed:")
    assert "(https://arxiv.org/abs/2302.10429)" in header
    assert "(https://github.com/woodenchild95/FL-Simulator)" in header
    assert "*ICLR* 2023" in header
    without_code = papers.paper("ffa_lora")
    assert without_code.code is None and without_code.code_url is None
    assert "github" not in without_code._repr_markdown_()


def test_latex_is_decoded(checkout):
    p = papers.paper("first_one")
    assert p.title == "A GPT & a Title: 50% – done"
    assert p.authors[0] == "B. Schölkopf"
    assert p.note == "Published as “Another”"
    assert "owner/na\\_me" in p._repr_markdown_()  # or Markdown could read it as emphasis
    assert "https://github.com/owner/na_me)" in p._repr_markdown_()


def test_optional_fields(checkout):
    p = papers.paper("second_one")
    assert (p.venue, p.year, p.arxiv, p.url, p.code, p.note) == (
        "arXiv",
        2023,
        None,
        None,
        None,
        None,
    )
    assert p._repr_markdown_() == "**Plain**  \nDoe et al., *arXiv* 2023"
    assert [q.slug for q in papers.all()] == ["first_one"]


def test_bylines():
    def byline(*authors):
        return dataclasses.replace(papers.paper("fedspeed"), authors=authors).byline

    assert byline("A") == "A"
    assert byline("A", "B") == "A and B"
    assert byline("A", "B", "C") == "A, B and C"
    assert byline("A", "B", "others") == "A, B et al."


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("fedsped", "fedspeed"),
        ("FedSpeed", "fedspeed"),
        ("lora-sb", "lora_sb"),
        ("symbolic discovery", "lion"),
        ("2302.10429", "fedspeed"),
        ("Efficent approximate nearest neighbor search using HNSW graphs", "hnsw"),
    ],
)
def test_unknown_paper_names_the_nearest(wrong, right):
    with pytest.raises(papers.UnknownPaper) as caught:
        papers.paper(wrong)
    error = caught.value
    assert isinstance(error, KeyError)
    assert error.slug == wrong
    assert right in error.nearest and repr(right) in str(error)
    assert str(error).startswith(f"no paper {wrong!r}")  # a sentence, not the repr of one


@pytest.mark.parametrize("wrong", ["zzqqxxzz", "", "   ", 3.5])
def test_unknown_paper_without_anything_near(wrong):
    with pytest.raises(papers.UnknownPaper, match=r"no paper .*miniature list"):
        papers.paper(wrong)


def test_the_lists_are_the_callers_own():
    papers.entries().clear()
    papers.all().clear()
    assert len(papers.entries()) == 287


def test_root(monkeypatch, tmp_path):
    monkeypatch.delenv("MINIATURE_ROOT", raising=False)
    assert papers.root() == SHIPPED
    monkeypatch.setenv("MINIATURE_ROOT", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"papers\.bib does not exist.*pip install -e"):
        papers.root()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("year = 2023,\n", "", r"entry 'second_one' lacks year"),
        ("{second_one", "{first_one", r"papers\.bib, line \d+"),
    ],
)
def test_a_broken_bibliography_says_where(checkout, old, new, message):
    checkout.write_text(checkout.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        papers.entries()


def test_importing_stays_light():
    code = (
        "import sys, miniature.papers as p; p.paper('fedspeed'); "
        "sys.exit(bool({'torch', 'numpy', 'scipy', 'IPython'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
