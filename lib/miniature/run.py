"""Headless execution: notebooks through papermill, and what they recorded.

A `Job` is one notebook with its parameters, `execute` runs it in a kernel of its own with one
thread, and `execute_all` runs many, one kernel a core. Nothing here prints: `miniature.cli` does.
Results are read back as plain JSON (`read`, `claims`, `entry`), so that listing papers starts no
kernel and imports neither torch nor nbformat.
"""

import contextlib
import contextvars
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

from . import __version__, papers

MIME = "application/vnd.miniature.claims+json"
VERDICTS = ("reproduced", "inconclusive", "not reproduced")
SYMBOLS = {"reproduced": "✓", "inconclusive": "~", "not reproduced": "✗"}
_WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
_WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
_MAX_WIDGET_STATE = 200_000  # characters of JSON; beyond it a notebook keeps only the figures

# One thread a kernel: notebooks share the machine by cores, and their times stay comparable.
ONE_THREAD = {
    name: "1"
    for name in (
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "BLIS_NUM_THREADS",
        "VECLIB_MAXIMUM_THREADS",
        "NUMEXPR_NUM_THREADS",
        "NUMBA_NUM_THREADS",
    )
}


@dataclass(frozen=True)
class Job:
    """One notebook to execute.

    Attributes
    ----------
    slug, field : str
    source : pathlib.Path
        The notebook. It is only read, unless it is `output` too.
    output, failed : pathlib.Path
        Where the executed notebook goes, and where what a failed one had left goes.
    parameters : dict
        Injected by papermill after the cell tagged ``parameters``; empty keeps the defaults.
    key : str
        What the result depends on (`job_key`); stamped into the output for ``--resume``.
    stop : pathlib.Path
        While this file exists, the job ends as soon as it can.
    owner : int
        Process that made the job, and that decides what Ctrl-C does.
    root : pathlib.Path
        The project.
    tune : bool
        Search hyperparameters again: run up to and with the cell that calls ``run.tuned``, and
        record what it finds. Nobody sees results on evaluation seeds while tuning.
    timeout : float or None
        Seconds the whole notebook may take.
    in_place : bool
        Write the output fit for committing: without papermill's metadata, the same from run to run.
    """

    slug: str
    field: str
    source: Path
    output: Path
    failed: Path
    parameters: dict
    key: str
    stop: Path
    owner: int
    root: Path
    tune: bool = False
    timeout: float | None = None
    in_place: bool = False


@dataclass
class Result:
    """How a job ended.

    Attributes
    ----------
    status : {"done", "kept", "failed", "interrupted"}
        ``kept``: an earlier output with the same key was there already.
    seconds : float or None
        Wall time of the kernel from its start to its end.
    record : dict or None
        The notebook's claims record.
    error : dict or None
        Of a failed notebook: ``cell`` (execution count or None), ``source``, ``name``, ``message``,
        ``traceback``.
    notebook : str or None
        The file written.
    """

    slug: str
    field: str
    status: str
    seconds: float | None = None
    record: dict | None = None
    error: dict | None = None
    notebook: str | None = None


# Reading what notebooks recorded


def read(path):
    """Return a notebook file as a dict, or None where there is none that parses."""
    try:
        nb = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return nb if isinstance(nb, dict) and isinstance(nb.get("cells"), list) else None


def outputs(nb):
    """Yield every cell output of a notebook, in order."""
    for cell in nb["cells"]:
        yield from cell.get("outputs", ())


def last(nb, mime):
    """Return the last output of a MIME type in a notebook, or None."""
    records = [o["data"][mime] for o in outputs(nb) if mime in o.get("data", {})]
    return records[-1] if records else None


def claims(nb):
    """Return the claims record in a notebook's outputs, or None."""
    return last(nb, MIME)


def unbroken(record):
    """Return the ids of the claims and parts that a negative control should have broken.

    Parameters
    ----------
    record : dict
        Claims record of a notebook that ran with ``control=True``.

    Returns
    -------
    list of str
        Ids of comparisons that involve the method under test and were reproduced without it.
    """
    lines = [c for claim in record["claims"] for c in (claim, *(claim.get("parts") or ()))]
    return [c["id"] for c in lines if c.get("control") and c["verdict"] == "reproduced"]


def entry(paper, folder=None):
    """Return what is known about one paper, for the list and the report.

    Parameters
    ----------
    paper : miniature.papers.Paper
    folder : path-like, optional
        Take the notebook that `miniature run` wrote there instead of the committed one.

    Returns
    -------
    dict
        ``slug, field, title, notebook`` (path or None), ``status`` (``missing``, ``failed``,
        ``unrun`` or ``finished``), ``seconds``, ``scale``, ``verdicts`` {claim id: verdict} and
        ``record``.
    """
    path = Path(folder) / paper.notebook.name if folder else paper.notebook
    nb = read(path)
    record = claims(nb) if nb else None
    status = "missing" if nb is None else "finished" if record else "unrun"
    if folder and _failed_path(folder, paper.slug).exists():
        # An output beside it comes from an earlier run, and no longer counts.
        path = _failed_path(folder, paper.slug)
        nb, record, status = None, None, "failed"
    stamp = nb["metadata"].get("miniature", {}) if nb else {}
    return {
        "slug": paper.slug,
        "field": paper.field,
        "title": paper.title,
        "notebook": None if status == "missing" else str(path),
        "status": status,
        # Of one core where that is what was used: a busy machine stretches the wall clock.
        "seconds": min(
            filter(None, (stamp.get(k) for k in ("cpu_seconds", "seconds"))), default=None
        ),
        "scale": record["scale"] if record else None,
        "verdicts": {c["id"]: c["verdict"] for c in record["claims"]} if record else {},
        "record": record,
    }


# Making jobs


@functools.lru_cache(maxsize=1)
def library_hash():
    """Return a hash over the sources of this package."""
    folder = Path(__file__).parent
    digest = hashlib.sha256(__version__.encode())
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def job_key(paper, parameters):
    """Return a hash of everything a notebook's result depends on.

    These are the library's sources, the source of every cell, the parameters, and the paper's
    recorded hyperparameter search.
    """
    nb = read(paper.notebook)
    tuning = papers.root() / "data" / "results" / f"{paper.slug}.tuning.json"
    parts = [
        library_hash(),
        [[c["cell_type"], "".join(c["source"])] for c in nb["cells"]],
        parameters,
        tuning.read_text(encoding="utf-8") if tuning.exists() else None,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def make_job(paper, folder, parameters, *, in_place=False, tune=False, timeout=None):
    """Return the `Job` that runs a paper's notebook.

    Parameters
    ----------
    paper : miniature.papers.Paper
        Its notebook must exist.
    folder : path-like
        For the output, and for what is left of a failed run.
    parameters : dict
        Papermill parameters; empty keeps the notebook's own.
    in_place : bool
        Write the output over the notebook itself.
    tune : bool
        Search hyperparameters and record them, instead of running the whole notebook.
    timeout : float, optional
        Seconds.
    """
    folder = Path(folder).resolve()
    return Job(
        slug=paper.slug,
        field=paper.field,
        source=paper.notebook,
        output=paper.notebook if in_place else folder / f"{paper.slug}.ipynb",
        failed=_failed_path(folder, paper.slug),
        parameters=parameters,
        key=job_key(paper, parameters),
        stop=folder / f".stop-{os.getpid()}",
        owner=os.getpid(),
        root=papers.root(),
        tune=tune,
        timeout=timeout,
        in_place=in_place,
    )


def kept(job):
    """Return the result of an earlier run of the same job, or None."""
    nb = read(job.output)
    stamp = nb["metadata"].get("miniature", {}) if nb else {}
    if stamp.get("key") != job.key or job.failed.exists():
        return None
    return Result(
        job.slug, job.field, "kept", stamp["seconds"], claims(nb), notebook=str(job.output)
    )


def _failed_path(folder, slug):
    return Path(folder) / f"{slug}.failed.ipynb"


# Executing


def execute_all(jobs, n_jobs=1, backend="loky", scheduler=None):
    """Run jobs in parallel and yield each `Result` as it comes.

    A notebook that fails does not end the others. The first Ctrl-C (or SIGTERM) ends every kernel;
    the jobs then yield results with the status ``interrupted``. A second one raises
    `KeyboardInterrupt`.

    Parameters
    ----------
    jobs : list of Job
    n_jobs : int
        Kernels at a time; with dask, as many as the cluster has threads.
    backend : {"loky", "dask"}
    scheduler : str, optional
        Address of the dask scheduler. Its workers need this package and the same file system.

    Raises
    ------
    ModuleNotFoundError
        If dask is asked for and not installed.
    ValueError
        If there is no dask scheduler at this address.
    """
    from concurrent.futures.process import BrokenProcessPool

    import joblib

    if not jobs:
        return
    for job in jobs:
        job.failed.parent.mkdir(parents=True, exist_ok=True)
    with _stoppable(jobs[0].stop), _connected(backend, scheduler) as config:
        parallel = joblib.Parallel(
            n_jobs=min(n_jobs, len(jobs)) if backend == "loky" else -1,
            return_as="generator_unordered",
            batch_size=1,
            **config,
        )
        left = {job.slug: job for job in jobs}
        try:
            for result in parallel(joblib.delayed(execute)(job) for job in jobs):
                del left[result.slug]
                yield result
        except BrokenProcessPool as e:  # a worker was killed, or caught Ctrl-C as it started
            for job in left.values():
                result = Result(job.slug, job.field, "interrupted")
                if not job.stop.exists():
                    result.status = "failed"
                    result.error = _describe(None, "BrokenProcessPool", "a worker process died")
                    result.error["traceback"] = str(e)
                yield result
        finally:
            _rescue(jobs)


def _rescue(jobs):
    """Keep what killed workers had reached as failed notebooks, and clean up after them."""
    for runtime in Path(tempfile.gettempdir()).glob(f"miniature-{jobs[0].owner}-*"):
        shutil.rmtree(runtime, ignore_errors=True)
    for job in jobs:
        for partial in job.failed.parent.glob(f".{job.slug}.*.part.ipynb"):
            if read(partial):
                os.replace(partial, job.failed)
            else:
                partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _connected(backend, scheduler):
    """The arguments that make `joblib.Parallel` use this backend."""
    if backend == "loky":
        yield {"backend": "loky"}
        return
    try:
        from distributed import Client
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "the dask backend needs dask: run `pip install 'miniature[dask]'`"
        ) from None
    import joblib

    try:
        client = Client(scheduler, timeout="10s", set_as_default=False)
    except (OSError, ValueError, TypeError) as e:
        raise ValueError(
            f"no dask scheduler answers at {scheduler!r} ({e}): give the address that "
            "`dask scheduler` prints, such as tcp://10.0.0.1:8786"
        ) from None
    with client, joblib.parallel_config(backend="dask", client=client):
        yield {}


@contextlib.contextmanager
def _stoppable(stop):
    """Turn the first SIGINT or SIGTERM into the file `stop`, which every job looks for."""

    def on_signal(number, frame):
        if stop.exists():
            raise KeyboardInterrupt
        stop.touch()

    stop.unlink(missing_ok=True)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(n, on_signal) for n in numbers]
    try:
        yield
    finally:
        for n, handler in zip(numbers, before, strict=True):
            signal.signal(n, handler)
        stop.unlink(missing_ok=True)


def execute(job):
    """Run one job in a kernel of this interpreter and return its `Result`.

    No output is ever half written: papermill works on a temporary file beside ``job.failed``, which
    becomes the output when the notebook has finished, or ``job.failed`` when it has not.
    """
    if job.stop.exists():
        return Result(job.slug, job.field, "interrupted")
    if os.getpid() != job.owner:  # Ctrl-C reaches every process of a terminal
        with contextlib.suppress(ValueError):  # a thread, of a dask worker
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    import logging

    import nbformat
    import papermill  # noqa: F401  takes a second, which is not the notebook's

    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # errors are in the result
    runtime = Path(tempfile.mkdtemp(prefix=f"miniature-{job.owner}-"))
    partial = job.failed.with_name(f".{job.slug}.{os.getpid()}.part.ipynb")
    watch = _Watch(job, runtime, partial)
    result = Result(job.slug, job.field, "failed")
    try:
        write_text(partial, nbformat.writes(_prepared(job)))
        started = time.perf_counter()
        with watch:
            try:
                # In an empty context: jupyter keeps its event loop in a context variable, which
                # dask would share between the threads of a worker.
                nb = contextvars.Context().run(_execute_notebook, job, partial, watch)
            finally:
                result.seconds = round(time.perf_counter() - started, 1)
        nb = _finished(nb, job, result.seconds, watch.cpu_seconds)
        write_text(job.output, nbformat.writes(nb))
        result.status, result.record = "done", claims(nb)
        result.notebook = str(job.output)
        job.failed.unlink(missing_ok=True)
    except Exception as e:  # a notebook may fail in any way; the others go on
        result.error = watch.error or _error(e, partial, watch.log)
        if watch.stopped:
            result.status, result.error = "interrupted", None
        if read(partial):
            os.replace(partial, job.failed)
            result.notebook = str(job.failed)
    finally:
        partial.unlink(missing_ok=True)
        shutil.rmtree(runtime, ignore_errors=True)
    return result


def _execute_notebook(job, partial, watch):
    """Run papermill on `partial`, in place, with an event loop of its own."""
    import asyncio

    import papermill
    from jupyter_core.utils import ensure_event_loop

    loop = ensure_event_loop()
    try:
        return papermill.execute_notebook(
            str(partial),
            str(partial),
            parameters=job.parameters,
            kernel_name="python3",
            language="python",
            progress_bar=False,
            autosave_cell_every=0,
            start_timeout=120,  # on a machine where every core is busy
            iopub_timeout=60,
            kernel_manager_class=watch.manager_class(),
            resources={"metadata": {"path": str(job.source.parent)}},
        )
    finally:
        loop.close()
        asyncio.set_event_loop(None)


class _Watch(threading.Thread):
    """Watch one kernel, and kill it when the run is stopped or its time is over.

    nbclient notices a dead kernel within a second and raises, so that no thread has to be killed.
    """

    def __init__(self, job, runtime, partial):
        super().__init__(daemon=True)
        self.job, self.runtime, self.partial = job, runtime, partial
        self.log = runtime / "stderr"
        self.stopped, self.error, self.cpu_seconds = False, None, None
        self._done = threading.Event()
        self._managers = []

    def manager_class(self):
        """A kernel manager that starts this very interpreter, with this job's environment."""
        from jupyter_client import AsyncKernelManager
        from jupyter_client.kernelspec import KernelSpec

        watch = self

        class Manager(AsyncKernelManager):
            def __init__(self, **kwargs):
                # Sockets in a private folder: TCP ports chosen by two kernels at once can collide.
                if os.name == "posix":
                    kwargs |= {"transport": "ipc"}
                super().__init__(connection_file=str(watch.runtime / "kernel.json"), **kwargs)
                self._kernel_spec = KernelSpec(
                    argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                    display_name="Python 3 (ipykernel)",
                    language="python",
                    # A fixed hash seed: sets come in the same order, and outputs stay the same.
                    env={
                        **ONE_THREAD,
                        "PYTHONHASHSEED": "0",
                        "MINIATURE_ROOT": str(watch.job.root),
                        "MINIATURE_TUNE": "1" if watch.job.tune else "0",
                    },
                )
                watch._managers.append(self)

            def client(self, **kwargs):
                client = super().client(**kwargs)
                client.shell_channel_class = client.iopub_channel_class = _patient_channel()
                return client

            async def start_kernel(self, **kwargs):
                # What a kernel says outside its cells matters only where it cannot start.
                with open(watch.log, "wb") as log:
                    await super().start_kernel(stderr=log, **kwargs)

            async def shutdown_kernel(self, now=False, restart=False):
                watch.note_cpu_time()
                # Everything has been received: an interpreter with torch would take seconds to
                # tear itself down, and processes that its cells left behind should go with it.
                watch._kill()
                await super().shutdown_kernel(now=True, restart=restart)

        return Manager

    def __enter__(self):
        self._deadline = time.monotonic() + (self.job.timeout or float("inf"))
        self.start()

    def __exit__(self, *exception):
        self._done.set()
        self.join()

    def run(self):
        while not self._done.wait(0.2):
            self.stopped = self.stopped or self.job.stop.exists()
            late = time.monotonic() > self._deadline
            if late and not self.error:
                message = f"took longer than {self.job.timeout:g} s"
                self.error = _describe(_running(self.partial), "TimeoutError", message)
            if self.stopped or late:
                self._kill()

    def note_cpu_time(self):
        """Note what the kernel has computed: unlike wall time, the same on a busy machine."""
        import psutil

        for manager in self._managers:
            with contextlib.suppress(psutil.Error, AttributeError):
                times = psutil.Process(manager.provisioner.process.pid).cpu_times()
                self.cpu_seconds = round(times.user + times.system, 1)

    def _kill(self):
        for manager in self._managers:
            process = getattr(manager.provisioner, "process", None)
            if process is None or process.poll() is not None:
                continue
            with contextlib.suppress(OSError):
                if os.name == "posix":  # the kernel leads its own process group
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    process.kill()


@functools.lru_cache(maxsize=1)
def _patient_channel():
    """A kernel channel that looks again each second.

    nbclient answers widgets on the socket on which it awaits the cell's reply. Sending there can
    swallow the socket's wake-up, and the reply would then lie unread for ever.
    """
    import queue

    from jupyter_client.channels import AsyncZMQSocketChannel

    class PatientChannel(AsyncZMQSocketChannel):
        async def get_msg(self, timeout=None):
            end = float("inf") if timeout is None else time.monotonic() + timeout
            while True:
                left = end - time.monotonic()
                try:
                    return await super().get_msg(min(1.0, max(0.0, left)))
                except queue.Empty:
                    if left <= 1.0:
                        raise

    return PatientChannel


def _prepared(job):
    """The notebook to execute: cell ids in place, this interpreter's kernel named."""
    import nbformat

    nb = read(job.source)
    if nb is None:
        raise ValueError(f"{job.source} is not a notebook: expected JSON with a list of cells")
    if nb.get("nbformat") != 4:
        raise ValueError(f"{job.source} has notebook format {nb.get('nbformat')}: expected 4")
    tags = [t for cell in nb["cells"] for t in cell["metadata"].get("tags", ())]
    if job.parameters and "parameters" not in tags:
        # papermill would put them first, and the notebook's own values would win
        raise ValueError(f"{job.source} has no cell tagged 'parameters'")
    nb["nbformat_minor"] = max(5, nb.get("nbformat_minor", 0))
    seen = set()
    for i, cell in enumerate(nb["cells"]):
        source = "".join(cell["source"])
        if not re.fullmatch(r"[a-zA-Z0-9-_]{1,64}", cell.get("id", "")) or cell["id"] in seen:
            cell["id"] = hashlib.sha256(f"{job.slug} {i} {source}".encode()).hexdigest()[:8]
        seen.add(cell["id"])
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
    if job.tune:
        calls = [i for i, cell in enumerate(nb["cells"]) if ".tuned(" in "".join(cell["source"])]
        nb["cells"] = nb["cells"][: calls[-1] + 1 if calls else 0]
    nb["metadata"].pop("widgets", None)
    nb["metadata"]["kernelspec"] = {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    }
    return nbformat.from_dict(nb)


def _finished(nb, job, seconds, cpu_seconds):
    """Settle and stamp an executed notebook, and make it fit for committing where asked to."""
    stamp = {"seconds": seconds, "cpu_seconds": cpu_seconds, "version": __version__}
    if job.in_place:
        nb.metadata.pop("papermill", None)
        for cell in nb.cells:
            for name in ("papermill", "execution"):
                cell.metadata.pop(name, None)
            if not cell.metadata.get("tags", True):
                del cell.metadata["tags"]  # papermill's empty list
            if cell.cell_type == "code":
                cell.outputs = _merged_streams(cell.outputs)
    else:
        stamp |= {
            "key": job.key,
            "parameters": job.parameters,
            "hardware": hardware((claims(nb) or {}).get("device") or job.parameters.get("device")),
            "versions": versions(),
            "date": date.today().isoformat(),
        }
    nb = _with_settled_widgets(nb)
    nb.metadata["miniature"] = stamp
    return nb


def _merged_streams(outputs):
    """Join neighboring pieces of one stream: where the kernel cuts them is a matter of timing."""
    merged = []
    for o in outputs:
        last = merged[-1] if merged else {}
        if o.output_type == "stream" == last.get("output_type") and o.name == last["name"]:
            last["text"] += o.text
        else:
            merged.append(o)
    return merged


def _with_settled_widgets(nb):
    """Make widgets look right in a notebook that is opened, not run.

    Each widget's output also gets the figure it shows, for viewers without widgets. The widgets'
    state stays where it is small, under ids that do not change from run to run; a large one goes,
    and the widgets with it, which leaves the figures.
    """
    import nbformat

    state = nb.metadata.get("widgets", {}).get(_WIDGET_STATE, {}).get("state", {})
    for model in state.values():
        if model["model_name"] == "LayoutModel":  # three dozen properties, nearly all unset
            model["state"] = {k: v for k, v in model["state"].items() if v is not None}
    large = len(json.dumps(state)) > _MAX_WIDGET_STATE
    for cell in nb.cells:
        for output in cell.get("outputs", ()):
            view = output.get("data", {}).get(_WIDGET_VIEW)
            if view is None:
                continue
            shown = [o for o in _widget_outputs(state, view["model_id"]) if "data" in o]
            figures = [o for o in shown if "image/png" in o["data"]] or shown
            for mime, content in figures[0]["data"].items() if figures else ():
                if mime != "text/plain":
                    output.data.setdefault(mime, content)
            if figures:  # alt texts
                output.metadata.update(figures[0].get("metadata", {}))
            if large or view["model_id"] not in state:
                del output.data[_WIDGET_VIEW]
    if large or not state:
        nb.metadata.pop("widgets", None)
        return nb
    text = json.dumps(nb)
    for i, old in enumerate(state):
        text = text.replace(old, hashlib.sha256(f"widget {i}".encode()).hexdigest()[:32])
    return nbformat.from_dict(json.loads(text))


def _widget_outputs(state, model):
    """The outputs captured by the `Output` widgets at and below a widget."""
    values = state.get(model, {}).get("state", {})
    found = list(values.get("outputs", ()))
    for child in values.get("children", ()):
        found += _widget_outputs(state, str(child).removeprefix("IPY_MODEL_"))
    return found


def _error(e, partial, log):
    """Describe how a notebook failed."""
    if hasattr(e, "ename"):  # papermill: a cell raised
        trace = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(e.traceback))
        cell = {"execution_count": e.exec_count, "source": e.source}
        return _describe(cell, e.ename, e.evalue, trace)
    name, message = type(e).__name__, str(e).strip()
    if name == "DeadKernelError":
        message = "the kernel died (out of memory?)"
    trace = log.read_text(errors="replace") if log.exists() else ""
    return _describe(_running(partial), name, message, trace)


def _running(partial):
    """The cell of a partly executed notebook that was running, or None."""
    nb = read(partial) or {"cells": []}
    started = [c for c in nb["cells"] if c["metadata"].get("papermill", {}).get("start_time")]
    code = [c for c in started if c["cell_type"] == "code"]
    replied = ["shell.execute_reply" in c["metadata"].get("execution", {}) for c in code]
    if not code or replied[-1]:
        return None
    return {"execution_count": sum(replied) + 1, "source": "".join(code[-1]["source"])}


def _describe(cell, name, message, traceback=""):
    cell = cell or {"execution_count": None, "source": ""}
    return {
        "cell": cell["execution_count"],
        "source": cell["source"],
        "name": name,
        "message": message,
        "traceback": traceback,
    }


def write_text(path, text):
    """Write a text file so that it is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        temporary.write_text(text.rstrip("\n") + "\n", encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# Recorded full-scale results


@functools.lru_cache
def hardware(device="auto"):
    """Return what a notebook ran on, in words: GPUs, CPU, cores and memory.

    Parameters
    ----------
    device : str
        With ``"cpu"``, GPUs that the machine has besides are left out.
    """
    import platform
    import subprocess

    gpus = []
    if device != "cpu":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
            answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
            gpus = answer.stdout.strip().splitlines()
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        cpu = names[0] if names else cpu
    parts = [*gpus, cpu, f"{os.cpu_count()} cores"]
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not on Windows
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        parts.append(f"{memory / 1e9:.0f} GB memory")
    return ", ".join(parts)


def versions():
    """Return the versions of Python, torch, NumPy and this package."""
    import platform
    from importlib import metadata

    found = {"python": platform.python_version(), "miniature": __version__}
    for name in ("torch", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def full_scale_record(slug, notebook):
    """Return what ``data/results/<slug>.json`` keeps of a notebook executed at full scale.

    Parameters
    ----------
    slug : str
    notebook : path-like
        An output of `miniature run`.

    Returns
    -------
    dict
        The claims record, and ``parameters, seconds, date, hardware, versions``.

    Raises
    ------
    ValueError
        If the notebook holds no record of this paper at full scale, is a negative control, or was
        not executed by ``miniature run``, which notes the hardware.
    """
    nb = read(notebook)
    if nb is None:
        raise ValueError(f"{notebook} is not a notebook")
    record = claims(nb)
    if record is None:
        raise ValueError(f"{notebook} holds no claims record: it did not run to its table")
    if record["paper"] != slug:
        raise ValueError(f"{notebook} is about {record['paper']!r}, not {slug!r}")
    if record["scale"] != "full":
        raise ValueError(f"{notebook} ran at scale {record['scale']!r}: only 'full' is recorded")
    if record.get("control"):
        raise ValueError(f"{notebook} is a negative control, not a result")
    stamp = nb["metadata"].get("miniature", {})
    kept = ("parameters", "seconds", "date", "hardware", "versions")
    if not all(name in stamp for name in kept):
        raise ValueError(
            f"{notebook} does not say where it ran: execute it with "
            f"`miniature run {slug} --scale full`"
        )
    return record | {name: stamp[name] for name in kept}


def summary(results, parameters, seconds):
    """Return the machine-readable summary of a run."""
    return {
        "version": __version__,
        "parameters": parameters,
        "seconds": round(seconds, 1),
        "papers": [asdict(r) for r in sorted(results, key=lambda r: (r.field, r.slug))],
    }
