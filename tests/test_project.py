"""One list of dependencies, two commands, and dependencies that point one way."""

import ast
import re
import tomllib

import pytest

from miniature import papers

ROOT = papers.root()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LIBRARY = sorted((ROOT / "lib/miniature").rglob("*.py"))


def name(requirement):
    return re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-")


def imports(path):
    """Top-level modules that a file imports, and miniature's own submodules, dotted."""
    package = path.relative_to(ROOT / "lib").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if not node.level:
                yield node.module
                continue
            base = ".".join(package[: len(package) - node.level + 1])
            base = f"{base}.{node.module}" if node.module else base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def test_environment_yml_has_no_list_of_its_own():
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    listed = re.findall(r"^ +- (.+)$", text, re.M)
    assert listed == ["conda-forge", f"python{PROJECT['requires-python']}", "pip", "pip:", "-e ."]


def test_makefile_installs_pyproject_and_a_torch_that_it_admits():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "-e ." in text and '-e ".[test]"' in text
    pin = re.search(r"^TORCH \?= torch==([\d.]+)$", text, re.M).group(1)
    (low,) = (r.split(">=")[1] for r in PROJECT["dependencies"] if name(r) == "torch")
    assert tuple(map(int, pin.split("."))) >= tuple(map(int, low.split(".")))
    installs = re.findall(r"pip install (.*)$", text, re.M)
    for line in installs:
        assert re.search(r"-e \"?\.", line) or line == "--upgrade pip", (
            f"a second list of dependencies: {line}"
        )


def test_every_dependency_has_a_lower_bound():
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    for requirement in (r for group in lists for r in group if not r.startswith("miniature[")):
        assert ">=" in requirement, requirement


def test_the_library_imports_no_oracle():
    oracles = {name(r).replace("-", "_") for r in PROJECT["optional-dependencies"]["oracles"]}
    for path in LIBRARY:
        found = {module.split(".")[0] for module in imports(path)} & oracles
        assert not found, f"{path.name} imports {found}"
    for path in (ROOT / "notebooks").rglob("*.ipynb"):
        for oracle in oracles:
            assert not re.search(rf"(import|from) {oracle}\b", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT / "lib/miniature")))
def test_dependencies_point_one_way(path):
    fields = set(papers.fields())
    own = path.relative_to(ROOT / "lib/miniature").parts[0]
    slugs = {p.slug for p in papers.entries()}
    for module in imports(path):
        parts = module.split(".")
        if parts[0] != "miniature" or len(parts) < 2 or parts[1] not in fields:
            continue
        assert own in fields, f"a shared module imports the field {parts[1]}"
        if parts[1] != own:
            assert not set(parts[2:]) & slugs, f"imports a method of another field: {module}"
