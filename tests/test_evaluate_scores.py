"""What evaluate writes: scores that follow from the predictions beside them, with intervals."""

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

MINE = {  # a task whose scores are above 0 for any model that says something
    "source": "tfds:pydocs",
    "inputs": "summarize: {body}",
    "targets": "{summary}",
    "metrics": ["chrf", "rouge"],
}


@pytest.fixture(scope="module")
def workdir(tiny_config, tmp_path_factory):
    """A run of 6 updates on a task of its own, with checkpoints 3 and 6."""
    place = tmp_path_factory.mktemp("scored") / "run"
    made = tiny_config(**{"stage": "finetune", "evaluate.max_decoded_examples": 10})
    made["data"] |= {"task": "mine", "custom_tasks": {"mine": MINE}}
    train.train(runs.make_run(made, place), jax.devices()[:2])
    return place


@pytest.fixture
def copied(workdir, tmp_path):
    """The same run, to be written into."""
    return shutil.copytree(workdir, tmp_path / "run")


@pytest.fixture(scope="module")
def figures(workdir):
    return evaluate.evaluate(workdir)


def written(place, name: str) -> list[dict]:
    return [json.loads(line) for line in (place / name).read_text().splitlines()]


def test_evaluating_twice_gives_the_same_bytes(workdir, figures):
    names = ("evaluate.json", "predictions.jsonl")
    first = [(workdir / name).read_bytes() for name in names]
    assert evaluate.evaluate(workdir) == figures == json.loads(first[0])
    for name in names:
        (workdir / name).unlink()
    evaluate.evaluate(workdir)
    assert [(workdir / name).read_bytes() for name in names] == first


def test_scores_and_intervals_follow_from_the_predictions_that_are_written(workdir, figures):
    rows = written(workdir, "predictions.jsonl")
    said, right = [row["prediction"] for row in rows], [row["targets"] for row in rows]
    assert len(rows) == figures["examples"] == 10
    for word in MINE["metrics"]:
        for name, value in metrics.score(word, said, right).items():
            assert figures[name] == value, name
        for name, ends in metrics.confidence_intervals(word, said, right).items():
            assert figures["intervals"][name] == list(ends), name
    assert figures["chrf"] > 0 and figures["lead_rouge1"] > 0
    assert figures["signatures"]["chrf"].startswith("nrefs:1|case:mixed")


def test_every_score_lies_in_its_interval(figures):
    scored = {"nats", "perplexity", "bits_per_byte", "token_accuracy", "chrf", "lead_rougeL"}
    assert scored <= figures["intervals"].keys()
    for name, (low, high) in figures["intervals"].items():
        assert low <= figures[name] <= high, name
    assert figures["perplexity"] == pytest.approx(math.exp(figures["nats"]))


def test_the_interval_of_a_loss_is_scipys():
    rng = np.random.default_rng(1)
    weight = rng.integers(3, 30, 200).astype(float)
    nats = weight * rng.gamma(4.0, 0.5, 200)
    examples = {name: nats for name in ("nats", "text_nats", "hits", "bytes")}
    found = scores.score_losses(examples | {"weight": weight, "text_weight": weight})
    theirs = stats.bootstrap(
        (nats, weight),
        lambda a, b: a.sum() / b.sum(),
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=1000,
        rng=np.random.default_rng(2),
    ).confidence_interval
    low, high = found["intervals"]["nats"]
    width = theirs.high - theirs.low
    assert abs(low - theirs.low) < 0.1 * width and abs(high - theirs.high) < 0.1 * width
    assert found["tokens"] == weight.sum()


def test_a_loss_in_parts_and_joined_is_that_of_the_whole():
    rng = np.random.default_rng(3)
    names = ("nats", "weight", "hits", "bytes", "text_nats", "text_weight")
    whole = {name: rng.uniform(1, 2, 30) for name in names}
    parts = [{name: x[a:b] for name, x in whole.items()} for a, b in ((0, 7), (7, 8), (8, 30))]
    assert scores.score_losses(scores.concatenate(parts)) == scores.score_losses(whole)


def test_a_judge_gives_while_training_what_evaluate_writes(workdir, figures):
    run, strategy, tokens, params, _ = inference.open_run(workdir)
    judge, beats = evaluate.TaskScorer(run, strategy, tokens), []
    found = judge(params, beat=lambda: beats.append(1))
    assert tuple(found) == judge.names == ("chrf", "rouge1", "rouge2", "rougeL", "rougeLsum")
    assert found == {name: figures[name] for name in found}
    assert beats, "a watchdog would take it for hanging"
    zeros = jax.tree.map(lambda leaf: 0 * leaf, params)
    assert judge(zeros)["chrf"] != found["chrf"], "of the parameters that it is given"


def test_another_decoding_is_computed_anew_and_said(copied, figures):
    evaluate.evaluate(copied)
    found = evaluate.evaluate(copied, decoding="beam num_beams=3 num_return_sequences=2")
    assert found["limits"]["decoding"] == "beam num_beams=3 num_return_sequences=2"
    assert found["nats"] == figures["nats"]
    assert "--decoding='beam num_beams=3 num_return_sequences=2'" in found["command"]
    rows = written(copied, "predictions.jsonl")
    for row in rows:
        assert row["prediction"] == row["predictions"][0] and len(row["predictions"]) == 2
        assert row["scores"] == sorted(row["scores"], reverse=True)
    assert all("scores" not in row for row in rows_of_one(copied))
    fewer = evaluate.evaluate(copied, max_examples=3)
    assert fewer["examples"] == 3 and "--max_examples=3" in fewer["command"]
    assert fewer["tokens"] < figures["tokens"]
    with pytest.raises(ValueError, match="did you mean 'beam'"):
        evaluate.evaluate(copied, decoding="beem")


def rows_of_one(place) -> list[dict]:
    evaluate.evaluate(place)
    return written(place, "predictions.jsonl")


@pytest.mark.slow
def test_another_split_has_files_of_its_own(copied, figures):
    evaluate.evaluate(copied)
    before = (copied / "evaluate.json").read_bytes()
    found = evaluate.evaluate(copied, split="train[:7]")
    assert found["examples"] == 7 and found["split"] == "train[:7]"
    assert found["nats"] != figures["nats"]
    assert json.loads((copied / "evaluate-train-to7.json").read_text()) == found
    assert len(written(copied, "predictions-train-to7.jsonl")) == 7
    assert (copied / "evaluate.json").read_bytes() == before
    assert evaluate.evaluate(copied, split="validation") == evaluate.evaluate(copied)
    with pytest.raises(ValueError, match="the split of pydocs='tset' is unknown; choose one of"):
        evaluate.evaluate(copied, split="tset")


def test_a_split_that_is_named_is_scored_whole(copied, figures):
    assert figures["examples"] == 10 and figures["examples_in_split"] == 12
    whole = evaluate.evaluate(copied, split="train")
    assert whole["examples"] == whole["examples_in_split"] == 60
    assert len(written(copied, "predictions-train.jsonl")) == 60
    assert evaluate.evaluate(copied, split="train", max_examples=0) == whole
    some = evaluate.evaluate(copied, split="train", max_examples=7)
    assert some["examples"] == 7 and some["examples_in_split"] == 60
    assert some["tokens"] < whole["tokens"]
    assert evaluate.evaluate(copied, split="heldout") == figures, "the run's own has its limits"


@pytest.mark.slow
def test_a_changed_file_is_evaluated_anew(tiny_config, tmp_path):
    made = tiny_config(stage="finetune")
    spec = {"source": f"{tmp_path}/{{split}}.tsv", "inputs": "say: {a}", "targets": "{b}"}
    made["data"] |= {"task": "own", "custom_tasks": {"own": spec | {"metrics": ["chrf"]}}}
    for split, count in {"train": 20, "validation": 3, "test": 3}.items():
        rows = [f"{i}\t{i}{i}" for i in range(count)]
        (tmp_path / f"{split}.tsv").write_text("\n".join(["a\tb", *rows]) + "\n")
    untrained.write(made, tmp_path / "run")
    asked = lambda: evaluate.evaluate(tmp_path / "run", split="test")
    first, table = asked(), (tmp_path / "test.tsv").read_text()
    (tmp_path / "test.tsv").write_text(table.replace("\t22", "\t23") + "3\t33\n")
    second = asked()
    assert (first["examples"], second["examples"]) == (3, 4) and first["nats"] != second["nats"]
    assert written(tmp_path / "run", "predictions-test.jsonl")[2]["targets"] == "23"
    (tmp_path / "test.tsv").write_text(table)
    assert asked() == first


def test_no_two_splits_share_a_file_name():
    splits = "test train train[:10] train[10:] train[-10:] train[:10%] train[1:0] train+test"
    named = {split.translate(evaluation.FILE_NAMES) for split in splits.split()}
    assert len(named) == len(splits.split()) and not any(set("[]:%+/ ") & set(n) for n in named)


def test_each_example_counts_once_whatever_the_batch_and_the_layout(copied):
    config = json.loads((copied / "config.json").read_text())
    config["data"] |= {"train_split": "train[20:]", "heldout_split": "train[:20]"}
    found = {}
    for examples in (15, 16, 17):  # the last but one of a batch, the last, the first of the next
        config["evaluate"] |= {"max_examples": examples}
        (copied / "config.json").write_text(json.dumps(config))
        run, _, tokens = loading.open_workdir(copied)
        held = runs.make_split(run, tokens, runs.splits(run)[1], "more")
        strategy = parallel.make_strategy(parallel.ParallelConfig(), jax.devices()[:2])
        params = strategy.place_state(inference.read_params(run, tokens)[0])
        losses = evaluate.HeldOut(run, strategy, held, tokens)
        found[examples] = each = losses.by_example(params)
        assert {name: x.shape for name, x in each.items()} == dict.fromkeys(each, (examples,))
    added = losses.sums(params)
    for name, sums in found[17].items():
        np.testing.assert_array_equal(found[16][name], sums[:16], err_msg=name)
        assert sums.sum() == pytest.approx(added[name], rel=1e-5), name
    strategy = parallel.make_strategy(parallel.ParallelConfig("mesh", 2, 2), jax.devices()[:4])
    params = strategy.place_state(inference.read_params(run, tokens, strategy=strategy)[0])
    again = evaluate.HeldOut(run, strategy, held, tokens).by_example(params)
    for name, sums in found[17].items():
        np.testing.assert_allclose(again[name], sums, rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_all_checkpoints_make_a_curve_whose_points_are_theirs(copied, monkeypatch):
    rows = evaluate.evaluate_all(copied)
    assert [row["step"] for row in rows] == [3, 6]
    for row in rows:
        alone = evaluate.evaluate(copied, row["step"])
        assert alone | {"command": ""} == row | {"command": ""}
        said = [copied / f"predictions{name}.jsonl" for name in ("", f"-{row['step']}")]
        assert said[0].read_bytes() == said[1].read_bytes()
    assert rows == written(copied, "evaluate.jsonl")
    assert (copied / "curve.png").read_bytes().startswith(b"\x89PNG")
    # A checkpoint that is gone stays in the curve, and none is computed twice.
    shutil.rmtree(copied / "checkpoints" / "3")
    monkeypatch.setattr(evaluation.Evaluation, "figures", None)
    assert evaluate.evaluate_all(copied) == rows
    with pytest.raises(ValueError, match="there is no checkpoint 4"):
        evaluate.evaluate_all(copied, [4])
    monkeypatch.undo()
    # Rows of other limits are no part of the same curve.
    rows = evaluate.evaluate_all(copied, [6], decoding="greedy min_length=2")
    assert [row["step"] for row in rows] == [6]
    # Another split has its own name.
    evaluate.evaluate_all(copied, [6], split="train[:7]")
    assert len(written(copied, "predictions-6-train-to7.jsonl")) == 7


def test_the_best_point_is_the_lowest_loss_and_the_highest_score():
    points = [curve.Point(step, value, 0, 9) for step, value in ((1, 3), (2, 1), (3, 3), (4, 1))]
    for name, step in {"nats": 2, "a/perplexity": 2, "bleu": 1, "a/chrf": 1}.items():
        assert curve.best(name, points).step == step
    row = {"step": 5, "nats": 1.0, "intervals": {"nats": [0.5, 2]}}
    row |= {"tasks": {"a": {"bleu": 7.0, "intervals": {"bleu": [6, 8]}}}}
    assert curve.series([row]) == {"nats": [(5, 1.0, 0.5, 2)], "a/bleu": [(5, 7.0, 6, 8)]}


def test_any_right_answer_of_several_counts(monkeypatch):
    task = tasks.Task("tfds:x", "{q}", "{a}", ("exact_match",))
    pairs = [{"inputs": "?", "targets": "one", "references": ["one", "1"]}]
    pairs += [{"inputs": "?", "targets": "two"}]
    found = scores.score_answers(task, pairs, ["1", "2"])
    assert found["exact_match"] == 50.0 and found["examples"] == 2
    assert not any(name.startswith("lead_") for name in found), "no summary, no lead baseline"
    given = [generate.Answer(["1"], [0.0], False), generate.Answer(["2"], [0.0], True)]
    assert scores.rows(pairs, given)[0] == pairs[0] | {"prediction": "1"}


def test_a_loss_that_is_not_finite_writes_nothing(copied):
    run, _, tokens, params, step = inference.open_run(copied)
    broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), params)
    asked = evaluation.Evaluation(copied)
    before = {path.name: path.stat().st_mtime_ns for path in copied.glob("*.json*")}
    with pytest.raises(ValueError, match="at update 6 on validation is not finite; choose another"):
        asked.figures(broken, step)
    assert before == {path.name: path.stat().st_mtime_ns for path in copied.glob("*.json*")}
