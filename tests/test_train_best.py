"""Laws of best_metric and early stopping."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import pathlib
import shutil
import types

import jax
import numpy as np
import pytest

from lm import checkpoints, cli, evaluate, logs, pipeline, runs, train
from tests.tiny_runs import (  # noqa: F401
    PAIRS,
    ROOT,
    assert_same_bits,
    go,
    last,
    pretrained,
    rows,
)

CURVE = {1: 5.0, 2: 4.0, 3: 4.5, 4: math.nan, 5: 4.0, 6: 3.0, 7: 9.0, 8: 9.0, 9: 9.0}  # nats
STOPPING = {
    "eval_every_steps": 1,
    "checkpoint.every_steps": 2,
    "steps": 9,
    "early_stopping_patience": 3,
}
STOPPING |= {"checkpoint.best_metric": "nats"}


def judged(curve, most, memory=None, figure="nats"):
    """(EarlyStopping after these metrics, the step at which it was over or None)."""
    made, over = train.EarlyStopping(figure, most, memory), None
    for step, value in curve.items():
        made.update(step, {figure: value})
        over = step if made.is_over and over is None else over
    return made, over


def test_early_stopping_ends_after_patience_evaluations_without_improvement():
    assert judged(CURVE, 3)[1] == 5, "an equal figure and one that is not finite are no better"
    assert judged(CURVE, 1)[1] == 3 and judged(CURVE, 4)[1] is None
    assert judged(CURVE, 0)[1] is None
    assert judged({1: math.nan, 2: 5.0}, 3)[0].memory["best"] == 5.0
    rising = {step: -value for step, value in CURVE.items()}
    assert judged(rising, 3, figure="bleu")[1] == 5, "of a score the highest is best"
    assert judged(CURVE, 2)[0].memory == {"figure": "nats", "best": 3.0, "step": 6, "since": 3}
    assert "no better nats than the 3.0 of update 6" in judged(CURVE, 2)[0].reason


def test_early_stopping_resumes_from_its_memory_unless_the_metric_changed():
    for cut in CURVE:
        first, rest = (dict(itertools.islice(CURVE.items(), *part)) for part in ((cut,), (cut, 9)))
        memory = json.loads(json.dumps(judged(first, 3)[0].memory))
        assert judged(rest, 3, memory)[0].memory == judged(CURVE, 3)[0].memory
    other = train.EarlyStopping("bleu", 3, judged(CURVE, 3)[0].memory)
    assert other.memory["since"] == 0 and other.memory["best"] is None


def script(patch) -> None:
    """Replace held-out nats by those of CURVE."""
    now, whole = [0], train.Loop._evaluate

    def evaluation(self):
        now[0] = self.step
        return whole(self)

    def sums(self, params, label="", beat=None):
        names = ("loss", "nats", "hits", "bytes", "text_nats", "text_weight")
        return dict.fromkeys(names, CURVE[now[0]]) | {"weight": 1.0}

    patch.setattr(train.Loop, "_evaluate", evaluation)
    patch.setattr(evaluate.HeldOut, "sums", sums)


@pytest.fixture
def scripted(monkeypatch):
    script(monkeypatch)


@pytest.fixture(scope="module")
def ended(go):  # noqa: F811
    """The workdir of a run that ended early; read-only."""
    with pytest.MonkeyPatch.context() as patch:
        script(patch)
        return go(**STOPPING)


def kept(workdir) -> list[int]:
    with checkpoints.Checkpoints(workdir / "checkpoints", read_only=True) as saved:
        return saved.steps()


def test_a_run_without_improvement_ends_and_stays_ended(go, ended, scripted, tmp_path, capsys):  # noqa: F811
    workdir = shutil.copytree(ended, tmp_path / "run")
    assert kept(workdir) == [5, 4, 2], "the last, though no checkpoint is due, and the best"
    assert last(workdir)[1]["patience"]["since"] == 3
    assert [row["step"] for row in rows(workdir, "heldout")] == [1, 2, 3, 4, 5]
    (told,) = [row for row in logs.read(workdir / logs.EVENTS) if row["event"] == "ended early"]
    assert told["step"] == 5 and "no better nats than the 4.0 of update 2" in told["said"]
    before = {path: path.read_bytes() for path in workdir.glob("*.jsonl")}
    go(workdir, **STOPPING)
    assert "ended early after update 5, for 3 evaluations in a row" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in workdir.glob("*.jsonl")} == before
    go(workdir, **STOPPING | {"early_stopping_patience": 4})
    assert kept(workdir) == [9, 8, 6], "it goes on, found a better one, and bore more"
    assert logs.goodput(workdir)["sessions"] == 2


@pytest.mark.slow
def test_a_killed_run_stops_early_where_the_unbroken_run_does(
    go,  # noqa: F811
    ended,
    scripted,
    tmp_path,
    monkeypatch,
):
    whole = pipeline.train_batches

    def batches(*arguments, **options):
        yield from itertools.islice(whole(*arguments, **options), 4)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "train_batches", batches)
        go(tmp_path / "run", **STOPPING)
    go(tmp_path / "run", **STOPPING)
    assert_same_bits(last(tmp_path / "run")[0], last(ended)[0])
    assert last(tmp_path / "run")[1]["patience"] == last(ended)[1]["patience"]


@pytest.mark.slow
def test_the_best_checkpoint_by_task_score_matches_evaluate(go, pretrained):  # noqa: F811
    words = {
        **PAIRS,
        "stage": "finetune",
        "init_from": str(pretrained),
        "evaluate.max_decoded_examples": 3,
    }
    words |= {
        "eval_every_steps": 2,
        "checkpoint.best_metric": "rougeL",
        "optimizer.learning_rate": 0.1,
    }
    workdir = go(**words)
    found = {row["step"]: row["rougeL"] for row in rows(workdir, "heldout")}
    assert set(found) == {2, 4, 6}
    best = evaluate.evaluate(workdir, "best")
    assert best["step"] == max(sorted(found), key=found.get)
    assert best["rougeL"] == pytest.approx(found[best["step"]])
    assert best["nats"] > 0 and "rougeL" not in rows(pretrained, "heldout")[-1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            {"early_stopping_patience": 3},
            "early_stopping_patience=3 needs a metric; set checkpoint.best_metric",
        ),
        ({"early_stopping_patience": -1}, "early_stopping_patience=-1 is too small; use 0 or more"),
        (
            {"checkpoint.best_metric": "rougeL"},
            "checkpoint.best_metric='rougeL' is unknown",
        ),  # wikipedia has no answers
        (
            {"checkpoint.best_metric": "bleu", "data.task": "docstring_summary"},
            "checkpoint.best_metric='bleu' .*rougeL",
        ),
        (
            {"checkpoint.best_metric": "perplexity"},
            "checkpoint.best_metric='perplexity' .*; use nats, which ranks .* equally",
        ),
        (
            {
                "checkpoint.best_metric": "rougeL",
                "data.mixture": (("docstring_summary", 1.0), ("aeslc", 2.0)),
            },
            "checkpoint.best_metric='rougeL' .*aeslc/rougeL, .*docstring_summary/rougeL",
        ),
    ],
)
def test_an_unknown_best_metric_is_rejected(words, said, tiny_config, tmp_path):
    with pytest.raises(ValueError, match=said):
        runs.make_run(tiny_config(**words), tmp_path)


def test_with_several_tasks_best_metric_names_one_tasks_score(tiny_config, tmp_path):
    words = {
        "checkpoint.best_metric": "aeslc/rougeL",
        "data.mixture": (("docstring_summary", 1.0), ("aeslc", 2.0)),
    }
    assert runs.make_run(tiny_config(**words), tmp_path).checkpoint.best_metric == "aeslc/rougeL"


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("runs/a", ("runs/a", "newest")),
        ("runs/a@best", ("runs/a", "best")),
        ("runs/a@1200", ("runs/a", 1200)),
        ("runs/me@home", ("runs/me@home", "newest")),
        ("", ("", "newest")),
    ],
)
def test_init_from_names_a_workdir_and_a_checkpoint(named, expected):
    assert runs.init_source(types.SimpleNamespace(init_from=named)) == expected


@pytest.mark.slow
def test_the_command_line_fine_tunes_with_frozen_parameters(
    pretrained, tiny_config, tmp_path, capsys
):  # noqa: F811
    words = {
        **PAIRS,
        "stage": "finetune",
        "init_from": str(pretrained),
        "checkpoint.every_steps": 6,
    }
    words |= {
        "optimizer.learning_rate_multipliers": (
            ("encoder/", None),
            ("embed", None),
            ("decoder/norm", 0.1),
        ),
        "eval_every_steps": 6,
    }
    words |= {"evaluate.max_examples": 8, "parallel.data": 1}
    made = json.dumps(tiny_config(**words))
    config = tmp_path / "tiny.py"
    config.write_text(
        f"import json\nfrom ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict(json.loads({made!r}))\n"
    )
    workdir = tmp_path / "run"
    assert cli.main(["train", f"--config={config}", f"--workdir={workdir}"]) == 0
    before, after = (checkpoints.flatten(last(place)[0].params) for place in (pretrained, workdir))
    for path, leaf in after.items():
        same = np.asarray(leaf).tobytes() == np.asarray(before[path]).tobytes()
        assert same == path.startswith(("encoder.", "embed.")), path
    capsys.readouterr()
    assert cli.main(["show", f"--workdir={workdir}", "--model"]) == 0
    frozen = sum(leaf.size for path, leaf in after.items() if path.startswith(("enc", "emb")))
    assert f"frozen: {frozen:,}" in capsys.readouterr().out
    again = evaluate.evaluate(workdir)["nats"]
    assert again == pytest.approx(rows(workdir, "heldout")[-1]["nats"], rel=1e-5)


def test_the_fine_tuning_recipes_are_as_published_with_dropout_of_a_tenth():
    for path in sorted(pathlib.Path(ROOT / "configs").glob("*.py")):
        if path.stem in ("__init__", "models"):
            continue
        config = importlib.import_module(f"configs.{path.stem}").get_config()
        if config.get("stage") == "finetune":
            assert config.model.dropout_rate == 0.1, path
    t5, adamw = (
        importlib.import_module(f"configs.finetune_{name}").get_config() for name in ("t5", "adamw")
    )
    assert (t5.optimizer.name, t5.optimizer.learning_rate, t5.optimizer.schedule) == (
        "adafactor",
        1e-3,
        "constant",
    )
    assert (t5.steps, t5.data.batch_size, t5.data.input_length) == (2**18, 128, 512)
    assert (t5.checkpoint.keep_period, t5.checkpoint.every_steps) == (5000, 5000)
    assert (adamw.optimizer.name, adamw.optimizer.learning_rate) == ("adamw", 1e-4)
    assert jax.tree.structure(t5.to_dict()) == jax.tree.structure(adamw.to_dict())
