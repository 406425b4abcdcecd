"""Laws of evaluate: figures follow from the written predictions; intervals, splits, curves."""

from __future__ import annotations

import json
import math
import shutil

import jax
import numpy as np
import pytest
from scipy import stats

from lm import evaluate, inference, metrics, parallel, runs, tasks, train
from lm.evaluate import curve, evaluation, scores
from lm.inference import generate, loading
from tests import untrained

TASK = {  # its scores are above 0 for any answer
    "source": "tfds:pydocs",
    "inputs": "summarize: {body}",
    "targets": "{summary}",
    "metrics": ["chrf", "rouge"],
}


@pytest.fixture(scope="module")
def workdir(tiny_config, tmp_path_factory):
    """A run of 6 updates on TASK, with checkpoints 3 and 6."""
    workdir = tmp_path_factory.mktemp("scored") / "run"
    config = tiny_config(**{"stage": "finetune", "evaluate.max_decoded_examples": 10})
    config["data"] |= {"task": "mine", "custom_tasks": {"mine": TASK}}
    train.train(runs.make_run(config, workdir), jax.devices()[:2])
    return workdir


@pytest.fixture
def copied(workdir, tmp_path):
    """A copy of the run that a test may change."""
    return shutil.copytree(workdir, tmp_path / "run")


@pytest.fixture(scope="module")
def figures(workdir):
    return evaluate.evaluate(workdir)


def read_rows(workdir, name: str) -> list[dict]:
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def test_evaluating_twice_gives_the_same_bytes(workdir, figures):
    names = ("evaluate.json", "predictions.jsonl")
    first = [(workdir / name).read_bytes() for name in names]
    assert evaluate.evaluate(workdir) == figures == json.loads(first[0])
    for name in names:
        (workdir / name).unlink()
    evaluate.evaluate(workdir)
    assert [(workdir / name).read_bytes() for name in names] == first


def test_scores_and_intervals_follow_from_the_written_predictions(workdir, figures):
    rows = read_rows(workdir, "predictions.jsonl")
    texts = [row["prediction"] for row in rows], [row["targets"] for row in rows]
    assert len(rows) == figures["examples"] == 10
    for metric in TASK["metrics"]:
        for name, value in metrics.score(metric, *texts).items():
            assert figures[name] == value, name
        for name, interval in metrics.confidence_intervals(metric, *texts).items():
            assert figures["intervals"][name] == list(interval), name
    assert figures["chrf"] > 0 and figures["lead_rouge1"] > 0
    assert figures["signatures"]["chrf"].startswith("nrefs:1|case:mixed")


def test_every_score_is_in_its_interval(figures):
    names = {"nats", "perplexity", "bits_per_byte", "token_accuracy", "chrf", "lead_rougeL"}
    assert names <= figures["intervals"].keys()
    for name, (low, high) in figures["intervals"].items():
        assert low <= figures[name] <= high, name
    assert figures["perplexity"] == pytest.approx(math.exp(figures["nats"]))


def test_the_interval_of_a_loss_equals_scipys():
    rng = np.random.default_rng(1)
    weight = rng.integers(3, 30, 200).astype(float)
    nats = weight * rng.gamma(4.0, 0.5, 200)
    examples = {name: nats for name in ("nats", "text_nats", "hits", "bytes")}
    actual = scores.score_losses(examples | {"weight": weight, "text_weight": weight})
    expected = stats.bootstrap(
        (nats, weight),
        lambda a, b: a.sum() / b.sum(),
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=1000,
        rng=np.random.default_rng(2),
    ).confidence_interval
    low, high = actual["intervals"]["nats"]
    width = expected.high - expected.low
    assert abs(low - expected.low) < 0.1 * width and abs(high - expected.high) < 0.1 * width
    assert actual["tokens"] == weight.sum()


def test_concatenated_sums_give_the_loss_of_all_examples():
    rng = np.random.default_rng(3)
    names = ("nats", "weight", "hits", "bytes", "text_nats", "text_weight")
    sums = {name: rng.uniform(1, 2, 30) for name in names}
    parts = [{name: x[a:b] for name, x in sums.items()} for a, b in ((0, 7), (7, 8), (8, 30))]
    assert scores.score_losses(scores.concatenate(parts)) == scores.score_losses(sums)


def test_a_task_scorer_gives_the_scores_of_evaluate(workdir, figures):
    run, strategy, tokens, params, _ = inference.open_run(workdir)
    scorer, beats = evaluate.TaskScorer(run, strategy, tokens), []
    actual = scorer(params, beat=lambda: beats.append(1))
    assert tuple(actual) == scorer.names == ("chrf", "rouge1", "rouge2", "rougeL", "rougeLsum")
    assert actual == {name: figures[name] for name in actual}
    assert beats, "the watchdog needs beats"
    zeros = jax.tree.map(lambda leaf: 0 * leaf, params)
    assert scorer(zeros)["chrf"] != actual["chrf"]


def test_another_decoding_is_computed_and_recorded(copied, figures):
    evaluate.evaluate(copied)
    actual = evaluate.evaluate(copied, decoding="beam num_beams=3 num_return_sequences=2")
    assert actual["limits"]["decoding"] == "beam num_beams=3 num_return_sequences=2"
    assert actual["nats"] == figures["nats"]
    assert "--decoding='beam num_beams=3 num_return_sequences=2'" in actual["command"]
    rows = read_rows(copied, "predictions.jsonl")
    for row in rows:
        assert row["prediction"] == row["predictions"][0] and len(row["predictions"]) == 2
        assert row["scores"] == sorted(row["scores"], reverse=True)
    assert all("scores" not in row for row in greedy_rows(copied))
    fewer = evaluate.evaluate(copied, max_examples=3)
    assert fewer["examples"] == 3 and "--max_examples=3" in fewer["command"]
    assert fewer["tokens"] < figures["tokens"]
    with pytest.raises(ValueError, match="did you mean 'beam'"):
        evaluate.evaluate(copied, decoding="beem")


def greedy_rows(workdir) -> list[dict]:
    evaluate.evaluate(workdir)
    return read_rows(workdir, "predictions.jsonl")


@pytest.mark.slow
def test_another_split_has_other_files(copied, figures):
    evaluate.evaluate(copied)
    before = (copied / "evaluate.json").read_bytes()
    actual = evaluate.evaluate(copied, split="train[:7]")
    assert actual["examples"] == 7 and actual["split"] == "train[:7]"
    assert actual["nats"] != figures["nats"]
    assert json.loads((copied / "evaluate-train-to7.json").read_text()) == actual
    assert len(read_rows(copied, "predictions-train-to7.jsonl")) == 7
    assert (copied / "evaluate.json").read_bytes() == before
    assert evaluate.evaluate(copied, split="validation") == evaluate.evaluate(copied)
    with pytest.raises(ValueError, match="the split of pydocs='tset' is unknown; choose one of"):
        evaluate.evaluate(copied, split="tset")


def test_a_named_split_is_scored_without_limits(copied, figures):
    assert figures["examples"] == 10 and figures["examples_in_split"] == 12
    train_figures = evaluate.evaluate(copied, split="train")
    assert train_figures["examples"] == train_figures["examples_in_split"] == 60
    assert len(read_rows(copied, "predictions-train.jsonl")) == 60
    assert evaluate.evaluate(copied, split="train", max_examples=0) == train_figures
    limited = evaluate.evaluate(copied, split="train", max_examples=7)
    assert limited["examples"] == 7 and limited["examples_in_split"] == 60
    assert limited["tokens"] < train_figures["tokens"]
    assert evaluate.evaluate(copied, split="heldout") == figures, "the held-out split has limits"


@pytest.mark.slow
def test_a_changed_file_is_evaluated_again(tiny_config, tmp_path):
    config = tiny_config(stage="finetune")
    spec = {"source": f"{tmp_path}/{{split}}.tsv", "inputs": "say: {a}", "targets": "{b}"}
    config["data"] |= {"task": "own", "custom_tasks": {"own": spec | {"metrics": ["chrf"]}}}
    for split, count in {"train": 20, "validation": 3, "test": 3}.items():
        rows = [f"{i}\t{i}{i}" for i in range(count)]
        (tmp_path / f"{split}.tsv").write_text("\n".join(["a\tb", *rows]) + "\n")
    untrained.write(config, tmp_path / "run")
    evaluate_test = lambda: evaluate.evaluate(tmp_path / "run", split="test")
    first, table = evaluate_test(), (tmp_path / "test.tsv").read_text()
    (tmp_path / "test.tsv").write_text(table.replace("\t22", "\t23") + "3\t33\n")
    second = evaluate_test()
    assert (first["examples"], second["examples"]) == (3, 4) and first["nats"] != second["nats"]
    assert read_rows(tmp_path / "run", "predictions-test.jsonl")[2]["targets"] == "23"
    (tmp_path / "test.tsv").write_text(table)
    assert evaluate_test() == first


def test_no_two_splits_share_a_file_name():
    splits = "test train train[:10] train[10:] train[-10:] train[:10%] train[1:0] train+test"
    names = {split.translate(evaluation.FILE_NAMES) for split in splits.split()}
    assert len(names) == len(splits.split()) and not any(set("[]:%+/ ") & set(n) for n in names)


def test_each_example_counts_once_on_every_layout(copied):
    config = json.loads((copied / "config.json").read_text())
    config["data"] |= {"train_split": "train[20:]", "heldout_split": "train[:20]"}
    sums_by_count = {}
    for examples in (15, 16, 17):  # one less than a batch, a batch, one more
        config["evaluate"] |= {"max_examples": examples}
        (copied / "config.json").write_text(json.dumps(config))
        run, _, tokens = loading.open_workdir(copied)
        examples_to_score = runs.make_split(run, tokens, runs.splits(run)[1], "more")
        strategy = parallel.make_strategy(parallel.ParallelConfig(), jax.devices()[:2])
        params = strategy.place_state(inference.read_params(run, tokens)[0])
        losses = evaluate.HeldOut(run, strategy, examples_to_score, tokens)
        sums_by_count[examples] = sums = losses.by_example(params)
        assert {name: x.shape for name, x in sums.items()} == dict.fromkeys(sums, (examples,))
    totals = losses.sums(params)
    for name, sums in sums_by_count[17].items():
        np.testing.assert_array_equal(sums_by_count[16][name], sums[:16], err_msg=name)
        assert sums.sum() == pytest.approx(totals[name], rel=1e-5), name
    strategy = parallel.make_strategy(parallel.ParallelConfig("mesh", 2, 2), jax.devices()[:4])
    params = strategy.place_state(inference.read_params(run, tokens, strategy=strategy)[0])
    actual = evaluate.HeldOut(run, strategy, examples_to_score, tokens).by_example(params)
    for name, sums in sums_by_count[17].items():
        np.testing.assert_allclose(actual[name], sums, rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_evaluate_all_gives_the_figures_of_each_checkpoint_and_a_curve(copied, monkeypatch):
    rows = evaluate.evaluate_all(copied)
    assert [row["step"] for row in rows] == [3, 6]
    for row in rows:
        single = evaluate.evaluate(copied, row["step"])
        assert single | {"command": ""} == row | {"command": ""}
        files = [copied / f"predictions{name}.jsonl" for name in ("", f"-{row['step']}")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert rows == read_rows(copied, "evaluate.jsonl")
    assert (copied / "curve.png").read_bytes().startswith(b"\x89PNG")
    # A deleted checkpoint stays in the curve, and nothing is computed twice.
    shutil.rmtree(copied / "checkpoints" / "3")
    monkeypatch.setattr(evaluation.Evaluation, "figures", None)
    assert evaluate.evaluate_all(copied) == rows
    with pytest.raises(ValueError, match="there is no checkpoint 4"):
        evaluate.evaluate_all(copied, [4])
    monkeypatch.undo()
    # Rows with other limits are not in the same curve.
    rows = evaluate.evaluate_all(copied, [6], decoding="greedy min_length=2")
    assert [row["step"] for row in rows] == [6]
    # Another split has other files.
    evaluate.evaluate_all(copied, [6], split="train[:7]")
    assert len(read_rows(copied, "predictions-6-train-to7.jsonl")) == 7


def test_the_best_point_is_the_lowest_loss_and_the_highest_score():
    points = [curve.Point(step, value, 0, 9) for step, value in ((1, 3), (2, 1), (3, 3), (4, 1))]
    for name, step in {"nats": 2, "a/perplexity": 2, "bleu": 1, "a/chrf": 1}.items():
        assert curve.best(name, points).step == step
    row = {"step": 5, "nats": 1.0, "intervals": {"nats": [0.5, 2]}}
    row |= {"tasks": {"a": {"bleu": 7.0, "intervals": {"bleu": [6, 8]}}}}
    assert curve.series([row]) == {"nats": [(5, 1.0, 0.5, 2)], "a/bleu": [(5, 7.0, 6, 8)]}


def test_the_best_of_several_references_counts(monkeypatch):
    task = tasks.Task("tfds:x", "{q}", "{a}", ("exact_match",))
    pairs = [{"inputs": "?", "targets": "one", "references": ["one", "1"]}]
    pairs += [{"inputs": "?", "targets": "two"}]
    actual = scores.score_answers(task, pairs, ["1", "2"])
    assert actual["exact_match"] == 50.0 and actual["examples"] == 2
    assert not any(name.startswith("lead_") for name in actual), "the lead baseline needs rouge"
    answers = [generate.Answer(["1"], [0.0], False), generate.Answer(["2"], [0.0], True)]
    assert scores.rows(pairs, answers)[0] == pairs[0] | {"prediction": "1"}


def test_a_loss_that_is_not_finite_writes_nothing(copied):
    run, _, tokens, params, step = inference.open_run(copied)
    broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), params)
    evaluator = evaluation.Evaluation(copied)
    before = {path.name: path.stat().st_mtime_ns for path in copied.glob("*.json*")}
    with pytest.raises(ValueError, match="at update 6 on validation is not finite; choose another"):
        evaluator.figures(broken, step)
    assert before == {path.name: path.stat().st_mtime_ns for path in copied.glob("*.json*")}
