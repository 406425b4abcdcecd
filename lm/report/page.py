"""Render run folders and claims as one self-contained HTML file.

The page loads nothing and runs no script; the same folders give the same bytes.
"""

from __future__ import annotations

import base64
import collections
import datetime
import html
import io
import itertools
import json
import math
import os
import pathlib
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence

from lm import logs
from lm.report.claims import Claim
from lm.report.run_folders import ROLES, SCORES, RunFolder, read_run_folders

MAX_SAMPLES = 5  # for each set of models that answered the same input
MAX_CHARACTERS = 420  # of a sample's text
MAX_EVENTS = 20  # of a run, the last ones
NUM_COLOURS = 6
CURVES = {  # logged scalar: title and label of its figure
    "nats": ("loss", "nats per token"),
    "learning_rate": ("learning rate", "learning rate"),
    "gradient_norm": ("gradient norm", "norm of the gradient"),
}
WIDTH, HEIGHT = 5, 3  # of a figure, in inches
STYLE = pathlib.Path(__file__).with_name("style.css")
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<style>
{style}</style></head>
<body><header><h1>{title}</h1><p>{intro}</p></header>
{body}</body></html>
"""


def write(
    rundirs: Iterable[str | os.PathLike],
    out: str | os.PathLike,
    *,
    title: str,
    claims: Sequence[Claim] = (),
) -> None:
    """Write a page about run folders to `out`. Raises ValueError as read_run_folders."""
    runs = read_run_folders(rundirs)
    sections = (
        ("claims", "Claims", map(_claim, claims)),
        ("curves", "Curves", _figures(runs)),
        ("scores", "Scores of the checkpoints", map(_score_curve, runs)),
        ("results", "Results", [_results(runs)]),
        ("time", "Where the time went", [_goodput(runs)]),
        ("events", "Events", map(_events, runs)),
        ("samples", "Samples", _samples(runs)),
        ("rows", "What made each row", map(_provenance, runs)),
    )
    body = "".join(
        f"<section id={name}><h2>{heading}</h2>{text}</section>\n"
        for name, heading, parts in sections
        if (text := "".join(parts))
    )
    style = STYLE.read_text("utf-8")
    page = PAGE.format(style=style, title=_escape(title), intro=_intro(runs), body=body)
    logs.write_atomically(out, page)


def _escape(value) -> str:
    return html.escape(str(value))


def _number(value: float | None, form: str = "#.4g") -> str:
    """Format a number, with all digits in the tag's attribute."""
    if value is None:
        return "–"
    return f'<data value="{value!r}">{value:{form}}</data>'.replace(">-", ">−")


def _abridge(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS].rstrip() + " […]"


def _intro(runs: Sequence[RunFolder]) -> str:
    headings = dict.fromkeys(_heading(run).lower() for run in runs)
    count = f"{len(runs)} training runs" if len(runs) > 1 else "One training run"
    return (
        f"{count} of encoder-decoder language models ({_escape(', '.join(headings))}). Scores are "
        "of text held out from training. Losses are in nats, lower is better: per token, or per "
        "text token (without sentinels and eos), to compare with a unigram model. Bits per byte "
        "compares across tokenizers; ROUGE, higher is better, compares answers with references. "
        "Training time is that of the updates only."
    )


def _claim(claim: Claim) -> str:
    def mean_and_deviation(values: Sequence[float]) -> str:
        mean = statistics.fmean(values)
        if len(values) < 2 or not math.isfinite(mean):
            return _number(mean)
        return f"{_number(mean)}<small>± {statistics.stdev(values):#.2g}</small>"

    note = ["lower is better" if claim.lower_is_better else "higher is better"]
    if len(claim.seeds) > 1:
        note += ["mean ± standard deviation over seeds"]
        seeds = zip(claim.seeds, claim.figures, claim.baselines, strict=True)
        note += [f"<span>seed {s}: {_number(f)} against {_number(b)}</span>" for s, f, b in seeds]
    return (
        f'<article class="claim {"holds" if claim.holds else "fails"}">'
        f"<p><strong>{_escape(claim.verdict)}</strong> {_escape(claim.sentence)}</p>"
        f"<dl><div><dt>{_escape(claim.unit)}</dt><dd>{mean_and_deviation(claim.figures)}</dd></div>"
        f"<div><dt>baseline</dt><dd>{mean_and_deviation(claim.baselines)}</dd></div>"
        f"<div><dt>difference</dt><dd>{_number(claim.difference, '+#.3g')}</dd></div></dl>"
        f"<p class=note>{'; '.join(note)}</p></article>"
    )


def _heading(run: RunFolder) -> str:
    return ROLES.get(run.role) or ROLES.get(run.config.get("stage"), "Training")


def _figures(runs: Sequence[RunFolder]) -> Iterator[str]:
    """Yield a figure for each scalar and heading: all runs, one colour for each role."""
    headings = dict.fromkeys(map(_heading, runs))
    for (name, (quantity, label)), heading in itertools.product(CURVES.items(), headings):
        shown = [r for r in runs if _heading(r) == heading and any(name in row for row in r.rows)]
        if not shown:
            continue
        roles = dict.fromkeys(run.role for run in shown)
        colours = {role: number % NUM_COLOURS for number, role in enumerate(roles)}
        legend = "".join(f"<b class=c{i}>{_escape(role)}</b> " for role, i in colours.items())
        note = "<span>(dots: held out; thin: training)</span>" if name == "nats" else ""
        yield (
            f'<figure><div role=img aria-label="{heading}: {quantity} by update">'
            f"{_svg(shown, colours, name)}</div><figcaption>{heading}, {label}: {legend}{note}"
            "</figcaption></figure>"
        )


def _svg(runs: Sequence[RunFolder], colours: dict[str, int], name: str) -> str:
    """Draw a scalar over updates as SVG, in colours of the style sheet."""
    import matplotlib
    from matplotlib import figure

    # Placeholder colours, replaced by CSS variables below; matplotlib itself uses none of them.
    ink, names = "#0a0b0c", [f"#0a0b{i:02d}" for i in range(NUM_COLOURS)]
    keys = ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    style = dict.fromkeys((*keys, "text.color", "grid.color"), ink)
    style |= {"svg.fonttype": "none", "svg.hashsalt": "lm"}
    style |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    with matplotlib.rc_context(style):
        canvas = figure.Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = canvas.subplots()
        for run in runs:
            colour = names[colours[run.role]]
            axes.plot(*run.series("train", name), color=colour, linewidth=0.8, alpha=0.5)
            axes.plot(*run.series("heldout", name), "o-", color=colour, linewidth=1.6, ms=3)
        axes.set_xlabel("updates")
        axes.grid(axis="y", alpha=0.15)
        file = io.StringIO()
        canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    # Remove prologue and metadata, which contain URLs, and fonts.
    svg = file.getvalue().partition("</metadata>")[2]
    svg = re.sub(r'<style.*?</style>|font-family: [^;"]*;?|(?<=<g) id="[^"]*"', "", svg, flags=re.S)
    for colour, name in [(ink, "ink"), *((names[i], f"c{i}") for i in range(NUM_COLOURS))]:
        svg = svg.replace(colour, f"var(--{name})")
    return f'<svg viewBox="0 0 {72 * WIDTH:g} {72 * HEIGHT:g}">{svg}'  # 72 points an inch


def _results(runs: Sequence[RunFolder]) -> str:
    """Render a table with a row for each run, each of its tasks, and each baseline."""
    scores = [s for run in runs for s in (run.scores, *run.scores.get("tasks", {}).values())]
    columns = [key for key in SCORES if any(key in row for row in scores)]

    def row(label, scores, parameters=None, updates=None, rate=None, seconds=None, kind=""):
        time = "–" if seconds is None else str(datetime.timedelta(seconds=round(seconds)))
        cells = [_number(parameters, ","), _number(updates, ",")]
        cells += [_score(scores, key) for key in columns] + [_number(rate, ",.0f"), time]
        cells = "".join(f"<td>{cell}</td>" for cell in cells)
        return f"<tr{kind}><th scope=row>{_escape(label)}</th>{cells}</tr>\n"

    headings = ["run", "parameters", "updates", *(SCORES[key] for key in columns)]
    headings += ["tokens per second", "training time"]
    body = ""
    for run in runs:
        rate, seconds = run.tokens_per_second, run.training_seconds
        parameters = run.manifest.get("params")
        body += row(run.label, run.scores, parameters, run.updates, rate, seconds)
        for task, scores in run.scores.get("tasks", {}).items():
            body += row(f"{run.label}: {task}", scores, updates=run.updates)
    for label, scores in _baselines(runs):
        body += row(label, scores, kind=" class=baseline")
    return f"<div class=wide>{_table(headings, body)}</div>"


def _table(headings: Iterable[str], body: str) -> str:
    head = "".join(f"<th scope=col>{name}</th>" for name in headings)
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"


def _score(scores: dict, key: str) -> str:
    """Format a score above its 95 % interval."""
    interval = scores.get("intervals", {}).get(key)
    suffix = f"<small>{interval[0]:#.4g} to {interval[1]:#.4g}</small>" if interval else ""
    return _number(scores.get(key)) + suffix


def _score_curve(run: RunFolder) -> str:
    """Embed a run's curve.png."""
    if not run.curve:
        return ""
    data = base64.b64encode(run.curve).decode()
    return (
        f'<figure><img alt="{_escape(run.label)}: scores by update" src="data:image/png;base64,'
        f'{data}"><figcaption>{_escape(run.label)}: bands are 95 % intervals, stars the best, '
        "dashes the lead baseline</figcaption></figure>"
    )


def _baselines(runs: Sequence[RunFolder]) -> list[tuple[str, dict]]:
    """List (label, scores) of each baseline in the runs' scores; equal ones are merged."""
    kinds = {
        "unigram model": {"text_nats": "unigram_entropy"},
        "lead baseline": {f"rouge{n}": f"lead_rouge{n}" for n in "12L"},
    }
    roles: dict = collections.defaultdict(dict)  # of each (kind, scores)
    for kind, keys in kinds.items():
        for run in runs:
            scores = tuple((score, run.scores.get(key)) for score, key in keys.items())
            if any(value is not None for _, value in scores):
                roles[kind, scores][run.role] = True
    return [(f"{kind} ({', '.join(r)})", dict(scores)) for (kind, scores), r in roles.items()]


def _goodput(runs: Sequence[RunFolder]) -> str:
    """Render the wall time of each run, and the share of each kind of time."""
    runs = [run for run in runs if run.goodput.get("wall")]
    if not runs:
        return ""
    meanings = logs.KINDS | logs.OUTSIDE
    kinds = [kind for kind in meanings if any(run.goodput["shares"][kind] for run in runs)]
    body = ""
    for run in runs:
        wall = str(datetime.timedelta(seconds=round(run.goodput["wall"])))
        shares = "".join(f"<td>{_number(run.goodput['shares'][k], '.1%')}</td>" for k in kinds)
        cells = f"<td>{wall}</td><td>{run.goodput['sessions']}</td>{shares}"
        body += f"<tr><th scope=row>{_escape(run.label)}</th>{cells}</tr>\n"
    table = _table(("run", "wall time", "sessions", *kinds), body)
    legend = "; ".join(f"{kind}: {meanings[kind]}" for kind in kinds)
    note = "Each second of wall time, from the first start to the last row, is of one kind"
    return f"<div class=wide>{table}</div><p class=note>{note}. {legend}.</p>"


def _events(run: RunFolder) -> str:
    """Render the number of events of each kind, and the last events."""
    if not run.events:
        return ""
    counts = collections.Counter(row["event"] for row in run.events)
    summary = ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()))
    items = ""
    for row in run.events[-MAX_EVENTS:]:
        details = [f"{k} {v}" for k, v in row.items() if k not in ("step", "event", "time")]
        text = _abridge(", ".join([row["event"], *details]))
        items += f"<li>update {row['step']}: {_escape(text)}</li>"
    return f"<h3>{_escape(run.label)}</h3><p>{_escape(summary)}</p><ul class=note>{items}</ul>"


def _samples(runs: Sequence[RunFolder]) -> Iterator[str]:
    """Yield inputs with the reference and the answers of the first seed of each role."""
    samples: dict = {}  # inputs: (reference, {label: prediction})
    for run in runs:
        if run.seed == min(r.seed for r in runs if r.role == run.role):
            for row in run.samples:
                _, answers = samples.setdefault(row["inputs"], (row["targets"], {}))
                answers[run.label] = row["prediction"]
    counts = collections.Counter()
    for inputs, (reference, answers) in samples.items():
        counts[tuple(answers)] += 1
        if counts[tuple(answers)] <= MAX_SAMPLES:
            texts = {"reference": reference, **answers}
            columns = "".join(
                f"<div><h4>{_escape(label)}</h4><p dir=auto>{_escape(_abridge(text))}</p></div>"
                for label, text in texts.items()
            )
            yield (
                f"<article class=sample><p class=inputs dir=auto>{_escape(_abridge(inputs))}</p>"
                f"<div class=answers>{columns}</div></article>"
            )


def _provenance(run: RunFolder) -> str:
    """Render the commands, versions and config of a run."""
    commands = [c for c in (run.manifest.get("command"), run.scores.get("command")) if c]
    signatures = [
        f"{metric}: {signature}"
        for scores in (run.scores, *run.scores.get("tasks", {}).values())
        for metric, signature in scores.get("signatures", {}).items()
    ]
    versions = [f"{name} {v}" for name, v in run.manifest.get("versions", {}).items()]
    commit = run.manifest.get("commit")
    facts = [f"commit {commit}"] * bool(commit) + versions + list(dict.fromkeys(signatures))
    config = json.dumps(run.config, indent=2, sort_keys=True)
    return (
        f"<h3>{_escape(run.label)}</h3><pre>{_escape(chr(10).join(commands))}</pre>"
        f"<p class=note>{_escape(', '.join(facts))}</p><details><summary>resolved config</summary>"
        f"<pre>{_escape(config)}</pre></details>"
    )
