"""The page: one self-contained HTML file, with styles and curves inline.

It loads nothing, runs no script, and holds nothing but what is in the folders, so the same folders
give the same bytes.
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
import re
import statistics
from collections.abc import Iterable, Sequence

from lm import logs
from lm.report import run_folders, verdicts

SAMPLES, ABRIDGED = 5, 420  # samples a group of models; characters of a text shown
EVENTS = 20  # the last events of a run that are shown
COLOURS = 6
CURVES = {  # a scalar that is drawn over the updates: its name, and what stands below it
    "nats": ("loss", "nats per token"),
    "learning_rate": ("learning rate", "learning rate"),
    "gradient_norm": ("gradient norm", "norm of the gradient"),
}
WIDTH, HEIGHT = 5, 3  # of a drawing, in inches: its letters are legible on a phone


def write(
    rundirs: Iterable[str | os.PathLike],
    out: str | os.PathLike,
    *,
    title: str,
    claims: Sequence[verdicts.Claim] | None = None,
) -> None:
    """Write one page about the run folders to `out`. claims: by default those of `demo_claims`.

    Raises ValueError as `read_runs` and `demo_claims` do.
    """
    runs = run_folders.read_run_folders(rundirs)
    claims = verdicts.demo_claims(runs) if claims is None else claims
    sections = (
        ("claims", "Claims", "".join(map(_claim, claims))),
        ("curves", "Curves", "".join(_panels(runs))),
        ("scores", "Scores of the checkpoints", "".join(map(_scores, runs))),
        ("results", "Results", _table(runs)),
        ("time", "Where the time went", _times(runs)),
        ("events", "Events", "".join(map(_events, runs))),
        ("samples", "Samples", "".join(_samples(runs))),
        ("rows", "What made each row", "".join(map(_origin, runs))),
    )
    body = "".join(
        f"<section id={name}><h2>{heading}</h2>{text}</section>\n"
        for name, heading, text in sections
        if text
    )
    page = _PAGE.format(style=_STYLE, title=_text(title), intro=_intro(runs), body=body)
    logs.write_atomically(out, page)


def _text(value) -> str:
    return html.escape(str(value))


def _number(value: float | None, form: str = "#.4g") -> str:
    """A figure to four places, with all of its digits for machines beside it."""
    if value is None:
        return "–"
    return f'<data value="{value!r}">{value:{form}}</data>'.replace(">-", ">−")


def _intro(runs: Sequence[run_folders.RunFolder]) -> str:
    panels = dict.fromkeys(_panel(run).lower() for run in runs)
    what = f"{len(runs)} training runs" if len(runs) > 1 else "One training run"
    return (
        f"{what} of encoder-decoder language models ({_text(', '.join(panels))}). Scores are "
        "of text held out from training. Losses are in nats, lower is better: per token as trained "
        "on, or per text token, without sentinels and end marks, to stand beside a unigram model "
        "of the same tokens. Bits per byte compares across tokenizers; ROUGE, higher is better, "
        "compares answers with references. Training time is that of the updates alone."
    )


def _claim(claim: verdicts.Claim) -> str:
    def spread(values):
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
        f"<p><strong>{_text(claim.verdict)}</strong> {_text(claim.sentence)}</p>"
        f"<dl><div><dt>{_text(claim.unit)}</dt><dd>{spread(claim.figures)}</dd></div>"
        f"<div><dt>baseline</dt><dd>{spread(claim.baselines)}</dd></div>"
        f"<div><dt>difference</dt><dd>{_number(claim.difference, '+#.3g')}</dd></div></dl>"
        f"<p class=note>{'; '.join(note)}</p></article>"
    )


def _panel(run: run_folders.RunFolder) -> str:
    return run_folders.ROLES.get(run.role) or run_folders.ROLES.get(
        run.config.get("stage"), "Training"
    )


def _panels(runs: Sequence[run_folders.RunFolder]) -> Iterable[str]:
    """A figure for each panel and curve that has points: all its runs, a colour a role."""
    panels = dict.fromkeys(map(_panel, runs))
    for (name, (what, below)), panel in itertools.product(CURVES.items(), panels):
        drawn = [r for r in runs if _panel(r) == panel and any(name in row for row in r.rows)]
        if not drawn:
            continue
        colours = {role: i % COLOURS for i, role in enumerate(dict.fromkeys(r.role for r in drawn))}
        key = "".join(f"<b class=c{i}>{_text(role)}</b> " for role, i in colours.items())
        note = "<span>(dots: held out; thin: training)</span>" if name == "nats" else ""
        yield (
            f'<figure><div role=img aria-label="{panel}: {what} by update">'
            f"{_curves(drawn, colours, name)}</div><figcaption>{panel}, {below}: {key}{note}"
            "</figcaption></figure>"
        )


def _curves(runs: Sequence[run_folders.RunFolder], colours: dict[str, int], name: str) -> str:
    """A scalar of some runs over updates, as SVG whose colours are the page's variables."""
    import matplotlib
    from matplotlib import figure

    # Placeholders that no colour of matplotlib's own equals; the style sheet decides later.
    ink, names = "#0a0b0c", [f"#0a0b{i:02d}" for i in range(COLOURS)]
    style = {
        key: ink for key in ("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    }
    style |= {"text.color": ink, "grid.color": ink, "svg.fonttype": "none", "svg.hashsalt": "lm"}
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
        drawing = io.StringIO()
        canvas.savefig(drawing, format="svg", transparent=True, metadata={"Date": None})
    # Without its prologue and metadata, which name the addresses of standards, and its own fonts.
    svg = drawing.getvalue().partition("</metadata>")[2]
    svg = re.sub(r'<style.*?</style>|font-family: [^;"]*;?|(?<=<g) id="[^"]*"', "", svg, flags=re.S)
    for place, name in [(ink, "ink"), *((names[i], f"c{i}") for i in range(COLOURS))]:
        svg = svg.replace(place, f"var(--{name})")
    return f'<svg viewBox="0 0 {72 * WIDTH:g} {72 * HEIGHT:g}">{svg}'  # 72 points an inch


def _table(runs: Sequence[run_folders.RunFolder]) -> str:
    """A row a run, then the baselines that the runs were measured beside."""
    found = [part for run in runs for part in (run.scores, *run.scores.get("tasks", {}).values())]
    scored = [key for key in run_folders.SCORES if any(key in scores for scores in found)]

    def row(label, parameters, updates, scores, rate, seconds, kind=""):
        time = "–" if seconds is None else str(datetime.timedelta(seconds=round(seconds)))
        cells = [_number(parameters, ","), _number(updates, ",")]
        cells += [_score(scores, key) for key in scored] + [_number(rate, ",.0f"), time]
        cells = "".join(f"<td>{cell}</td>" for cell in cells)
        return f"<tr{kind}><th scope=row>{_text(label)}</th>{cells}</tr>\n"

    heads = ["run", "parameters", "updates", *(run_folders.SCORES[key] for key in scored)]
    heads += ["tokens per second", "training time"]
    body = ""
    for run in runs:
        rate, seconds = run.tokens_per_second, run.training_seconds
        parameters = run.manifest.get("params")
        body += row(run.label, parameters, run.updates, run.scores, rate, seconds)
        for task, scores in run.scores.get("tasks", {}).items():
            body += row(f"{run.label}: {task}", None, run.updates, scores, None, None)
    for label, scores in _baselines(runs):
        body += row(label, None, None, scores, None, None, " class=baseline")
    head = "".join(f"<th scope=col>{name}</th>" for name in heads)
    head = f"<thead><tr>{head}</tr></thead>\n"
    return f"<div class=wide><table>{head}<tbody>{body}</tbody></table></div>"


def _score(scores: dict, key: str) -> str:
    """A score, and below it its 95 % interval."""
    ends = scores.get("intervals", {}).get(key)
    below = ends and f"<small>{ends[0]:#.4g} to {ends[1]:#.4g}</small>"
    return _number(scores.get(key)) + (below or "")


def _scores(run: run_folders.RunFolder) -> str:
    """The picture of a run's scores by checkpoint, where one was drawn."""
    if not run.curve:
        return ""
    inline = base64.b64encode(run.curve).decode()
    return (
        f'<figure><img alt="{_text(run.label)}: scores by update" src="data:image/png;base64,'
        f'{inline}"><figcaption>{_text(run.label)}: bands are 95 % intervals, stars the best, '
        "dashes the lead baseline</figcaption></figure>"
    )


def _baselines(runs: Sequence[run_folders.RunFolder]) -> list[tuple[str, dict]]:
    """(label, scores) of each baseline in the runs' scores; runs with equal figures share it."""
    keys = {
        "unigram model": {"text_nats": "unigram_entropy"},
        "lead baseline": {f"rouge{n}": f"lead_rouge{n}" for n in "12L"},
    }
    found = {}
    for name, wanted in keys.items():
        for run in runs:
            scores = {k: run.scores[theirs] for k, theirs in wanted.items() if theirs in run.scores}
            if scores:
                roles = found.setdefault((name, *scores.items()), (scores, {}))[1]
                roles[run.role] = True
    return [(f"{k[0]} ({', '.join(roles)})", scores) for k, (scores, roles) in found.items()]


def _times(runs: Sequence[run_folders.RunFolder]) -> str:
    """A row a run that kept account: its wall time, and the share of each kind of time in it."""
    told = [run for run in runs if run.spent.get("wall")]
    kinds = [k for k in (*logs.KINDS, *logs.OUTSIDE) if any(r.spent["shares"][k] for r in told)]
    body = ""
    for run in told:
        wall = str(datetime.timedelta(seconds=round(run.spent["wall"])))
        shares = "".join(f"<td>{_number(run.spent['shares'][k], '.1%')}</td>" for k in kinds)
        cells = f"<td>{wall}</td><td>{run.spent['sessions']}</td>{shares}"
        body += f"<tr><th scope=row>{_text(run.label)}</th>{cells}</tr>\n"
    heads = "".join(f"<th scope=col>{k}</th>" for k in ("run", "wall time", "sessions", *kinds))
    words = "; ".join(f"{k}: {(logs.KINDS | logs.OUTSIDE)[k]}" for k in kinds)
    table = f"<table><thead><tr>{heads}</tr></thead>\n<tbody>{body}</tbody></table>"
    note = "Every second of wall time, from the first start to the last row, has one kind"
    return f"<div class=wide>{table}</div><p class=note>{note}. {words}.</p>" if told else ""


def _events(run: run_folders.RunFolder) -> str:
    """How often each kind of event came, and the last of them."""
    if not run.events:
        return ""
    counts = collections.Counter(row["event"] for row in run.events)
    told = ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()))
    items = ""
    for row in run.events[-EVENTS:]:
        facts = {k: v for k, v in row.items() if k not in ("step", "event", "time")}
        said = ", ".join([row["event"], *(f"{k} {v}" for k, v in facts.items())])
        items += f"<li>update {row['step']}: {_text(_abridged(said))}</li>"
    return f"<h3>{_text(run.label)}</h3><p>{_text(told)}</p><ul class=note>{items}</ul>"


def _samples(runs: Sequence[run_folders.RunFolder]) -> Iterable[str]:
    """Inputs and references, with the answers of every model that was asked them side by side."""
    asked = {}  # inputs: (reference, {label: prediction})
    for run in runs:
        if run.seed == min(other.seed for other in runs if other.role == run.role):
            for row in run.samples:
                answers = asked.setdefault(row["inputs"], (row["targets"], {}))[1]
                answers[run.label] = row["prediction"]
    shown = collections.Counter()
    for inputs, (reference, answers) in asked.items():
        shown[tuple(answers)] += 1
        if shown[tuple(answers)] <= SAMPLES:
            texts = {"reference": reference, **answers}
            parts = "".join(
                f"<div><h4>{_text(label)}</h4><p dir=auto>{_text(_abridged(text))}</p></div>"
                for label, text in texts.items()
            )
            yield (
                f"<article class=sample><p class=asked dir=auto>{_text(_abridged(inputs))}</p>"
                f"<div class=answers>{parts}</div></article>"
            )


def _abridged(text: str) -> str:
    return text if len(text) <= ABRIDGED else text[:ABRIDGED].rstrip() + " […]"


def _origin(run: run_folders.RunFolder) -> str:
    """The commands, code and config behind one row."""
    commands = [c for c in (run.manifest.get("command"), run.scores.get("command")) if c]
    signed = [
        f"{word}: {said}"
        for part in (run.scores, *run.scores.get("tasks", {}).values())
        for word, said in part.get("signatures", {}).items()
    ]
    versions = [f"{name} {v}" for name, v in run.manifest.get("versions", {}).items()]
    commit = run.manifest.get("commit")
    facts = [f"commit {commit}"] * bool(commit) + versions + list(dict.fromkeys(signed))
    config = json.dumps(run.config, indent=2, sort_keys=True)
    return (
        f"<h3>{_text(run.label)}</h3><pre>{_text(chr(10).join(commands))}</pre>"
        f"<p class=note>{_text(', '.join(facts))}</p><details><summary>resolved config</summary>"
        f"<pre>{_text(config)}</pre></details>"
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<style>{style}</style></head>
<body><header><h1>{title}</h1><p>{intro}</p></header>
{body}</body></html>
"""

_STYLE = """
:root { --ink: #1d2126; --soft: #5f6872; --line: #dde1e6; --paper: #fff; --sheet: #f6f7f9;
  --good: #1f7a4a; --bad: #b3261e;
  --c0: #2563ab; --c1: #c2571a; --c2: #2b8a57; --c3: #8b4a9c; --c4: #7a6a1a; --c5: #b03a5b }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --soft: #98a2ad; --line: #343b44;
  --paper: #14171b; --sheet: #1c2026; --good: #6fcf9b; --bad: #ff8a80;
  --c0: #7db3f0; --c1: #f0a06a; --c2: #6fcf9b; --c3: #cf9be0; --c4: #d8c66a; --c5: #f08aa8 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 76rem;
  background: var(--paper); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
header p { max-width: 46rem; color: var(--soft) }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 }
h2 { font-size: 1.2rem; margin: 2.8rem 0 1rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem }
h4, dt, th { font-size: .8rem; font-weight: 600; color: var(--soft); margin: 0 }
.note { font-size: .85rem; color: var(--soft); margin: .4rem 0 }
#claims, #curves { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)) }
#claims h2, #curves h2 { grid-column: 1 / -1; margin-bottom: 0 }
.claim, .sample { background: var(--sheet); border-radius: 6px; padding: 1rem 1.2rem }
.claim { border-left: 4px solid var(--bad) }
.claim p { margin: 0 }
.claim span { white-space: nowrap }
.claim strong { display: block; color: var(--bad) }
.holds { border-color: var(--good) }
.holds strong { color: var(--good) }
.claim dl { display: grid; grid-template-columns: repeat(3, auto); gap: .8rem; margin: .8rem 0;
  justify-content: space-between; overflow-wrap: normal }
.claim dd { margin: 0; font-size: 1.15rem }
.claim small, td small { display: block; font-size: .8rem; color: var(--soft) }
figure { margin: 0; max-width: 36rem }
figure svg, figure img { display: block; width: 100%; height: auto; overflow: visible }
figcaption { font-size: .85rem; color: var(--soft) }
figcaption b::before { content: "\\25cf  " }
.c0 { color: var(--c0) } .c1 { color: var(--c1) } .c2 { color: var(--c2) }
.c3 { color: var(--c3) } .c4 { color: var(--c4) } .c5 { color: var(--c5) }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; overflow-wrap: normal }
th, td { padding: .45rem .7rem; text-align: right; border-bottom: 1px solid var(--line) }
thead th { vertical-align: bottom; min-width: 5rem }
td { white-space: nowrap }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0;
  background: var(--paper); min-width: 9rem }
tbody th { color: var(--ink); font-size: .9rem; font-weight: 500 }
.baseline th, .baseline td { color: var(--soft); font-style: italic }
.sample { margin-bottom: 1rem; font-size: .92rem }
.sample p { white-space: pre-wrap; margin: .1rem 0 0 }
.asked { padding-bottom: .8rem; border-bottom: 1px solid var(--line) }
.answers { display: grid; gap: .8rem 1.4rem; padding-top: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 13rem), 1fr)) }
pre { background: var(--sheet); border-radius: 6px; padding: .7rem 1rem; margin: 0;
  font-size: .82rem; white-space: pre-wrap }
summary { cursor: pointer; font-size: .85rem; color: var(--soft) }
"""
