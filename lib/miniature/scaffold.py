"""`miniature new`: the three files of a paper, to be filled in."""

import hashlib
import json
import re
import textwrap
from pathlib import Path
from string import Template

from . import papers
from . import run as runner

TEMPLATES = Path(__file__).parent / "templates"


def write(paper):
    """Write the method file, notebook and test of a paper from the templates.

    Parameters
    ----------
    paper : miniature.papers.Paper

    Returns
    -------
    list of pathlib.Path
        The files written.

    Raises
    ------
    FileExistsError
        If one of them is there already; then none is written.
    """
    root, field, slug = papers.root(), paper.field, paper.slug
    method = root / "lib" / "miniature" / field / f"{slug}.py"
    test = root / "tests" / field / f"test_{slug}.py"
    there = [p for p in (method, paper.notebook, test) if p.exists()]
    if there:
        names = ", ".join(str(p.relative_to(root)) for p in there)
        raise FileExistsError(f"already there, so nothing was written: {names}")
    title = paper.title.replace("\\", "").replace('"', "'")
    values = {
        "slug": slug,
        "field": field,
        "title": paper.title,
        "short": textwrap.shorten(title.split(":")[0], 90, placeholder=" ..."),
        "citation": textwrap.fill(str(paper).replace("\\", "").replace('"', "'"), 96),
        "class": "".join(part[:1].upper() + part[1:] for part in slug.split("_")),
    }
    runner.write_text(method, _filled("method.txt", values))
    runner.write_text(paper.notebook, json.dumps(_notebook(slug, values), indent=1))
    runner.write_text(test, _filled("test.txt", values))
    return [method, paper.notebook, test]


def _filled(name, values):
    return Template((TEMPLATES / name).read_text(encoding="utf-8")).substitute(values)


def _notebook(slug, values):
    """The notebook template, whose cells begin with ``# %%``, ``[markdown]`` or ``tags=``."""
    pieces = re.split(r"^# %%(.*)$", _filled("notebook.txt", values), flags=re.MULTILINE)[1:]
    cells = []
    for i, (head, source) in enumerate(zip(pieces[::2], pieces[1::2], strict=True)):
        tags = re.findall(r"tags=(\w+)", head)
        cell = {
            "cell_type": "markdown" if "[markdown]" in head else "code",
            "id": hashlib.sha256(f"{slug} {i}".encode()).hexdigest()[:8],
            "metadata": {"tags": tags} if tags else {},
            "source": source.strip().splitlines(keepends=True),
        }
        if cell["cell_type"] == "code":
            cell |= {"execution_count": None, "outputs": []}
        cells.append(cell)
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
