"""A user's own task, from a table to scores, with nothing but a config."""

from __future__ import annotations

import copy
import json

import pytest

from lm import evaluate, runs, train
from lm.evaluate import evaluation

SPEC = {"inputs": "say: {a}", "targets": "{b}", "metrics": ("exact_match",)}


@pytest.fixture
def config(tiny_config, tmp_path):
    """A config whose task is a table of numbers and their doubles."""
    rows = [f"{i}\t{i}{i}" for i in range(60)]
    (tmp_path / "train.tsv").write_text("\n".join(["a\tb", *rows]) + "\n")
    made = tiny_config(stage="finetune")
    spec = {"source": f"{tmp_path}/{{split}}.tsv", **SPEC}
    made["data"] |= {"task": "doubles", "custom_tasks": {"doubles": spec}}
    made["data"] |= {"train_split": "train[:50]", "heldout_split": "train[50:]"}
    return made


def test_a_table_is_learnt_continued_and_scored_by_a_config_alone(config, tmp_path):
    workdir = tmp_path / "run"
    train.train(runs.make_run(config, workdir))
    again = runs.make_run(copy.deepcopy(config), workdir)  # tuples there, lists in config.json
    assert train.train(again)
    assert runs.read_run(workdir).data == again.data
    figures = evaluate.evaluate(workdir)
    rows = [json.loads(line) for line in (workdir / "predictions.jsonl").read_text().splitlines()]
    assert (
        figures["examples"] == len(rows) == 4
    )  # evaluate.max_decoded_examples of the ten held out
    assert [row["inputs"] for row in rows] == [f"say: {i}" for i in range(50, 54)]
    assert [row["targets"] for row in rows] == [f"{i}{i}" for i in range(50, 54)]
    assert 0 <= figures["exact_match"] <= 100
    assert evaluate.evaluate(workdir, split="train", max_examples=3)["examples"] == 3
    # What was scored is not taken for the scores of what is written over its file.
    dependencies = lambda: evaluation.Evaluation(workdir).dependencies(6)
    assert figures | dependencies() == figures
    table = tmp_path / "train.tsv"
    table.write_text(table.read_text().replace("5050", "5051"))
    assert figures | dependencies() != figures
    with pytest.raises(ValueError, match="holds shards of another"):
        evaluate.evaluate(workdir)


@pytest.mark.parametrize("count", [2, 41])
def test_a_small_table_without_a_validation_file_is_learnt_and_scored(count, config, tmp_path):
    rows = [f"{i}\t{i}{i}" for i in range(count)]
    (tmp_path / "train.tsv").write_text("\n".join(["a\tb", *rows]) + "\n")
    config["data"] |= {"train_split": "train", "heldout_split": "validation"}
    run = runs.make_run(config, tmp_path / "run")
    assert runs.splits(run) == ({"doubles": "train[:-1]"}, {"doubles": "train[-1:]"})
    train.train(run)
    assert evaluate.evaluate(tmp_path / "run")["examples"] == 1
    (row,) = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    assert json.loads(row)["inputs"] == f"say: {count - 1}"


def test_a_missing_column_is_told_before_anything_is_trained(config, tmp_path):
    config["data"]["custom_tasks"]["doubles"]["targets"] = "{c}"
    with pytest.raises(ValueError, match="has no column 'c', .* it has a, b"):
        train.check(runs.make_run(config, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_shards_of_another_template_are_refused(config, tmp_path):
    run = runs.make_run(config, tmp_path / "run")
    tokens = runs.make_tokenizer(run)
    runs.make_examples(run, tokens)
    runs.make_examples(run, tokens)  # found
    config["data"]["custom_tasks"]["doubles"]["inputs"] = "double: {a}"
    with pytest.raises(ValueError, match="holds shards of another task"):
        runs.make_examples(runs.make_run(config, tmp_path / "run"), tokens)
