"""The front door finds papers."""

import pytest

from miniature import catalog, papers


def test_search_needs_all_words_and_ignores_case():
    found = catalog.find("FEDSPEED interval")
    assert [p.slug for p, _ in found] == ["fedspeed"]
    assert catalog.find("fedspeed nonsense") == []
    assert "No paper matches" in catalog.table([])


def test_filters():
    assert len(catalog.find()) == len(papers.all())
    theory = catalog.find(field="theory")
    assert {p.field for p, _ in theory} == {"theory"}
    finished, missing = catalog.find(status="finished"), catalog.find(status="not yet")
    assert len(finished) + len(missing) == len(papers.all())
    for _, entry in catalog.find(status="reproduced"):
        assert "reproduced" in entry["verdicts"].values()


def test_unknown_choices_are_named():
    with pytest.raises(ValueError, match="unknown field 'astrology'"):
        catalog.find(field="astrology")
    with pytest.raises(ValueError, match="unknown status 'good'"):
        catalog.find(status="good")


def test_finished_papers_link_to_their_notebook_and_the_rest_is_counted():
    for paper, entry in catalog.find():
        row = catalog.table([(paper, entry)])
        link = f'href="{paper.field}/{paper.slug}.ipynb"'
        assert (link in row) == (entry["status"] == "finished")
    assert f"{len(papers.all()) - 5} more" in catalog.table(catalog.find(), limit=5)


def test_browse_answers():
    import ipywidgets as w

    box = catalog.browse()
    text, field, status = box.children[0].children
    text.value, field.value, status.value = "fedspeed", "federated", "any"
    assert isinstance(box.children[1], w.Output)


def test_reading_paths_name_known_papers(capsys):
    with pytest.raises(papers.UnknownPaper):
        catalog.path("no_such_paper")
