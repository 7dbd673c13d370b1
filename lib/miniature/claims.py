"""Claims, their statistics and their verdicts.

Every check returns a `Claim` with one of three verdicts, by one rule. A check states a region (an
effect beyond a margin, a slope within a tolerance, a mean below a bound) and computes a 95 %
confidence interval over seeds:

- *reproduced*: the whole interval lies inside the region;
- *not reproduced*: the whole interval lies outside it;
- *inconclusive*: the interval straddles the border, so that the seeds do not decide.

A null effect therefore comes out as *reproduced* in at most 2.5 % of all experiments with normal
noise (one tail of a 95 % interval). Intervals are Student's t over seeds: with five seeds a
bootstrap has too few distinct resamples to keep its promise, the t interval keeps it. The slope of
an expected value (a mean over many seeds, then a logarithm) is bootstrapped.

A method that diverges (a value that is not finite) has not reproduced its claim. A baseline that
diverges makes a comparison inconclusive: beating it would prove only that it was badly tuned.
"""

import html
import math
from dataclasses import dataclass, replace

import numpy as np

from .run import MIME, SYMBOLS, VERDICTS

COLORS = {  # read on white and on black; plain, as JupyterLab strips variables of an untrusted page
    "reproduced": "#2a8c4a",
    "inconclusive": "#b06f00",
    "not reproduced": "#d64545",
}


@dataclass(frozen=True)
class Claim:
    """One claim of a paper, measured. Made by the checks of this module.

    Attributes
    ----------
    id, claim : str
        The claim's id ("C1") and the claim in words.
    kind : str
        The check: compare, close, slope, bound, order or all_of.
    paper : str
        What the paper reports.
    measured : float or None
        The estimate, in `unit`. None for a claim of several parts.
    interval : tuple of float or None
        Its 95 % confidence interval. None where nothing is estimated (an identity).
    verdict : {"reproduced", "inconclusive", "not reproduced"}
    control : bool
        True for a comparison that the method under test takes part in: with the baseline in the
        method's place (``control=True``) it must not come out as reproduced.
    detail, reason : str
        What was measured in words; why a claim failed, found by experiment.
    parts : tuple of Claim
    """

    id: str
    claim: str
    kind: str
    paper: str
    verdict: str
    measured: float | None = None
    interval: tuple | None = None
    unit: str = ""
    control: bool = False
    detail: str = ""
    reason: str = ""
    parts: tuple = ()

    def note(self, reason):
        """Return the claim with the reason, found by experiment, why it came out as it did."""
        return replace(self, reason=reason)

    def record(self):
        """Return the claim as the JSON object that notebooks carry."""
        return {
            "id": self.id,
            "claim": self.claim,
            "kind": self.kind,
            "paper_value": self.paper,
            "measured": _finite(self.measured),
            "interval": None if self.interval is None else [_finite(v) for v in self.interval],
            "unit": self.unit,
            "verdict": self.verdict,
            "control": self.control,
            "detail": self.detail,
            "note": self.reason,
            "parts": [p.record() for p in self.parts],
        }


def interval(values, level=0.95):
    """Return the mean over seeds and its two-sided Student t interval.

    Parameters
    ----------
    values : array_like, shape [S, ...]
        One value per seed on the first axis; at least three seeds.
    level : float
        Coverage.

    Returns
    -------
    mean, lo, hi : numpy.ndarray, shape [...]

    Raises
    ------
    ValueError
        If there are fewer than three seeds: an interval from two has no use.
    """
    from scipy.special import stdtrit

    x = _array(values)
    if x.ndim == 0 or len(x) < 3:
        raise ValueError(f"an interval needs at least 3 seeds, got shape {list(x.shape)}")
    mean = x.mean(0)
    half = stdtrit(len(x) - 1, (1 + level) / 2) * x.std(0, ddof=1) / math.sqrt(len(x))
    return mean, mean - half, mean + half


def compare(
    id, claim, ours, baseline, *, paper, larger=True, margin=0.0, ratio=None, unit="", subject=True
):
    """Check that a method beats a baseline by more than a margin, paired over seeds.

    Parameters
    ----------
    id, claim : str
        The claim's id and the claim in words (no number that varies between machines).
    ours, baseline : array_like, shape [S]
        One value per seed; the same seed at the same place in both.
    paper : str
        What the paper reports.
    larger : bool
        Whether larger values are better.
    margin : float
        The size of the effect that the claim states, in the unit of the values.
    ratio : float, optional
        Check ``ours / baseline`` against this ratio instead (below it with ``larger=False``,
        above it with ``larger=True``), by the t interval of the paired log-ratio. All values
        must be positive.
    unit : str
        Unit of the difference, for the table.
    subject : bool
        False for a comparison that the method under test takes no part in.

    Returns
    -------
    Claim
        `measured` is the mean paired difference ours - baseline, or the geometric mean ratio.

    Raises
    ------
    ValueError
        If the arrays are not paired, or a ratio is asked for and a value is not positive.
    """
    a, b = _array(ours), _array(baseline)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(
            f"ours and baseline must be paired over seeds, shape [S]; got {list(a.shape)} and "
            f"{list(b.shape)}"
        )
    base = {"id": id, "claim": claim, "kind": "compare", "paper": paper, "control": subject}
    diverged = _diverged(a, b)
    if diverged:
        return Claim(**base, **diverged)
    if ratio is None:
        mean, lo, hi = (float(v) for v in interval(a - b))
        edge = margin if larger else -margin
        detail = f"{_number(a.mean())} against {_number(b.mean())}"
    else:
        if (a <= 0).any() or (b <= 0).any() or ratio <= 0:
            raise ValueError("a ratio needs positive values")
        mean, lo, hi = (float(np.exp(v)) for v in interval(np.log(a) - np.log(b)))
        edge, unit = ratio, unit or "×"
        detail = f"{_number(a.mean())} against {_number(b.mean())}"
    verdict = _beyond(lo, hi, edge, larger)
    return Claim(
        **base, verdict=verdict, measured=mean, interval=(lo, hi), unit=unit, detail=detail
    )


def close(id, claim, measured, expected, *, tol, paper, relative=False):
    """Check an identity: the largest deviation is within a tolerance.

    Parameters
    ----------
    id, claim, paper : str
        As in `compare`.
    measured, expected : array_like
        Same shape, or broadcastable. Everything is checked; nothing is averaged.
    tol : float
        Largest deviation admitted, absolute, or relative to the largest expected magnitude.
    relative : bool
        Whether `tol` is relative.

    Returns
    -------
    Claim
        `measured` is the largest deviation. An identity is never inconclusive.
    """
    a, b = _array(measured), _array(expected)
    error = float(np.max(np.abs(a - b))) if np.isfinite(a).all() else math.inf
    if relative:
        error /= float(np.max(np.abs(b)))
    verdict = "reproduced" if error <= tol else "not reproduced"
    kind = "relative" if relative else "absolute"
    return Claim(id, claim, "close", paper, verdict, error, unit=f"({kind} error; at most {tol:g})")


def exponent(x, y, *, average=False, loglog=True):
    """Fit a line to (log) y against (log) x and return its slope with a 95 % interval.

    Parameters
    ----------
    x : array_like, shape [T], T >= 3
    y : array_like, shape [S, T] or [T]
        A curve per seed. For a single curve the interval comes from the residuals of the fit.
    average : bool
        False: fit each seed's curve; Student's t interval over seeds. True: fit the curve of the
        *mean* over seeds, as for an expected regret, which single seeds may well miss (they may be
        zero); bootstrap interval (BCa), which draws whole curves again. Wants 20 seeds or more.
    loglog : bool
        Take logarithms of both: the slope is the exponent of a power law.

    Returns
    -------
    slope, lo, hi : float

    Raises
    ------
    ValueError
        If shapes do not fit, a logarithm is not defined, or seeds are too few to resample.
    """
    x, y = _array(x), _array(y)
    if x.ndim != 1 or len(x) < 3 or y.shape[-1] != len(x) or y.ndim > 2:
        raise ValueError(
            f"x must have shape [T], T >= 3, and y [S, T] or [T]; got {list(x.shape)} and "
            f"{list(y.shape)}"
        )
    if average and (y.ndim != 2 or len(y) < 20):
        raise ValueError(f"the mean over seeds needs y [S, T], S >= 20; got {list(y.shape)}")
    fitted = y.mean(0) if average else y
    if loglog and ((x <= 0).any() or (fitted <= 0).any()):
        raise ValueError("a log-log slope needs positive x and y")
    u = np.log(x) if loglog else x
    centered = u - u.mean()

    def fit(values):
        return (np.log(values) if loglog else values) @ centered / (centered @ centered)

    if y.ndim == 2 and not average:
        return tuple(float(v) for v in interval(fit(y)))
    if not average:
        from scipy.special import stdtrit

        slope, v = fit(y), np.log(y) if loglog else y
        residual = v - v.mean() - slope * centered
        error = math.sqrt(residual @ residual / (len(x) - 2) / (centered @ centered))
        half = stdtrit(len(x) - 2, 0.975) * error
        return float(slope), float(slope - half), float(slope + half)
    return _bca(y, lambda curves: fit(curves.mean(-2)))


def _bca(y, statistic, draws=2000):
    """Bias-corrected and accelerated bootstrap interval (Efron 1987) over the rows of y [S, ...].

    `statistic` maps [..., S, T] to [...]. The draws are the same in every call.
    """
    from scipy.special import ndtr, ndtri

    n = len(y)
    rows = np.random.default_rng(0).integers(n, size=(draws, n))
    with np.errstate(divide="ignore", invalid="ignore"):  # the logarithm of a mean of zeros only
        at, again = statistic(y), statistic(y[rows])
        left = np.array([statistic(np.delete(y, i, 0)) for i in range(n)])
    again, left = np.sort(again[np.isfinite(again)]), left[np.isfinite(left)]
    d = left.mean() - left
    a = (d**3).sum() / max(6 * (d**2).sum() ** 1.5, 1e-300)
    share = (np.searchsorted(again, at) + np.searchsorted(again, at, "right")) / (2 * len(again))
    z0 = ndtri(np.clip(share, 1 / draws, 1 - 1 / draws))
    z = z0 + ndtri([0.025, 0.975])
    lo, hi = np.quantile(again, ndtr(z0 + z / (1 - a * z)))
    return float(at), float(lo), float(hi)


def slope(
    id, claim, x, y, *, paper, expected=None, tol=None, between=None, average=False, loglog=True
):
    """Check a rate: the slope of y against x lies in a region.

    Parameters
    ----------
    id, claim, paper : str
        As in `compare`.
    x : array_like, shape [T]
    y : array_like, shape [S, T] or [T]
        A curve per seed.
    expected, tol : float, optional
        The region is ``[expected - tol, expected + tol]``.
    between : tuple of float, optional
        The region is ``[between[0], between[1]]``; either may be infinite.
    average, loglog : bool
        As in `exponent`, which fits the slope and its interval.

    Raises
    ------
    ValueError
        If the region is missing or stated twice; as in `exponent`.
    """
    if (between is None) == (expected is None) or (expected is None) != (tol is None):
        raise ValueError("a slope needs either expected= and tol=, or between=")
    below, above = between or (expected - tol, expected + tol)
    if between is None:
        unit = f"(expected {expected:g} ± {tol:g})"
    else:
        ends = (("at least", below), ("at most", above))
        unit = "(" + ", ".join(f"{word} {v:g}" for word, v in ends if math.isfinite(v)) + ")"
    if not np.isfinite(_array(y)).all():
        return Claim(id, claim, "slope", paper, "not reproduced", unit=unit, detail="diverged")
    fitted, lo, hi = exponent(x, y, average=average, loglog=loglog)
    verdict = _within(lo, hi, below, above)
    return Claim(id, claim, "slope", paper, verdict, fitted, (lo, hi), unit)


def bound(id, claim, values, *, upper=None, lower=None, paper, every=False, unit=""):
    """Check that a quantity stays below (or above, or between) given bounds.

    Parameters
    ----------
    id, claim, paper : str
        As in `compare`.
    values : array_like, shape [S], or any shape with ``every=True``
        One value per seed: the mean over seeds is checked by its interval.
    upper, lower : float, optional
        At least one of them.
    every : bool
        Check every single value instead of the mean: an invariant, never inconclusive.
    unit : str

    Raises
    ------
    ValueError
        If no bound is given.
    """
    if upper is None and lower is None:
        raise ValueError("a bound needs upper=, lower= or both")
    x = _array(values)
    below = -math.inf if lower is None else lower
    above = math.inf if upper is None else upper
    ends = [
        f"{word} {edge:g}"
        for word, edge in (("at least", lower), ("at most", upper))
        if edge is not None
    ]
    unit = f"{unit} ({', '.join(ends)})".strip()
    if not np.isfinite(x).all():
        return Claim(id, claim, "bound", paper, "not reproduced", unit=unit, detail="diverged")
    if every:
        lo, hi = float(x.min()), float(x.max())
        verdict = "reproduced" if below <= lo and hi <= above else "not reproduced"
        worst = hi if lower is None or hi > above else lo
        return Claim(id, claim, "bound", paper, verdict, worst, unit=unit, detail="the worst value")
    mean, lo, hi = (float(v) for v in interval(x))
    return Claim(
        id, claim, "bound", paper, _within(lo, hi, below, above), mean, (lo, hi), unit=unit
    )


def order(id, claim, values, *, increasing=True, paper, subject=True, unit=""):
    """Check that several conditions come in the stated order.

    Parameters
    ----------
    id, claim, paper : str
        As in `compare`.
    values : dict of str to array_like, shape [S]
        Conditions in the order in which they should rise (or fall), paired over seeds.
    increasing : bool
        Whether they should rise.
    subject : bool
        As in `compare`.
    unit : str

    Returns
    -------
    Claim
        *reproduced* when every step is beyond zero, *not reproduced* when one goes the other way
        or stands still, at a joint level of 95 % (Bonferroni over the steps). `measured` is the
        weakest step.
    """
    labels, rows = list(values), [_array(v) for v in values.values()]
    if len(rows) < 2 or len({r.shape for r in rows}) > 1 or rows[0].ndim != 1:
        raise ValueError("order needs two or more conditions, each of shape [S]")
    base = {"id": id, "claim": claim, "kind": "order", "paper": paper, "control": subject}
    if not all(np.isfinite(r).all() for r in rows):
        return Claim(**base, verdict="not reproduced", detail="diverged")
    steps = np.diff(np.stack(rows), axis=0).T  # [S, conditions - 1]
    mean, lo, hi = interval(steps if increasing else -steps, 1 - 0.05 / (len(rows) - 1))
    verdicts = [_beyond(a, b, 0.0, True) for a, b in zip(lo, hi)]
    weakest = int(np.argmin(lo))
    return Claim(
        **base,
        verdict=_worst(verdicts),
        measured=float(mean[weakest]),
        interval=(float(lo[weakest]), float(hi[weakest])),
        unit=f"{unit} ({labels[weakest]} to {labels[weakest + 1]})".strip(),
        detail=", ".join(f"{k}: {_number(r.mean())}" for k, r in zip(labels, rows)),
    )


def all_of(id, claim, *parts, paper):
    """Join the parts of one claim: it stands only if every part does.

    Parameters
    ----------
    id, claim, paper : str
        As in `compare`.
    *parts : Claim
        With ids of their own, e.g. "C1a". The worst verdict is the claim's.
    """
    if not parts:
        raise ValueError(f"claim {id} has no parts")
    return Claim(
        id,
        claim,
        "all_of",
        paper,
        _worst([p.verdict for p in parts]),
        control=any(p.control for p in parts),
        parts=tuple(parts),
    )


class Table:
    """The verdict table of a notebook: shown by JupyterLab, read by the report and the tests.

    Parameters
    ----------
    run : miniature.scale.Run
        Names the paper, the profile and the seed.
    claims : sequence of Claim
        One per claim of the paper, with distinct ids.
    """

    def __init__(self, run, claims):
        self.run = run
        self.claims = list(claims)
        ids = [c.id for c in self.claims]
        if len(set(ids)) < len(ids):
            raise ValueError(f"claim ids must be distinct, got {ids}")

    def record(self):
        """Return the record that the notebook carries under `MIME`."""
        return {
            "paper": self.run.slug,
            "scale": self.run.scale,
            "seed": self.run.seed,
            "device": str(self.run.device),
            "control": self.run.control,
            "claims": [c.record() for c in self.claims],
        }

    def text(self):
        """Return id, verdict and claim, a line each: nothing that varies between machines."""
        return "\n".join(f"{c.id:4} {c.verdict:15} {c.claim}" for c in self.claims)

    def _repr_mimebundle_(self, include=None, exclude=None):
        return {MIME: self.record(), "text/html": self.html(), "text/plain": self.text()}

    def html(self):
        """Return the table as HTML that suits light and dark themes."""
        rows = []
        for claim in self.claims:
            rows.append(_row(claim, part=False))
            rows += [_row(part, part=True) for part in claim.parts]
        head = "".join(
            f'<th scope="col" style="text-align:left;padding:4px 10px">{h}</th>'
            for h in ("", "Claim", "Paper", "Measured here, 95 % interval", "Verdict")
        )
        return (
            '<table style="border-collapse:collapse;font-size:13px;color:inherit">'
            f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        )


def _row(c, part):
    measured = "" if c.measured is None else f"{_number(c.measured)}"
    if c.interval is not None:
        measured += f" [{_number(c.interval[0])}, {_number(c.interval[1])}]"
    measured = " ".join(filter(None, [measured, c.unit]))
    small = '<div style="opacity:.75;font-size:12px">{}</div>'
    text = html.escape(c.claim) + (small.format(html.escape(c.reason)) if c.reason else "")
    value = html.escape(measured) + (small.format(html.escape(c.detail)) if c.detail else "")
    verdict = (
        f'<span style="color:{COLORS[c.verdict]};font-weight:600;white-space:nowrap">'
        f"{SYMBOLS[c.verdict]} {c.verdict}</span>"
    )
    cell = '<td style="text-align:left;vertical-align:top;padding:4px 10px;white-space:normal">'
    style = "opacity:.85;font-size:12px" if part else "border-top:1px solid #8888"
    cells = "".join(
        f"{cell}{x}</td>" for x in (html.escape(c.id), text, html.escape(c.paper), value, verdict)
    )
    return f'<tr style="{style}">{cells}</tr>'


def _array(values):
    if hasattr(values, "detach"):
        values = values.detach().cpu()
    elif isinstance(values, (list, tuple)):
        values = [_array(v) for v in values]
    return np.asarray(values, dtype=np.float64)


def _diverged(ours, baseline):
    if not np.isfinite(ours).all():
        return {"verdict": "not reproduced", "detail": "the method diverged"}
    if not np.isfinite(baseline).all():
        return {"verdict": "inconclusive", "detail": "the baseline diverged: tune it"}
    return None


def _beyond(lo, hi, edge, larger):
    """Verdict for an interval against the half-line beyond `edge`."""
    if not larger:
        lo, hi, edge = -hi, -lo, -edge
    return "reproduced" if lo > edge else "not reproduced" if hi <= edge else "inconclusive"


def _within(lo, hi, below, above):
    """Verdict for an interval against the region [below, above]."""
    if below <= lo and hi <= above:
        return "reproduced"
    return "not reproduced" if hi < below or lo > above else "inconclusive"


def _worst(verdicts):
    return max(verdicts, key=VERDICTS.index)


def _finite(value):
    return None if value is None or not math.isfinite(value) else float(value)


def _number(value):
    """Four significant digits, without an exponent where it reads well."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if 1e-3 <= abs(value) < 1e6:
        digits = max(0, 3 - math.floor(math.log10(abs(value))))
        return f"{value:.{min(digits, 4)}f}"
    return f"{value:.2e}"
