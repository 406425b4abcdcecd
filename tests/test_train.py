"""Laws of training: all stages use one loop, start from the right parameters, and stop."""

from __future__ import annotations

import json
import math
import pathlib
import shutil

import jax
import numpy as np
import pytest

from lm import (
    distill,
    runs,
    tokenizer,
    train,
    transformer,
)
from tests.tiny_runs import (  # noqa: F401
    PAIRS,
    STEPS,
    assert_same_bits,
    go,
    interrupted,
    last,
    pretrained,
    rows,
)

STUDENT = {"model.num_encoder_layers": 1, "model.num_decoder_layers": 1}


@pytest.fixture(scope="module")
def finetuned(go, pretrained):
    return go(**PAIRS, stage="finetune", init_from=str(pretrained))


@pytest.fixture
def first(go, monkeypatch):
    """(**changes) -> the state that a run with these changes starts from."""

    class Loop:
        def __init__(self, *arguments, **options):
            pass

        def train_from(self, state, facts, teacher):
            assert facts["step"] == 0
            found.append(jax.tree.map(lambda x: x[0], state))

    found = []
    monkeypatch.setattr(train.loop, "Loop", Loop)
    return lambda **changes: go(**changes) and found.pop()


def contents(workdir: pathlib.Path) -> dict[str, bytes]:
    files = (path for path in workdir.rglob("*") if path.is_file())
    return {str(path.relative_to(workdir)): path.read_bytes() for path in files}


def test_training_starts_at_the_loss_of_uniform_predictions_and_learns(pretrained):
    start, *_, final = rows(pretrained, "train")
    assert [row["step"] for row in rows(pretrained, "train")] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows(pretrained, "heldout")] == [3, 6]
    np.testing.assert_allclose(start["nats"], math.log(512), rtol=0.05)
    assert final["nats"] < 0.95 * start["nats"]
    assert rows(pretrained, "heldout")[-1]["nats"] < 0.95 * math.log(512)


def test_the_logged_learning_rate_follows_the_schedule(pretrained):
    # A linear warm-up of 2 updates to 0.01, from the first update, which is taken at 0.
    rates = [row["learning_rate"] for row in rows(pretrained, "train")]
    np.testing.assert_allclose(rates, [0, 0.005, 0.01, 0.01, 0.01, 0.01], rtol=1e-6)


def test_a_row_averages_all_updates_since_the_last_row(go, pretrained):
    coarse = rows(go(**{"log_every_steps": 3, "checkpoint.every_steps": 3}), "train")
    fine = {row["step"]: row["nats"] for row in rows(pretrained, "train")}
    assert [row["step"] for row in coarse] == [1, 3, 6]
    # All batches of running text have as many targets, so that means may be averaged here.
    for row, since in zip(coarse, ([1], [2, 3], [4, 5, 6]), strict=True):
        np.testing.assert_allclose(row["nats"], np.mean([fine[n] for n in since]), rtol=1e-5)


def test_training_a_finished_run_again_changes_nothing(go, pretrained, tiny_config, monkeypatch):
    before = contents(pretrained)
    monkeypatch.setattr(train.loop, "Loop", None)
    monkeypatch.setattr(train.setup, "initial_params", None)
    run = runs.make_run(json.loads((pretrained / "config.json").read_text()), pretrained)
    figures = train.train(run, jax.devices()[:1])
    assert figures["nats"] == rows(pretrained, "heldout")[-1]["nats"]
    assert contents(pretrained) == before


def test_a_run_resumed_after_damage_ends_with_the_bits_of_an_unbroken_run(
    go, interrupted, pretrained, tmp_path
):
    workdir = pathlib.Path(shutil.copytree(interrupted, tmp_path / "run"))
    shutil.rmtree(workdir / "checkpoints" / "4" / "params")  # so that it continues from update 2
    go(workdir)
    (state, facts), (expected, expected_facts) = last(workdir), last(pretrained)
    assert_same_bits(state, expected)
    assert facts == expected_facts
    ours, theirs = rows(workdir, "train"), rows(pretrained, "train")
    assert [(row["step"], row["loss"]) for row in ours] == [
        (row["step"], row["loss"]) for row in theirs
    ]


def test_a_checkpoint_of_different_data_is_rejected(go, interrupted, tmp_path):
    workdir = pathlib.Path(shutil.copytree(interrupted, tmp_path / "run"))
    path = workdir / "shards" / "train" / "manifest.json"
    manifest = json.loads(path.read_text())
    for facts in manifest["files"].values():
        facts["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="another data; continue .*, --allow_change=data"):
        go(workdir)


def test_a_workdir_of_another_config_is_rejected_unchanged(go, pretrained):
    before = contents(pretrained)
    with pytest.raises(
        ValueError, match=r"another config: optimizer.learning_rate \(here 0.5, there 0.01\)"
    ):
        go(pretrained, **{"optimizer.learning_rate": 0.5})
    assert contents(pretrained) == before


# Stages. -------------------------------------------------------------------------------------


def test_fine_tuning_starts_from_init_from_with_a_fresh_optimizer(first, pretrained):
    state = first(**PAIRS, stage="finetune", init_from=str(pretrained))
    expected = last(pretrained)[0]
    assert_same_bits(state.params, expected.params)
    assert int(state.step) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(expected.opt_state))


def test_fine_tuning_uses_the_tokenizer_of_init_from_and_learns_its_pairs(finetuned, pretrained):
    prints = [
        runs.make_tokenizer(runs.read_run(path)).fingerprint for path in (finetuned, pretrained)
    ]
    assert prints[0] == prints[1]
    start, *_, final = rows(finetuned, "train")
    assert final["nats"] < start["nats"]


def test_a_shallower_student_starts_from_the_teachers_first_layers(first, finetuned):
    student = first(**PAIRS, **STUDENT, **{"stage": "distill", "teacher.workdir": str(finetuned)})
    teacher = last(finetuned)[0].params
    for tower in ("encoder", "decoder"):
        chosen = jax.tree.map(lambda leaf: leaf[:1], teacher[tower]["layers"])
        assert_same_bits(student.params[tower]["layers"], chosen)
        assert_same_bits(student.params[tower]["norm"], teacher[tower]["norm"])
    assert_same_bits(student.params["embed"], teacher["embed"])


def test_a_student_equal_to_its_teacher_has_zero_loss_and_gradient(go, finetuned):
    # Two updates: the warm-up's first is taken at rate zero.
    change = {"stage": "distill", "teacher.workdir": str(finetuned), "steps": 2}
    twin = go(**PAIRS, **change, **{"teacher.loss": {"forward_kl": {"temperature": 2.0}}})
    assert len(rows(twin, "train")) == 2
    for row in rows(twin, "train"):
        assert abs(row["teacher/forward_kl"]) < 1e-5 and abs(row["loss"]) < 1e-5
        assert row["gradient_norm"] < 1e-4
        assert row["nats"] > 1


def test_every_stage_has_a_loss_and_every_loss_a_stage():
    assert train.LOSSES.keys() == runs.STAGES.keys()


def test_the_flops_of_a_distillation_include_the_teachers_forward_pass(
    tiny_config, finetuned, tmp_path
):
    config = tiny_config(**PAIRS, **STUDENT, stage="distill", **{"teacher.workdir": str(finetuned)})
    alone = tiny_config(**{"data.task": "docstring_summary", "data.target_length": 8}, **STUDENT)
    ours, plain = (runs.make_run(each, tmp_path) for each in (config, alone))
    forward = transformer.forward_flops(runs.read_run(finetuned).model, 32, 8)
    assert train.step_flops(ours) - train.step_flops(plain) == 8 * forward


# Errors. -------------------------------------------------------------------------------------


@pytest.fixture
def other_tokens(tmp_path):
    """A tokenizer that shares only the bytes and a few pieces with the tiny one."""
    texts = ["some words for another tokenizer, of other letters: xyz"] * 20
    return tokenizer.train(texts, tmp_path / "other", vocab_size=283, num_extra_ids=10)


def test_a_teacher_with_another_tokenizer_is_rejected(go, pretrained, other_tokens):
    change = {"stage": "distill", "teacher.workdir": str(pretrained)}
    with pytest.raises(ValueError, match="differs from the teacher's .* leave tokenizer.dir empty"):
        go(**change, **{"tokenizer.dir": str(other_tokens.directory)})


def test_with_another_tokenizer_embedding_rows_of_equal_pieces_are_copied(
    go, pretrained, other_tokens, capfd
):
    change = {"stage": "finetune", "init_from": str(pretrained), "steps": 1}
    change |= {"tokenizer.vocab_size": 283, "tokenizer.num_extra_ids": 10}
    go(**change, **{"tokenizer.dir": str(other_tokens.directory)})
    theirs = runs.make_tokenizer(runs.read_run(pretrained))
    shared = set(theirs.names()) & set(other_tokens.names())
    assert 259 <= len(shared) < 293
    assert f"embed.embedding: {len(shared)} of 512 rows by piece" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("origin", "multipliers", "sentence"),
    [
        ("@7", (), "there is no checkpoint 7 in .*; choose newest or one of .*6"),
        (
            "@best",
            (),
            "the run has no checkpoint.best_metric, so no checkpoint is the best in .*; "
            "choose newest",
        ),
        (
            "",
            (("encodr/", None),),
            "'encodr/', which is the first match of no parameter; remove it",
        ),
    ],
)
def test_check_rejects_what_train_rejects_and_writes_nothing(
    origin, multipliers, sentence, tiny_config, pretrained, tmp_path
):
    changes = {**PAIRS, "stage": "finetune", "init_from": f"{pretrained}{origin}"}
    run = runs.make_run(
        tiny_config(**changes, **{"optimizer.learning_rate_multipliers": multipliers}),
        tmp_path / "run",
    )
    with pytest.raises(ValueError, match=sentence):
        train.check(run)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model.d_ff": 64}, "model.d_ff=64 differs from init_from=.*'s 32, .* use 32"),
        ({"model.lm_head": "tied"}, "model.lm_head='tied' differs from init_from=.*'s 'untied'"),
        (STUDENT, "model.num_encoder_layers=1 differs from init_from=.*'s 2"),
    ],
)
def test_init_from_with_another_model_is_rejected(change, sentence, go, pretrained):
    with pytest.raises(ValueError, match=sentence):
        go(**change, init_from=str(pretrained))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"model.d_ff": 64},
            "model.d_ff=64 differs from the teacher's 32, .*teacher.student_init='random'",
        ),
        ({"model.num_decoder_layers": 3}, "=3 is more than the teacher's 2; use at most 2, or"),
        (
            {"teacher.student_init": "randm"},
            "teacher.student_init='randm' is unknown; .* did you mean 'random'",
        ),
    ],
)
def test_a_student_that_does_not_match_its_teacher_is_rejected(change, sentence, go, pretrained):
    with pytest.raises(ValueError, match=sentence):
        go(**change, **{"stage": "distill", "teacher.workdir": str(pretrained)})


def test_layers_are_copied_evenly_from_the_first_to_the_last():
    for theirs in range(1, 13):
        for ours in range(1, theirs + 1):
            chosen = distill.evenly(theirs, ours)
            assert len(chosen) == ours == len(set(chosen))
            assert chosen == sorted(chosen) and chosen[0] == 0
            assert ours == 1 or chosen[-1] == theirs - 1
            gaps = np.diff(chosen)
            assert ours == 1 or gaps.max() - gaps.min() <= 1
