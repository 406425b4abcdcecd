"""Laws of the report: a self-contained page with the figures of the run folders and the claims."""

from __future__ import annotations

import base64
import html.parser
import json
import math
import re
import statistics

import pytest

from experiments import verdicts
from lm import report

HOSTILE = "<script>alert('&')</script>\"'\u202e\x85\u2028\ud800 {title} {0} %s"


def run_folder(root, name, *, role="pretrain", seed=0, scores=None, samples=(), **files):
    """Write a run folder as training and evaluation do."""
    folder = root / name
    folder.mkdir(parents=True)
    stage = {"scratch": "finetune", "alone": "finetune"}.get(role, role)
    config = {"stage": stage, "name": role, "seed": seed, "steps": 20, **files.get("config", {})}
    manifest = {"command": f"python -m lm train --workdir={name}", "params": 1234, "commit": "f00d"}
    rows = [
        {"step": 10, "split": "train", "loss": 5.0, "nats": 5.0},
        {"step": 10, "split": "heldout", "nats": 5.25},
        {
            "step": 20,
            "split": "train",
            "nats": 4.0,
            "tokens_per_second": 100.0,
            "step_seconds": 2.0,
        },
    ]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "run.json").write_text(json.dumps(manifest | files.get("manifest", {})))
    lines = "".join(json.dumps(row) + "\n" for row in files.get("rows", rows))
    (folder / "metrics.jsonl").write_text(lines)
    if scores is not None:
        command = {"command": f"python -m lm evaluate --workdir={name}"}
        (folder / "evaluate.json").write_text(json.dumps({"step": 20, **command, **scores}))
    if samples:
        lines = "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in samples)
        (folder / "predictions.jsonl").write_text(lines)
    return folder


def make_scores(nats, **scores):
    return {"nats": nats, "tokens": 50, **scores}


def page_of(folders, root, **options):
    options = {"claims": verdicts.demo_claims(report.read_run_folders(folders))} | options
    report.write(folders, root / "out" / "report.html", title="lm", **options)
    return (root / "out" / "report.html").read_text("utf-8")


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path


class Parsed(html.parser.HTMLParser):
    """The tags, attributes and text of a page; fails if tags are not nested."""

    VOID = {"meta", "br", "use", "img"}

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def demo(out):
    """Three seeds of five roles, all evaluated."""
    folders = []
    for i, role in enumerate(("pretrain", "finetune", "scratch", "distill", "alone")):
        for seed in range(3):
            nats = 2.0 + i + seed / 8 + 1 / 3
            scores = make_scores(
                nats, bits_per_byte=nats / 7, text_nats=nats / 3, unigram_entropy=6.5
            )
            if role != "pretrain":
                scores |= {f"rouge{n}": 30 / nats + j for j, n in enumerate("12L")}
                scores |= {f"lead_rouge{n}": 20.125 + j for j, n in enumerate("12L")}
            answers = [
                {"inputs": f"body {k}", "targets": f"gold {k}", "prediction": f"{role} says {k}"}
                for k in range(9)
            ]
            samples = answers if role != "pretrain" else ()
            folders.append(
                run_folder(
                    out, f"{role}{seed}", role=role, seed=seed, scores=scores, samples=samples
                )
            )
    return folders


def test_the_page_loads_no_resource_and_runs_no_script(demo, out):
    page = page_of(demo, out)
    parsed = Parsed(page)
    assert not {"script", "link", "img", "iframe", "object", "base", "form"} & set(parsed.tags)
    for name, value in parsed.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith("#")
    assert "://" not in page
    assert "@import" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}


def test_the_same_folders_give_the_same_page(demo, out):
    assert page_of(demo, out) == page_of(demo, out)


def cells(page):
    """Parse the results table: {row heading: {column heading: exact value}}."""
    table = page[page.index("<table>") : page.index("</table>")]
    heads = re.findall(r"<th scope=col>(.*?)</th>", table)
    rows = {}
    for row in re.findall(r"<tr[^>]*><th scope=row>.*?</tr>", table):
        label = re.search(r"<th scope=row>(.*?)</th>", row).group(1)
        values = [re.search(r'value="(.*?)"', cell) for cell in re.findall(r"<td>(.*?)</td>", row)]
        exact = [float(match.group(1)) if match else None for match in values]
        rows[label] = dict(zip(heads[1:], exact, strict=True))
    return rows


HEADINGS = {
    "nats": "nats per token",
    "bits_per_byte": "bits per byte",
    "text_nats": "nats per text token",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
}


def test_the_table_has_the_figures_of_the_folders(demo, out):
    rows = cells(page_of(demo, out))
    for folder in demo:
        scores = json.loads((folder / "evaluate.json").read_text())
        row = rows[f"{folder.name[:-1]}, seed {folder.name[-1]}"]
        for key, heading in HEADINGS.items():
            assert row[heading] == scores.get(key)
        assert (row["parameters"], row["updates"], row["tokens per second"]) == (1234, 20, 100)
    assert rows["unigram model (pretrain, finetune, scratch, distill, alone)"] == {
        **dict.fromkeys(rows["pretrain, seed 0"]),
        "nats per text token": 6.5,
    }
    lead = rows["lead baseline (finetune, scratch, distill, alone)"]
    assert [lead[f"ROUGE-{n}"] for n in "12L"] == [20.125, 21.125, 22.125]
    assert len(rows) == len(demo) + 2


def test_the_page_has_intervals_tasks_and_signatures(out):
    bleu = {"bleu": 12.5, "intervals": {"bleu": [11.25, 13.75]}, "signatures": {"bleu": "nrefs:1"}}
    scores = make_scores(2.0, intervals={"nats": [1.5, 2.5]}, tasks={"en_de": bleu})
    page = page_of([run_folder(out, "a", scores=scores)], out)
    rows = cells(page)
    assert rows["pretrain, seed 0: en_de"]["BLEU"] == 12.5
    assert rows["pretrain, seed 0"]["BLEU"] is None
    assert "1.500 to 2.500" in page and "11.25 to 13.75" in page and "bleu: nrefs:1" in page


def test_the_page_has_the_curve_of_the_checkpoints(out):
    folder = run_folder(out, "a", scores=make_scores(2.0))
    assert "img" not in Parsed(page_of([folder], out)).tags
    (folder / "curve.png").write_bytes(b"\x89PNG data")
    parsed = Parsed(page_of([folder], out))
    (source,) = [value for name, value in parsed.attributes if name == "src"]
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == b"\x89PNG data"


def test_figures_have_four_digits(out):
    page = page_of([run_folder(out, "a", scores=make_scores(2.34567))], out)
    assert '<data value="2.34567">2.346</data>' in page


def test_hostile_text_is_escaped(out):
    samples = [{"inputs": HOSTILE, "targets": HOSTILE, "prediction": HOSTILE}]
    folder = run_folder(
        out,
        "a",
        role=HOSTILE,
        scores=make_scores(1.0, command=HOSTILE),
        samples=samples,
        config={"note": HOSTILE},
        manifest={"command": HOSTILE, "commit": HOSTILE, "versions": {HOSTILE: HOSTILE}},
    )
    claim = report.Claim(HOSTILE, HOSTILE, True, (0,), (1.0,), (2.0,))
    report.write([folder], out / "out" / "report.html", title=HOSTILE, claims=[claim])
    page = (out / "out" / "report.html").read_text("utf-8")
    parsed = Parsed(page)
    assert "script" not in parsed.tags
    assert "<script" not in page
    assert "".join(parsed.text).count("<script>alert('&')</script>") >= 11


def test_samples_show_the_reference_and_the_answer_of_each_model(demo, out):
    page = page_of(demo, out)
    samples = page[page.index("<section id=samples>") : page.index("<section id=rows>")]
    first = samples[: samples.index("</article>")]
    labels = re.findall(r"<h4>(.*?)</h4>", first)
    assert labels == ["reference"] + [
        f"{r}, seed 0" for r in ("finetune", "scratch", "distill", "alone")
    ]
    for text in ("body 0", "gold 0", "finetune says 0", "alone says 0"):
        assert text in first
    assert samples.count("<article") == 5


def test_long_texts_are_abridged_with_a_mark(out):
    samples = [{"inputs": "word " * 500, "targets": "t", "prediction": "p"}]
    page = page_of([run_folder(out, "a", samples=samples)], out)
    assert "word […]" in page
    assert "word " * 100 not in page


def test_each_run_has_its_commands_and_its_config(demo, out):
    page = page_of(demo, out)
    for folder in demo:
        assert f"python -m lm train --workdir={folder.name}\n" in page
        assert f"python -m lm evaluate --workdir={folder.name}<" in page
    assert page.count("<details>") == len(demo)
    assert page.count("commit f00d") == len(demo)


def test_runs_with_the_same_heading_share_a_figure(demo, out):
    page = page_of(demo, out)
    labels = re.findall(r'aria-label="(.*?): loss', page)
    assert labels == ["Pre-training", "Fine-tuning", "Distillation"]
    assert page.count("<svg") == 3
    assert page.count("var(--c1)") > 2


def test_a_run_that_is_not_evaluated_has_a_page(out):
    folder = run_folder(out, "wiki", role="", config={"stage": "pretrain"})
    page = page_of([folder], out)
    assert "One training run" in page
    assert cells(page)["pretrain, seed 0"]["updates"] == 20
    assert "<section id=claims>" not in page
    assert "<section id=samples>" not in page


def test_a_run_without_log_rows_has_a_page(out):
    page = page_of([run_folder(out, "a", rows=[])], out)
    assert cells(page)["pretrain, seed 0"]["updates"] == 0
    assert "<svg" not in page


def test_a_truncated_log_and_a_diverged_run_have_a_page(out):
    rows = [
        {"step": s, "split": "train", "nats": v} for s, v in ((1, 3.0), (2, "NaN"), (3, "Infinity"))
    ]
    folder = run_folder(out, "a", rows=rows, scores=make_scores(math.inf))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "na')
    page = page_of([folder], out)
    assert report.read_run_folder(folder).rows[-1]["step"] == 3
    assert cells(page)["pretrain, seed 0"]["nats per token"] == math.inf


def test_training_time_is_the_sum_of_step_times(out):
    def row(step, **values):
        return {"step": step, "split": "train", **values}

    rows = [row(10), row(20, step_seconds=1.0), row(40, step_seconds=3.0), row(50)]
    run = report.read_run_folder(run_folder(out, "a", rows=rows))
    # The first 10 and, after a restart, the last 10 are unmeasured and count as the median, 2 s.
    assert run.training_seconds == 20 + 10 + 60 + 20
    assert report.read_run_folder(run_folder(out, "b", rows=[row(10)])).training_seconds is None


def test_tokens_per_second_is_the_median_rate(out):
    rates = (100.0, 1.0, 120.0, 110.0, 900.0)
    rows = [
        {"step": i, "split": "train", "tokens_per_second": rate} for i, rate in enumerate(rates)
    ]
    run = report.read_run_folder(run_folder(out, "a", rows=rows))
    assert run.tokens_per_second == 110.0
    assert report.read_run_folder(run_folder(out, "b", rows=[])).tokens_per_second is None


def test_a_folder_that_is_not_a_run_raises(out):
    with pytest.raises(ValueError, match=r"out has no config.json, so it is not a run folder"):
        report.write([out / "out"], out / "report.html", title="x")
    with pytest.raises(ValueError, match="no run folder to report on"):
        report.write([], out / "report.html", title="x")
    folder = run_folder(out, "a")
    (folder / "evaluate.json").write_text('{"nats": ')
    with pytest.raises(ValueError, match=r"evaluate.json is not JSON"):
        report.read_run_folder(folder)
    assert not (out / "report.html").exists()


def test_plain_files_among_the_folders_are_skipped(out):
    folder = run_folder(out, "a")
    (out / "report.html").write_text("an older report")
    assert [run.path for run in report.read_run_folders([out / "report.html", folder])] == [folder]


def test_a_claim_that_does_not_hold_is_on_the_page_with_its_figures(out):
    folders = [
        run_folder(out, f"{role}{seed}", role=role, seed=seed, scores=make_scores(nats))
        for role, losses in (("finetune", (4.0, 4.5)), ("scratch", (3.0, 3.25)))
        for seed, nats in enumerate(losses)
    ]
    page = page_of(folders, out)
    claims = page[page.index("<section id=claims>") : page.index("<section id=curves>")]
    assert "<strong>does not hold (in 0 of 2 seeds)</strong>" in claims
    assert 'class="claim fails"' in claims
    values = [float(value) for value in re.findall(r'<data value="(.*?)"', claims)]
    assert values == [4.25, 3.125, 1.125, 4.0, 3.0, 4.5, 3.25]
    assert f"± {statistics.stdev((4.0, 4.5)):#.2g}" in claims


def test_a_claim_with_a_diverged_seed_does_not_hold(out):
    folder = run_folder(out, "a")
    claim = report.Claim("s", "u", True, (0, 1), (math.inf, 1.0), (2.0, math.nan))
    page = page_of([folder], out, claims=[claim])
    assert "does not hold (in 0 of 2 seeds)" in page
    assert "± 0" not in page


def test_runs_with_equal_role_and_seed_have_distinct_labels_and_no_claims(out):
    scores = make_scores(2.0, text_nats=2.0, unigram_entropy=3.0)
    folders = [run_folder(out, name, scores=scores) for name in "ab"]
    runs = report.read_run_folders(folders)
    assert len({run.label for run in runs}) == 2
    assert verdicts.demo_claims(runs) == []
    assert len(cells(page_of(folders, out))) == 3


def run_folder_with_events(out, name):
    """Write the folder of a run that was killed once, with goodput and events."""
    folder = run_folder(out, name)
    rows = [
        dict(session=0, step=0, start=100.0, time=104.0, seconds={"start": 4.0}),
        dict(session=0, step=20, start=100.0, time=124.0, seconds={"start": 4.0, "step": 20.0}),
        dict(session=1, step=10, start=130.0, time=134.0, seconds={"restore": 4.0}),
        dict(session=1, step=20, start=130.0, time=140.0, seconds={"restore": 4.0, "step": 6.0}),
    ]
    events = [dict(step=i, event="spike", loss=9.5, time=1.0) for i in range(30)]
    events += [dict(step=7, event=HOSTILE, note=HOSTILE, time=2.0)]
    for file, lines in (("goodput.jsonl", rows), ("events.jsonl", events)):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


def test_the_page_has_the_shares_of_wall_time(out):
    page = page_of([run_folder_with_events(out, "a"), run_folder(out, "b", seed=1)], out)
    Parsed(page)
    section = page[page.index("<section id=time>") : page.index("<section id=events>")]
    heads = re.findall(r"<th scope=col>(.*?)</th>", section)
    assert heads == ["run", "wall time", "sessions", "start", "step", "restore", "lost", "down"]
    shares = [float(value) for value in re.findall(r'<data value="(.*?)"', section)]
    # Of 40 s: start 4, step 10 + 6, restore 4, lost 10, down 6.
    assert shares == pytest.approx([0.1, 0.4, 0.1, 0.25, 0.15])
    assert "<td>0:00:40</td><td>2</td>" in section and section.count("<th scope=row>") == 1
    assert '<data value="0.25">25.0%</data>' in section


def test_the_page_has_event_counts_and_the_last_events(out):
    page = page_of([run_folder_with_events(out, "a")], out)
    section = page[page.index("<section id=events>") : page.index("<section id=rows>")]
    assert section.count("<li>") == 20
    assert "spike 30" in section and "update 29: spike, loss 9.5" in section
    assert "<script" not in page
    page = page_of([run_folder(out, "b")], out)
    assert "<section id=events>" not in page and "<section id=time>" not in page


def test_learning_rates_and_gradient_norms_have_figures_if_logged(out):
    rows = [
        {"step": s, "split": "train", "nats": 4.0, "learning_rate": 0.1 / s, "gradient_norm": 1.0}
        for s in (1, 2, 3)
    ]
    page = page_of([run_folder(out, "a", rows=rows), run_folder(out, "b", role="distill")], out)
    assert re.findall(r'aria-label="(.*?) by update"', page) == [
        "Pre-training: loss",
        "Distillation: loss",
        "Pre-training: learning rate",
        "Pre-training: gradient norm",
    ]
    assert page.count("<svg") == 4
