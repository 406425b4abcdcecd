"""Laws of sequence-level distillation: a student trains on a teacher's written answers.

Also with teachers of other codebases and other vocabularies.
"""

from __future__ import annotations

import dataclasses
import json
import os

import jax
import numpy as np
import pytest

from lm import evaluate, inference, runs, tasks, train
from lm.inference import generate
from tests import untrained

PAIRS = {"data.task": "docstring_summary", "data.target_length": 8, "data.batch_size": 8}
SAID = [{"inputs": f"summarize: kilo {i}", "prediction": f"lima {i}"} for i in range(20)]
OWN = {"source": "own.jsonl", "inputs": "reply: {said}", "targets": "{said}", "turns": "said"}


@pytest.fixture(scope="module")
def teacher(tiny_config, tmp_path_factory):
    """The workdir of a run with random parameters."""
    place = tmp_path_factory.mktemp("teacher") / "run"
    untrained.write(tiny_config(**PAIRS, stage="finetune"), place)
    return place


@pytest.fixture
def echo(monkeypatch):
    """A teacher with three answers to each input, its number, each worse than the one before."""

    def ask(self, ids, first=0, tick=lambda count: None):
        texts = lambda n: [f"told {n}", f"told {n} {n}", f"told {n}"]
        return [(texts(first + i), [0.0, -1.0, -2.0]) for i in range(len(ids))]

    monkeypatch.setattr(generate.Generator, "generate", ask)


def written(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Writing answers. --------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_split_is_asked_pair_by_pair_and_keeps_what_is_right(split, teacher, echo, tmp_path):
    inference.predict(teacher, inference.SplitInputs(teacher, split), str(tmp_path / "out.jsonl"))
    run = runs.read_run(teacher)
    run = dataclasses.replace(
        run, evaluate=dataclasses.replace(run.evaluate, max_decoded_examples=0)
    )
    own = dict(zip(("train", "heldout"), runs.splits(run), strict=True))[split]
    pairs = evaluate.task_texts(run, "docstring_summary", own["docstring_summary"])
    rows = rows_of(tmp_path / "out.jsonl")
    assert [(r["inputs"], r["targets"]) for r in rows] == [
        (p["inputs"], p["targets"]) for p in pairs
    ]
    assert [row["prediction"] for row in rows] == [f"told {i}" for i in range(len(pairs))]


def test_the_answer_nearest_to_what_is_right_is_written_alone(teacher, echo, tmp_path):
    rows = [{"inputs": "summarize: a", "targets": "told 0 0"}, {"inputs": "b", "targets": "told 1"}]
    out = tmp_path / "out.jsonl"
    inference.predict(
        teacher, rows, str(out), decoding="sample num_return_sequences=3", nearest="chrf"
    )
    assert [row["prediction"] for row in rows_of(out)] == ["told 0 0", "told 1"]
    assert all("predictions" not in row for row in rows_of(out))


@pytest.mark.parametrize(
    ("rows", "flags", "sentence"),
    [
        (
            SAID,
            dict(decoding="sample num_return_sequences=3"),
            "--nearest=chrf selects .* inputs with targets; use",
        ),
        (
            [{"inputs": "a", "targets": "b"}],
            {},
            "use --split, .* and num_return_sequences=4 in --decoding",
        ),
    ],
)
def test_there_is_nothing_nearest_without_targets_or_a_choice(rows, flags, sentence, teacher):
    with pytest.raises(ValueError, match=sentence):
        inference.predict(teacher, rows, nearest="chrf", **flags)


# Training on answers. ----------------------------------------------------------------------------


def test_a_student_learns_what_was_said_and_is_held_against_what_is_right(
    tiny_config, teacher, tmp_path
):
    config = tiny_config(**PAIRS, stage="distill", steps=3)
    config["teacher"] |= {
        "workdir": str(teacher),
        "loss": {"labels": {"weight": 1.0}},
        "student_init": "even",
    }
    config["data"]["train_split"] = written(tmp_path / "answers.jsonl", SAID)
    run = runs.make_run(config, tmp_path / "student")
    tokens = runs.make_tokenizer(run)
    learnt, held = runs.make_examples(run, tokens)
    read = [part.stored[i] for part in learnt.splits for i in range(len(part))]
    texts = [tuple(tokens.decode(ids) for ids in pair) for pair in read]
    assert texts == [(row["inputs"], row["prediction"]) for row in SAID]
    plain = runs.make_run(tiny_config(**PAIRS, stage="finetune"), tmp_path / "plain")
    theirs = runs.make_examples(plain, tokens)[1]
    ours, right = (
        [part[i] for i in range(12)] for part in (held.splits[0].stored, theirs.splits[0].stored)
    )
    jax.tree.map(np.testing.assert_array_equal, ours, right)
    assert np.isfinite(train.train(run)["nats"])
    assert evaluate.evaluate(tmp_path / "student", max_examples=2)["rougeL"] >= 0
    asked = list(inference.SplitInputs(tmp_path / "student", "train"))
    assert [row["targets"] for row in asked] == [row["prediction"] for row in SAID]


def answered(spec=OWN, name="own", file="said.jsonl"):
    return tasks.with_teacher_answers(name, tasks.task_from_config(name, spec), file)[0]


def test_each_of_several_answers_is_a_pair_once_and_blanks_are_none():
    row = {"inputs": "q", "prediction": "a", "predictions": ["a", "b", "a", " "]}
    pairs = [(text["inputs"], text["targets"]) for text in answered().to_texts(row)]
    assert pairs == [("q", "a"), ("q", "b")]


def test_a_task_of_a_mixture_reads_its_own_answers():
    row = {"inputs": "q", "prediction": "a"}
    assert len(answered().to_texts(row)) == len(answered().to_texts(row | {"task": "own"})) == 1
    assert answered().to_texts(row | {"task": "other"}) == []


def test_a_dialogue_too_long_loses_its_first_turns_here_too(tiny_tokens):
    text = "reply: user: " + "\nuser: ".join(["kilo lima mike november"] * 20)
    task = tasks.task_from_config("own", OWN)
    ours, theirs = (tasks.truncate_input(t, text, 24, tiny_tokens)[0] for t in (answered(), task))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("row", [{"text": "a"}, {"inputs": "q"}, {"inputs": 3, "prediction": "a"}])
def test_a_row_that_answers_nothing_is_a_sentence(row):
    with pytest.raises(ValueError, match="said.jsonl has a row without inputs .* --split=train"):
        answered().to_texts(row)


def test_running_text_has_no_answers(tiny_config, tmp_path):
    config = tiny_config()
    config["data"]["train_split"] = written(tmp_path / "answers.jsonl", SAID)
    with pytest.raises(ValueError, match="has answers, but wikipedia is running text; use data.tr"):
        train.check(runs.make_run(config, tmp_path / "run"))
    written_by = untrained.write(tiny_config(), tmp_path / "text")
    with pytest.raises(ValueError, match="--split=train of wikipedia is running text"):
        inference.SplitInputs(written_by.workdir, "train")


# Other teachers. ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_tokens(tmp_path_factory):
    """A byte tokenizer."""
    from lm import tokenizer

    return tokenizer.write_byte_tokenizer(
        tmp_path_factory.mktemp("bytes") / "tokenizer", 10
    ).directory


def test_a_student_of_other_ids_learns_from_answers_alone(
    tiny_config, teacher, other_tokens, tmp_path
):
    made = tiny_config(**PAIRS, stage="distill")
    made["tokenizer"] |= {"dir": str(other_tokens), "kind": "bytes", "vocab_size": 259}
    made["teacher"] |= {"workdir": str(teacher), "student_init": "random"}
    with pytest.raises(ValueError, match="tokenizer .* differs from the teacher's .* stage='finet"):
        runs.make_run(made, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    made["stage"], made["teacher"]["workdir"] = "finetune", ""
    made["data"]["train_split"] = written(tmp_path / "answers.jsonl", SAID)
    made["data"]["input_length"] = 64
    train.check(runs.make_run(made, tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize(("which", "step"), [("", 4), ("@2", 2), ("@newest", 4)])
def test_a_teacher_is_named_with_its_update(which, step, tiny_config, tmp_path):
    config = tiny_config(**PAIRS, stage="finetune")
    for seed, update in ((0, 2), (1, 4)):
        untrained.write(config, tmp_path / "teacher", seed, update)
    made = tiny_config(**PAIRS, stage="distill", steps=1)
    made["tokenizer"]["dir"] = ""
    made["teacher"] |= {"workdir": f"{tmp_path}/teacher{which}", "student_init": "even"}
    run = runs.make_run(made, tmp_path / "student")
    place, chosen = runs.teacher_source(run)
    theirs = runs.read_run(place)
    assert inference.read_params(theirs, runs.make_tokenizer(theirs), chosen)[1] == step
    train.check(run)


def test_a_teacher_without_that_update_is_a_sentence(tiny_config, teacher, tmp_path):
    made = tiny_config(**PAIRS, stage="distill")
    made["teacher"]["workdir"] = f"{teacher}@7"
    with pytest.raises(ValueError, match="7"):
        train.check(runs.make_run(made, tmp_path / "student"))
    assert not os.path.exists(tmp_path / "student")


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("cache", "nowhere/said", "teacher.cache=nowhere/said holds no teacher cache; write"),
        ("dtype", "float8", "teacher.dtype='float8' is unknown; choose one of bfloat16, float32"),
    ],
)
def test_what_no_teacher_can_be_read_in_is_a_sentence_before_a_run(
    key, value, sentence, tiny_config, teacher, tmp_path
):
    made = tiny_config(**PAIRS, stage="distill")
    made["teacher"] |= {"workdir": str(teacher), key: value}
    with pytest.raises(ValueError, match=sentence):
        train.check(runs.make_run(made, tmp_path / "student"))


def test_a_checkpoint_of_transformers_says_how_it_becomes_a_teacher(tiny_config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    made = tiny_config(**PAIRS, stage="distill")
    made["teacher"]["workdir"] = str(tmp_path)
    with pytest.raises(ValueError, match="checkpoint of transformers; .* python -m lm import"):
        runs.make_run(made, tmp_path / "student")


@pytest.mark.slow
def test_a_shared_encoder_stays_the_teachers_to_the_bit(tiny_config, teacher, tmp_path):
    made = tiny_config(**PAIRS, stage="distill", steps=3)
    made["model"]["num_decoder_layers"] = 1
    made["teacher"] |= {"workdir": str(teacher), "student_init": "shared last"}
    run = runs.make_run(made, tmp_path / "student")
    train.train(run)
    tokens = runs.make_tokenizer(run)
    ours = inference.read_params(run, tokens)[0]
    theirs = inference.read_params(runs.read_run(teacher), tokens)[0]
    same = lambda a, b: all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
    assert same(ours["encoder"], theirs["encoder"]) and same(ours["embed"], theirs["embed"])
    assert not same(ours["head"], theirs["head"])
    made["lora"]["rank"] = 2
    with pytest.raises(ValueError, match="lora.rank=2 would adapt the encoder .*'shared last'"):
        runs.make_run(made, tmp_path / "other")
