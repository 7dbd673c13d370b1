"""Accuracy against trained numbers: what each paper measured, kept so that all can be drawn as one.

A notebook calls `plane` once, after its main experiment; `records` reads what the committed
notebooks kept, and `gain` makes scores of different tasks comparable: the share of full
fine-tuning's gain over the untouched model.
"""

import numpy as np

from ..show import kind, table_html

MIME = "application/vnd.miniature.plane+json"


class Plane:
    """Scores of methods on one task, shown as a table and kept in the notebook. Made by `plane`."""

    def __init__(self, record):
        self.record = record

    def rows(self):
        """Return the table: one dict a method, full fine-tuning last."""
        r = self.record
        score = f"score ({r['unit']})"
        rows = [{"method": "untouched", "trained numbers": 0, "share of full (%)": 0.0}]
        rows[0] |= {score: float(np.mean(r["start"])), "share of full's gain (%)": 0.0}
        for name, m in {**r["methods"], "full fine-tuning": r["full"]}.items():
            share = 100 * m["trained"] / r["full"]["trained"]
            rows.append(
                {
                    "method": name,
                    "trained numbers": m["trained"],
                    "share of full (%)": share,
                    score: float(np.mean(m["scores"])),
                    "share of full's gain (%)": 100 * gain(r, m["scores"])[0],
                }
            )
        return rows

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {
            "text/html": table_html(self.rows(), caption=self.record["task"]),
            "text/plain": f"{len(self.record['methods'])} methods on {self.record['task']}",
            MIME: self.record,
        }


def plane(run, task, start, full, methods, own, unit="%"):
    """Keep scores of methods on one task, and show them as a table.

    Parameters
    ----------
    run : miniature.scale.Run
    task : str
        What is learned, such as "digits turned by 45 degrees".
    start : sequence of float, length S
        Scores per seed of the model with nothing adapted, but for a new last layer where the task
        needs one.
    full : tuple of (int, sequence of float)
        Numbers that full fine-tuning trains, and its scores.
    methods : dict of str to tuple of (int, sequence of float)
        The same for every method; a name may say its size, "LoRA, r = 4".
    own : sequence of str
        Names, without sizes, of the paper's methods.
    unit : str
        Of the scores.

    Returns
    -------
    Plane
        The last line of a cell shows it.

    Raises
    ------
    ValueError
        If a method has another number of scores than seeds, trains nothing, or no method is of
        the paper.
    """
    start = np.asarray(start, float).tolist()

    def part(name, value):
        trained, scores = value
        scores = np.asarray(scores, float).tolist()
        if len(scores) != len(start):
            raise ValueError(f"{name!r} has {len(scores)} scores, the start {len(start)}")
        if trained < 1:
            raise ValueError(f"{name!r} trains {trained} numbers; it belongs to `start`")
        return {"trained": int(trained), "scores": scores}

    own = [own] if isinstance(own, str) else list(own)
    missing = [o for o in own if o not in {kind(n) for n in methods}]
    if missing or not own:
        raise ValueError(f"own names {missing or 'nothing'}; the methods: {', '.join(methods)}")
    return Plane(
        {
            "slug": run.slug,
            "task": task,
            "unit": unit,
            "own": own,
            "start": start,
            "full": part("full fine-tuning", full),
            "methods": {name: part(name, value) for name, value in methods.items()},
        }
    )


def gain(record, scores):
    """Return the share of full fine-tuning's gain, and half its 95 % interval over seeds.

    The ratio of means (score - start) / (full - start), its deviation by the jackknife over seeds,
    which are paired.
    """
    from scipy.special import stdtrit

    start, full = (np.asarray(v, float) for v in (record["start"], record["full"]["scores"]))
    up, down = np.asarray(scores, float) - start, full - start
    n = len(up)
    without = (up.sum() - up) / (down.sum() - down)
    spread = np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    return float(up.mean() / down.mean()), float(stdtrit(n - 1, 0.975) * spread)


def records(field="peft"):
    """Return the records that the committed notebooks of a field keep, slug -> record."""
    from .. import papers, run

    found = {}
    for paper in papers.all():
        nb = run.read(paper.notebook) if paper.field == field else None
        record = run.last(nb, MIME) if nb else None
        if record:
            found[paper.slug] = record
    return found
