"""The command line: list, run, refresh, report, new, tune and record."""

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, NoReturn

import typer

from . import __version__, papers
from . import run as runner
from .scale import SCALES, write_json

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Research papers in miniature: run their notebooks, and see which claims hold.",
    epilog="Start with `miniature list` and `miniature run fedspeed`. "
    "Every command explains itself: `miniature run --help`.",
)


def _examples(*lines):
    """Help text with a command a line."""
    return "Examples:\n\n" + "\n".join(f"- `miniature {line}`" for line in lines)


DEVICES = ("auto", "cpu", "cuda")
BACKENDS = ("loky", "dask")
STATUSES = (
    "finished",
    "missing",
    "unrun",
    "reproduced",
    "inconclusive",
    "not reproduced",
)
STYLES = {"reproduced": "green", "inconclusive": "yellow", "not reproduced": "red"}

Slugs = Annotated[
    list[str] | None, typer.Argument(metavar="[SLUG]...", help="Papers, by their key.")
]
Slug = Annotated[str, typer.Argument(metavar="SLUG", help="The paper, by its key.")]
Field = Annotated[str | None, typer.Option(help="All papers of one field, such as federated.")]
All = Annotated[bool, typer.Option("--all", help="All papers that have a notebook.")]
Scale = Annotated[str, typer.Option(help="Profile: mini (seconds on a core) or full (a GPU).")]
Seed = Annotated[
    int, typer.Option(help="Shifts every random seed; verdicts should not depend on it.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Jobs = Annotated[
    int | None,
    typer.Option("-j", "--jobs", help="Kernels at a time. Default: one a core; 1 with cuda."),
]
Out = Annotated[Path, typer.Option(help="Folder for the executed notebooks.")]
Timeout = Annotated[float | None, typer.Option(help="Seconds that one notebook may take.")]


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
):
    if version:
        typer.echo(f"miniature {__version__}")
        raise typer.Exit()


@app.command(
    "list",
    epilog=_examples("list --field federated", "list --status 'not reproduced'", "list --json"),
)
def list_papers(
    field: Annotated[str | None, typer.Option(help="Only this field.")] = None,
    status: Annotated[
        str | None,
        typer.Option(
            help="Only papers whose notebook ran (finished), never ran (unrun) or is missing; "
            "with every claim reproduced; or with some claim inconclusive or 'not reproduced'."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
):
    """List the papers: notebook, verdict of each claim, run time."""
    known = _catalog()
    _check("field", field, (None, *papers.fields()))
    _check("status", status, (None, *STATUSES))
    entries = [runner.entry(p) for p in known if field in (None, p.field)]
    entries = [e for e in entries if status is None or _has_status(e, status)]
    if as_json:
        for e in entries:
            del e["record"]
        typer.echo(json.dumps(entries, indent=1, ensure_ascii=False))
        return
    table = _table("Paper", "Field", "Notebook", "Claims", "Seconds")
    for e in entries:
        table.add_row(
            e["slug"], e["field"], e["status"], _verdicts(e["verdicts"]), _seconds(e["seconds"])
        )
    console = _console()
    console.print(table)
    finished = sum(e["status"] == "finished" for e in entries)
    counts = [v for e in entries for v in e["verdicts"].values()]
    console.print(
        f"{len(entries)} papers, {finished} finished; {len(counts)} claims: "
        + ", ".join(f"{runner.SYMBOLS[v]} {counts.count(v)} {v}" for v in runner.VERDICTS),
        highlight=False,
    )


@app.command(
    epilog=_examples(
        "run fedspeed scaffold",
        "run --field federated -j 8 --resume",
        "run --all --control --out runs/control",
        "run fedspeed --scale full --device cuda --out runs/full",
        "run --all --backend dask --scheduler tcp://10.0.0.1:8786",
    )
)
def run(
    slugs: Slugs = None,
    field: Field = None,
    all_papers: All = False,
    scale: Scale = "mini",
    seed: Seed = 0,
    device: Device = "auto",
    control: Annotated[
        bool,
        typer.Option(
            "--control",
            help="Negative control: baselines in the methods' place. Exit code 1 if a comparison "
            "that involves the method is reproduced without it.",
        ),
    ] = False,
    jobs: Jobs = None,
    out: Out = Path("runs"),
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Skip notebooks whose output is there already, made by the same library sources, "
            "cells and parameters.",
        ),
    ] = False,
    timeout: Timeout = None,
    backend: Annotated[
        str, typer.Option(help="loky (processes of this machine) or dask.")
    ] = "loky",
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS", help="Dask scheduler, whose workers share this file system."
        ),
    ] = None,
):
    """Run notebooks headlessly, each in a kernel of its own with one thread.

    Executed notebooks and summary.json go to the folder --out, one configuration a folder.
    A notebook that fails is reported and kept as SLUG.failed.ipynb, and the others go on; the exit
    code is then 1. Ctrl-C ends the kernels and keeps what was done.
    """
    parameters = _parameters(scale, seed, device, control)
    _check("backend", backend, BACKENDS)
    if backend == "dask" and not scheduler:
        _fail("--backend dask needs --scheduler ADDRESS, such as tcp://10.0.0.1:8786")
    if scheduler and not re.fullmatch(r"(\w+://)?[^\s/]+:\d+", scheduler):
        _fail(f"scheduler {scheduler!r} is no address: use one such as tcp://10.0.0.1:8786")
    if scheduler and backend != "dask":
        _fail(f"--scheduler {scheduler} needs --backend dask")
    chosen = _chosen(slugs, field, all_papers)
    todo = [runner.make_job(p, out, parameters, timeout=timeout) for p in chosen]
    kept = list(filter(None, map(runner.kept, todo))) if resume else []
    done = {r.slug for r in kept}
    todo = [job for job in todo if job.slug not in done]
    started = time.monotonic()
    results = kept + _execute(todo, _n_jobs(jobs, device), backend, scheduler)
    _summarize(results)
    path = out / "summary.json"
    write_json(path, runner.summary(results, parameters, time.monotonic() - started))
    console = _console()
    console.print(f"Notebooks and {path.name} are in {out}.", highlight=False)
    unbroken = []
    if control:
        unbroken = [(r.slug, i) for r in results if r.record for i in runner.unbroken(r.record)]
        for slug, claim in unbroken:
            console.print(f"[red]{slug} {claim} is reproduced without its method.[/red]")
        if not unbroken:
            console.print("No comparison with a method is reproduced without it.")
    _exit(results, failed=bool(unbroken))


@app.command(epilog=_examples("refresh fedspeed scaffold", "refresh --field federated"))
def refresh(
    slugs: Slugs = None,
    field: Field = None,
    all_papers: All = False,
    jobs: Jobs = None,
    timeout: Timeout = None,
):
    """Run notebooks with their own parameters and store the outputs in them.

    Writes into notebooks/, whole or not at all. What a failing notebook had reached goes to
    runs/SLUG.failed.ipynb, and the notebook stays as it was. The indexes, of fields and of all
    papers, are run last, so that they show what is new.
    """

    def job(paper):
        return runner.make_job(paper, papers.root() / "runs", {}, in_place=True, timeout=timeout)

    results = _execute([job(p) for p in _chosen(slugs, field, all_papers)], _n_jobs(jobs, "auto"))
    folder = papers.root() / "notebooks"
    indexes = []
    for path in (*folder.glob("*/index.ipynb"), *folder.glob("index.ipynb")):
        slug = "-".join(path.relative_to(folder).with_suffix("").parts)
        indexes.append(SimpleNamespace(slug=slug, field="", notebook=path))
    results += _execute([job(index) for index in indexes], 1)
    _summarize(results)
    _exit(results)


@app.command(epilog=_examples("report", "report --from runs --out runs/report.html"))
def report(
    folder: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Folder of a run. Default: the committed notebooks.", metavar="DIR"
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
):
    """Write one HTML page with the verdicts of every paper: searchable, without network."""
    from . import report as page

    if folder is not None and not folder.is_dir():
        _fail(f"no folder {folder}: make one with `miniature run --all --out {folder}`")
    _catalog()
    entries = page.write(out, folder)
    finished = sum(e["status"] == "finished" for e in entries)
    typer.echo(f"{out}: {len(entries)} papers, {finished} finished")


@app.command(epilog=_examples("new fedspeed"))
def new(slug: Slug):
    """Start a paper: its method file, notebook and test, to be filled in."""
    from . import scaffold

    paper = _paper(slug)
    try:
        written = scaffold.write(paper)
    except FileExistsError as e:
        _fail(str(e))
    for path in written:
        typer.echo(path.relative_to(papers.root()))


@app.command(epilog=_examples("tune fedspeed", "tune fedspeed --scale full --device cuda"))
def tune(
    slug: Slug,
    scale: Scale = "mini",
    device: Device = "auto",
    timeout: Timeout = None,
):
    """Search a notebook's hyperparameters again, and record what was found.

    The record, data/results/SLUG.tuning.json, is what the notebook shows and uses. The notebook
    runs only as far as the search: results on evaluation seeds are not for choosing settings.
    """
    paper = _with_notebook(_paper(slug))
    parameters = _parameters(scale, 0, device, False)
    path = papers.root() / "data" / "results" / f"{paper.slug}.tuning.json"
    before = path.stat().st_mtime_ns if path.exists() else None
    folder = papers.root() / "runs" / "tune"
    job = runner.make_job(paper, folder, parameters, tune=True, timeout=timeout)
    results = _execute([job], 1)
    if results[0].status != "done":
        _exit(results)
    if not path.exists() or path.stat().st_mtime_ns == before:
        _fail(f"{paper.slug} recorded no search: its notebook does not call run.tuned(tune)", 1)
    record = json.loads(path.read_text(encoding="utf-8"))[scale]
    best = max if record["higher_is_better"] else min
    table = _table("Method", "Chosen", f"Best mean {record['metric']}")
    for name, method in record["methods"].items():
        means = [sum(s) / len(s) for s in method["scores"].values()]
        chosen = ", ".join(f"{k} = {v}" for k, v in method["chosen"].items())
        table.add_row(name, chosen, f"{best(means):.4g}")
    _console().print(table)
    typer.echo(
        f"Recorded in {path.relative_to(papers.root())}. Now `miniature refresh {paper.slug}`."
    )


@app.command(
    epilog=_examples(
        "record fedspeed --device cuda", "record fedspeed --from runs/full/fedspeed.ipynb"
    )
)
def record(
    slug: Slug,
    device: Device = "auto",
    notebook: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="NOTEBOOK",
            help="Take this notebook, executed by `miniature run --scale full`.",
        ),
    ] = None,
    timeout: Timeout = None,
):
    """Record a paper's full-scale results.

    Writes claims, hardware, versions, date and time to data/results/SLUG.json, which the notebook
    shows.
    """
    paper = _paper(slug)
    if notebook is None:
        parameters = _parameters("full", 0, device, False)
        folder = papers.root() / "runs" / "full"
        job = runner.make_job(_with_notebook(paper), folder, parameters, timeout=timeout)
        results = _execute([job], 1)
        if results[0].status != "done":
            _exit(results)
        _summarize(results)
        notebook = job.output
    try:
        value = runner.full_scale_record(paper.slug, notebook)
    except ValueError as e:
        _fail(str(e))
    path = papers.root() / "data" / "results" / f"{paper.slug}.json"
    write_json(path, value)
    typer.echo(f"Recorded in {path.relative_to(papers.root())}.")


# What the commands share


def _fail(message, code=2) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(code)


def _check(name, value, known):
    if value not in known:
        right = ", ".join(str(k) for k in known if k is not None)
        _fail(f"unknown {name} {value!r}: use one of {right}")


def _catalog():
    """Every paper that has a notebook of its own."""
    try:
        return papers.all()
    except (FileNotFoundError, ValueError) as e:  # no checkout, or a bibliography that is broken
        _fail(str(e))


def _paper(slug):
    """The paper whose notebook covers this entry of the bibliography."""
    _catalog()
    try:
        return papers.paper(papers.paper(slug).notebook.stem)
    except papers.UnknownPaper as e:
        _fail(str(e))


def _with_notebook(paper):
    if runner.read(paper.notebook) is None:
        path = paper.notebook.relative_to(papers.root())
        _fail(
            f"{path} is not a notebook: expected JSON with a list of cells"
            if paper.notebook.exists()
            else f"paper {paper.slug!r} has no notebook yet: `miniature new {paper.slug}` "
            f"starts {path}"
        )
    return paper


def _chosen(slugs, field, all_papers):
    """The papers that the arguments of a command name, each with a notebook."""
    if sum(map(bool, (slugs, field, all_papers))) != 1:
        _fail("name papers, or give --field FIELD, or --all (one of the three)")
    if slugs:
        return [_with_notebook(p) for p in dict.fromkeys(map(_paper, slugs))]
    known = _catalog()
    if field:
        _check("field", field, papers.fields())
    chosen = [p for p in known if field in (None, p.field) and p.notebook.exists()]
    if not chosen:
        _fail(f"no paper of {field or 'any field'} has a notebook yet")
    return [_with_notebook(p) for p in chosen]


def _parameters(scale, seed, device, control):
    """Papermill parameters, checked before any kernel starts."""
    _check("scale", scale, SCALES)
    _check("device", device, DEVICES)
    if not 0 <= seed < 10**6:
        _fail(f"--seed must be from 0 to 999999, got {seed}")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            _fail("--device cuda, but torch sees no CUDA device here: use cpu or auto")
    return {"scale": scale, "seed": seed, "device": device, "control": control}


def _n_jobs(jobs, device):
    if jobs is not None and jobs < 1:
        _fail(f"-j must be at least 1, got {jobs}")
    if jobs is None and device != "cuda":  # kernels would compete for the memory of one GPU
        import joblib

        return joblib.cpu_count()
    return jobs or 1


def _execute(jobs, n_jobs, backend="loky", scheduler=None):
    """Run jobs under a progress bar; report each failure as it comes."""
    from rich import progress

    if not jobs:
        return []
    # Time left is told by what each notebook took when it was last refreshed.
    cost = {job.slug: _stamped_seconds(job.source) for job in jobs}
    results = []
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    console = _console(stderr=True)
    with progress.Progress(*columns, console=console, speed_estimate_period=3600) as bar:
        task = bar.add_task(f"0 of {len(jobs)} notebooks", total=sum(cost.values()))
        try:
            for result in runner.execute_all(jobs, n_jobs, backend, scheduler):
                results.append(result)
                if result.status == "failed":
                    _report_failure(bar.console, result)
                elif result.status == "done":
                    bar.console.print(*_line(result), highlight=False)
                bar.update(
                    task,
                    advance=cost[result.slug],
                    description=f"{len(results)} of {len(jobs)} notebooks",
                )
        except (ModuleNotFoundError, ValueError) as e:  # dask missing, or no scheduler there
            _fail(str(e))
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
    return results


def _stamped_seconds(path):
    return (runner.read(path) or {}).get("metadata", {}).get("miniature", {}).get("seconds") or 10


def _line(result):
    verdicts = {c["id"]: c["verdict"] for c in result.record["claims"]} if result.record else {}
    return f"{result.slug}: {_seconds(result.seconds)} s", _verdicts(verdicts)


def _report_failure(console, result):
    """Print the cell that failed, and its error."""
    from rich.panel import Panel
    from rich.text import Text

    error = result.error
    cell = f" in cell [{error['cell']}]" if error["cell"] else ""
    text = Text(error["source"] + "\n\n" if error["source"] else "")
    text.append(f"{error['name']}: {error['message']}", "bold red")
    if result.notebook:
        text.append(f"\n{result.notebook}", "dim")
    console.print(
        Panel(text, title=f"{result.slug} failed{cell}", title_align="left", border_style="red")
    )


def _summarize(results):
    table = _table("Paper", "Status", "Claims", "Seconds")
    for r in sorted(results, key=lambda r: (r.field, r.slug)):
        claims = r.record["claims"] if r.record else []
        verdicts = {c["id"]: c["verdict"] for c in claims}
        style = {"failed": "red", "interrupted": "yellow"}.get(r.status, "")
        table.add_row(r.slug, r.status, _verdicts(verdicts), _seconds(r.seconds), style=style)
    _console().print(table)


def _exit(results, failed=False):
    statuses = {r.status for r in results}
    if "interrupted" in statuses:
        typer.echo("Interrupted.", err=True)
        raise typer.Exit(130)
    if "failed" in statuses or failed:
        raise typer.Exit(1)


def _has_status(entry, status):
    verdicts = list(entry["verdicts"].values())
    if status == "reproduced":
        return bool(verdicts) and set(verdicts) == {"reproduced"}
    return status == entry["status"] or status in verdicts


def _verdicts(verdicts):
    """Claims and verdicts as text in color: ``C1 ✓  C2 ✗``."""
    from rich.text import Text

    parts = [(f"{i} {runner.SYMBOLS[v]}", STYLES[v]) for i, v in verdicts.items()]
    return Text("  ").join(Text(*p) for p in parts)


def _seconds(seconds):
    return "" if seconds is None else f"{seconds:.1f}"


def _table(*columns):
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for name in columns:
        table.add_column(name, justify="right" if name == "Seconds" else "left")
    return table


def _console(stderr=False):
    from rich.console import Console

    console = Console(stderr=stderr)
    # Nothing wraps in a file or a pipe, where there is no width to keep.
    return console if console.is_terminal else Console(stderr=stderr, width=160)
