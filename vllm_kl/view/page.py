"""Writes scored samples as one HTML page that needs no network and colours every token by its log-ratio.

The log-ratio is ``log_probs - ref_log_probs``: above 0 where the policy finds the token likelier than the
reference does. Colours and histogram always show the log-ratio. A ``kl`` of the estimator k1 and of the
direction KL(policy || reference) is the same number, and the page then calls the log-ratio KL. Any other
``kl`` says less about one token (k3 is never below 0): the page shows it beside the log-ratio as "KL as
stored".

The page lists the samples of the largest |KL| first. Samples of a group are equal if they have the same token
ids in prompt and response, and the same versions of policy and reference. The page shows equal samples once,
with a button that unfolds the others.

``page.html`` is the template of the page; ``page.css`` and ``page.js`` are inserted into it. The texts of
tokens come from a model and may be hostile: the page holds them only as JSON without ``<``, ``>`` and ``&``,
and its script inserts them only as text. The Content-Security-Policy allows this style and this script by
their hashes, and nothing else: no network access, no event handler in an attribute.

This module knows samples, but no batches, tokenizers or engines.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from vllm_kl.errors import InputError, OptionError
from vllm_kl.view.samples import Sample, replacing

DEFAULT_LIMIT = 500
_NUM_BINS = 41  # odd, so that the middle bin is centred on 0
_DECIMALS = 6  # half of float32's rounding at a log-prob of -8
_PLOT_WIDTH, _PLOT_HEIGHT = 620, 175


@dataclass(frozen=True, kw_only=True)
class Page:
    """The result of :func:`write_page`."""

    path: Path
    num_samples: int  # given to write_page
    num_shown: int  # written to the page, equal samples included
    num_scored_tokens: int  # of all given samples
    size_bytes: int


def write_page(
    samples: Sequence[Sample], path: str | Path, *, title: str = "Per-token KL", limit: int = DEFAULT_LIMIT
) -> Page:
    """Write the page.

    Args:
        samples: samples to show.
        path: the HTML file. An existing file is replaced when the page is complete.
        title: heading of the page.
        limit: largest number of samples on the page: those with the largest |KL| of a token. Figures and
            histogram describe all samples.

    Raises:
        InputError: ``samples`` is empty.
        OptionError: ``limit`` is below 1.
        OSError: the file cannot be written.

    >>> import tempfile, os
    >>> path = os.path.join(tempfile.mkdtemp(), "kl.html")
    >>> page = write_page([Sample(token_ids=[5, 6], log_probs=[-1.0], ref_log_probs=[-2.0])], path)
    >>> page.num_shown, page.num_scored_tokens, page.size_bytes == os.path.getsize(path)
    (1, 1, True)
    """
    html = render_page(samples, title=title, limit=limit).encode("utf-8", "replace")
    with replacing(path) as file:
        file.write(html)
    return Page(
        path=Path(path),
        num_samples=len(samples),
        num_shown=min(limit, len(samples)),
        num_scored_tokens=sum(len(sample.kl) for sample in samples),
        size_bytes=len(html),
    )


def render_page(samples: Sequence[Sample], *, title: str = "Per-token KL", limit: int = DEFAULT_LIMIT) -> str:
    """Return the page of :func:`write_page` as text.

    >>> page = render_page([Sample(token_ids=[5, 6], log_probs=[-1.0], ref_log_probs=[-2.0])], title="a < b")
    >>> "<h1>a &lt; b</h1>" in page
    True
    """
    if not samples:
        raise InputError("no samples: there is nothing to show")
    if limit < 1:
        raise OptionError(f"limit must be at least 1, got {limit}")
    is_k1 = all(map(_is_k1, samples))
    kl_name, ratio_name = ("KL", "KL") if is_k1 else ("KL as stored", "log-ratio")
    sums = [math.fsum(sample.kl) for sample in samples]
    shown = sorted(sorted(range(len(samples)), key=lambda i: -_largest(samples[i]))[:limit])
    kl = [value for sample in samples for value in sample.kl]
    ratios = [ratio for sample in samples for ratio in log_ratios(sample)]
    cap, cap_name = kl_cap(ratios, ratio_name)
    env = Environment(
        loader=PackageLoader("vllm_kl.view", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (env.loader.get_source(env, f"page.{kind}")[0] for kind in ("css", "js"))
    return env.get_template("page.html").render(
        title=title,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        data=_script_json(_page_data(samples, shown, cap, is_k1)),
        figures=_figures(samples, sums, kl, kl_name, [] if is_k1 else ratios),
        is_k1=is_k1,
        kl_name=kl_name,
        ratio_name=ratio_name,
        num_samples=len(samples),
        num_shown=len(shown),
        num_tokens=len(kl),
        cap=cap,
        cap_name=cap_name,
        plot=_histogram(ratios, cap, ratio_name),
        number=_number,
    )


def log_ratios(sample: Sample) -> list[float]:
    """Return ``log_probs - ref_log_probs`` of the scored tokens, nats. Colours show it.

    >>> log_ratios(Sample(token_ids=[5, 6], log_probs=[-1.0], ref_log_probs=[-0.5], kl=[0.15]))
    [-0.5]
    """
    return [p - q for p, q in zip(sample.log_probs, sample.ref_log_probs, strict=True)]


def _is_k1(sample: Sample) -> bool:
    """Return whether a sample's KL is its log-ratio, up to the page's rounding and a float32 subtraction."""
    sides = zip(sample.log_probs, sample.ref_log_probs, sample.kl, strict=True)
    return all(abs(p - q - k) <= 10**-_DECIMALS + 2**-22 * (abs(p) + abs(q)) for p, q, k in sides)


def kl_cap(values: Sequence[float], name: str = "KL") -> tuple[float, str]:
    """Return the value of full colour and its name: the 99th percentile of |value|, or, if 0, the largest.

    >>> kl_cap([0.0] * 50 + [-0.5] * 50), kl_cap([0.0] * 999 + [2.0], "log-ratio")
    ((0.5, '99th percentile of |KL|'), (2.0, 'largest |log-ratio|'))
    """
    sizes = sorted(map(abs, values))
    percentile = sizes[math.ceil(0.99 * len(sizes)) - 1] if sizes else 0.0
    if percentile:
        return percentile, f"99th percentile of |{name}|"
    return (sizes[-1] if sizes else 0.0), f"largest |{name}|"


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _script_json(data: Any) -> Markup:
    """Return ASCII JSON without ``<``, ``>`` and ``&``: it cannot end the script element that holds it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def _page_data(samples: Sequence[Sample], shown: Sequence[int], cap: float, is_k1: bool) -> dict[str, Any]:
    """Return the data of ``page.js``: a table of all tokens that occur, and the shown samples."""
    table: dict[tuple[int, str | None], int] = {}  # each text is written once
    folds: dict[tuple[Any, ...], int] = {}
    entries = []
    for i in shown:
        sample = samples[i]
        texts = sample.tokens or [None] * len(sample.token_ids)
        log_probs, ref_log_probs, kl = (
            [round(value, _DECIMALS) for value in values]
            for values in (sample.log_probs, sample.ref_log_probs, sample.kl)
        )
        entries.append(
            {
                "number": i + 1,
                "fold": folds.setdefault(_fold_key(sample), len(folds)),
                "tokens": [
                    table.setdefault(pair, len(table)) for pair in zip(sample.token_ids, texts, strict=True)
                ],
                "spans": _spans(sample.mask),
                "policy": log_probs,
                "ref": ref_log_probs,
                "kl": None if is_k1 else kl,  # as stored; page.js computes log-ratios
                "sum": round(math.fsum(sample.kl), _DECIMALS),
                "max": round(_largest(sample), _DECIMALS),
                "query": sample.query,
                "response": sample.response,
                "reward": sample.reward,
                "policy_version": sample.policy_version,
                "ref_version": sample.ref_version,
            }
        )
    return {"cap": cap, "vocabulary": list(table), "is_k1": is_k1, "samples": entries}


def _largest(sample: Sample) -> float:
    return max(map(abs, sample.kl), default=0.0)


def _fold_key(sample: Sample) -> tuple[Any, ...]:
    """Return what equal samples share: prompt, response, and the versions of policy and reference."""
    return tuple(sample.token_ids), tuple(sample.mask), sample.policy_version, sample.ref_version


def _spans(mask: Sequence[bool]) -> list[list[int]]:
    """Return the runs of true values as ``[start, stop]``."""
    runs, t = [], 0
    for kept, run in groupby(mask):
        length = len(list(run))
        if kept:
            runs.append([t, t + length])
        t += length
    return runs


def _figures(
    samples: Sequence[Sample],
    sums: Sequence[float],
    kl: Sequence[float],
    kl_name: str,
    ratios: Sequence[float],
) -> list[tuple[str, str]]:
    """Return names and values of the figures; ``ratios`` is empty if the KL is the log-ratio."""
    rewards = [sample.reward for sample in samples if sample.reward is not None]
    figures = [
        ("samples", f"{len(samples):,}"),
        ("scored tokens", f"{len(kl):,}"),
        (f"mean {kl_name} per token", _number(math.fsum(kl) / len(kl)) if kl else "none"),
        (f"mean {kl_name} per sample", _number(math.fsum(sums) / len(sums))),
        (f"largest |{kl_name}|", _number(max(map(abs, kl), default=0.0), sign=False)),
    ]
    if ratios:
        figures.append(("mean log-ratio per token", _number(math.fsum(ratios) / len(ratios))))
        figures.append(("largest |log-ratio|", _number(max(map(abs, ratios)), sign=False)))
    if rewards:
        figures.append(("mean reward", _number(math.fsum(rewards) / len(rewards), sign=False)))
    for name, versions in (
        ("policy version", {sample.policy_version for sample in samples} - {None}),
        ("reference version", {sample.ref_version for sample in samples} - {None}),
    ):
        if versions:
            ordered = sorted(versions, key=lambda v: (isinstance(v, str), v))
            text = str(ordered[0]) if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"
            figures.append((name, text))
    return figures


def _number(value: float, *, sign: bool = True) -> str:
    r"""Return a number with four significant digits and a true minus sign.

    >>> _number(1.5), _number(0.0), _number(1 / 3, sign=False), _number(-0.25) == "\N{MINUS SIGN}0.25"
    ('+1.5', '0', '0.3333', True)
    """
    text = f"{value:+.4g}" if sign and value else f"{value:.4g}"
    return text.replace("-", "\N{MINUS SIGN}")


def _histogram(values: Sequence[float], cap: float, name: str) -> dict[str, Any]:
    """Return bars and ticks from ``-cap`` to ``cap``. The outermost bars count all values beyond."""
    edge = cap or 1.0
    counts = [0] * _NUM_BINS
    for value in values:
        along = (min(1.0, max(-1.0, value / edge)) + 1) / 2  # 0 to 1; an overflow to infinity becomes an end
        counts[min(_NUM_BINS - 1, math.floor(along * _NUM_BINS))] += 1
    # A log axis, because most tokens have a KL near 0 and a linear axis would hide the others.
    # log1p, so that a bar of one token has a height.
    top = math.log1p(max(counts) or 1)
    bars = []
    for i, count in enumerate(counts):
        low, high = (edge * (2 * n / _NUM_BINS - 1) for n in (i, i + 1))
        where = f"{_number(low)} to {_number(high)}"
        where = (
            f"below {_number(high)}" if i == 0 else f"above {_number(low)}" if i == _NUM_BINS - 1 else where
        )
        bars.append(
            {
                "x": round(i * _PLOT_WIDTH / _NUM_BINS, 2),
                "height": round(math.log1p(count) / top * _PLOT_HEIGHT, 2),
                "value": (i - _NUM_BINS // 2) / (_NUM_BINS // 2),
                "title": f"{count:,} tokens, {name} {where} nats",
            }
        )
    powers = [10**n for n in range(12) if 10**n <= max(counts)]
    return {
        "width": _PLOT_WIDTH,
        "height": _PLOT_HEIGHT,
        "bar_width": round(_PLOT_WIDTH / _NUM_BINS - 1.5, 2),
        "bars": bars,
        "ticks_x": [
            {"x": _PLOT_WIDTH * (f + 1) / 2, "text": _number(f * edge)} for f in (-1, -0.5, 0, 0.5, 1)
        ],
        "ticks_y": [
            {"y": round(_PLOT_HEIGHT * (1 - math.log1p(n) / top), 2), "text": f"{n:,}"} for n in powers
        ],
    }
