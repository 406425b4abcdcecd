"""Tests of a task that a config defines: training, scores, and errors."""

from __future__ import annotations

import copy
import json

import pytest

from lm import evaluate, runs, train
from lm.evaluate import evaluation

SPEC = {"inputs": "say: {a}", "targets": "{b}", "metrics": ("exact_match",)}


@pytest.fixture
def config(tiny_config, tmp_path):
    """A config with a custom task: a TSV file of numbers, each with its digits twice."""
    rows = [f"{i}\t{i}{i}" for i in range(60)]
    (tmp_path / "train.tsv").write_text("\n".join(["a\tb", *rows]) + "\n")
    config = tiny_config(stage="finetune")
    spec = {"source": f"{tmp_path}/{{split}}.tsv", **SPEC}
    config["data"] |= {"task": "doubles", "custom_tasks": {"doubles": spec}}
    config["data"] |= {"train_split": "train[:50]", "heldout_split": "train[50:]"}
    return config


def test_a_custom_task_is_trained_resumed_and_scored(config, tmp_path):
    workdir = tmp_path / "run"
    train.train(runs.make_run(config, workdir))
    resumed = runs.make_run(copy.deepcopy(config), workdir)  # config.json has lists for tuples
    assert train.train(resumed)
    assert runs.read_run(workdir).data == resumed.data
    figures = evaluate.evaluate(workdir)
    rows = [json.loads(line) for line in (workdir / "predictions.jsonl").read_text().splitlines()]
    assert figures["examples"] == len(rows) == 4  # evaluate.max_decoded_examples
    assert [row["inputs"] for row in rows] == [f"say: {i}" for i in range(50, 54)]
    assert [row["targets"] for row in rows] == [f"{i}{i}" for i in range(50, 54)]
    assert 0 <= figures["exact_match"] <= 100
    assert evaluate.evaluate(workdir, split="train", max_examples=3)["examples"] == 3
    # Scores are not reused after the file has changed.
    dependencies = lambda: evaluation.Evaluation(workdir).dependencies(6)
    assert figures | dependencies() == figures
    table = tmp_path / "train.tsv"
    table.write_text(table.read_text().replace("5050", "5051"))
    assert figures | dependencies() != figures
    with pytest.raises(ValueError, match="was built from another"):
        evaluate.evaluate(workdir)


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 41])
def test_a_small_file_without_a_validation_split_holds_out_one_row(count, config, tmp_path):
    rows = [f"{i}\t{i}{i}" for i in range(count)]
    (tmp_path / "train.tsv").write_text("\n".join(["a\tb", *rows]) + "\n")
    config["data"] |= {"train_split": "train", "heldout_split": "validation"}
    run = runs.make_run(config, tmp_path / "run")
    assert runs.splits(run) == ({"doubles": "train[:-1]"}, {"doubles": "train[-1:]"})
    train.train(run)
    assert evaluate.evaluate(tmp_path / "run")["examples"] == 1
    (row,) = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    assert json.loads(row)["inputs"] == f"say: {count - 1}"


def test_a_missing_column_is_reported_before_training(config, tmp_path):
    config["data"]["custom_tasks"]["doubles"]["targets"] = "{c}"
    with pytest.raises(ValueError, match="has no column 'c', .* it has a, b"):
        train.check(runs.make_run(config, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_shards_of_another_template_are_refused(config, tmp_path):
    run = runs.make_run(config, tmp_path / "run")
    tokens = runs.make_tokenizer(run)
    for _ in range(2):  # written, then reused
        runs.make_examples(run, tokens)
    config["data"]["custom_tasks"]["doubles"]["inputs"] = "double: {a}"
    with pytest.raises(ValueError, match="was built from another task"):
        runs.make_examples(runs.make_run(config, tmp_path / "run"), tokens)
