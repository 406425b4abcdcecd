"""Own entries of a config file: used in training, recorded, and missed when they are absent."""

from __future__ import annotations

import json
import linecache

import pytest

from lm import cli, distill, extensions, layers, objectives, optimizers, runs, tasks
from tests.tiny_runs import PAIRS, go, rows  # noqa: F401

FILE = '''
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm import distill, extensions, layers, objectives, optimizers, tasks


def cubic(x):
    return x**3


def sign(config):
    return optax.scale_by_sign()


def last_token(config, tokens, rng, vocabulary):
    """Show all tokens but the last one, which is the target."""
    halves = tokens[:-1], tokens[-1:]
    return tuple(np.append(half, vocabulary.eos).astype(np.int32) for half in halves)


LAST_TOKEN = objectives.OBJECTIVES["deshuffling"]._replace(corrupt=last_token)
FIRST_LINE = tasks.Task("tfds:pydocs", inputs="first line: {body}", targets="{summary}")

def total_variation(student, teacher, weights, temperature):
    """Half the sum of absolute differences of probabilities, at a temperature."""
    p, q = (jax.nn.softmax(logits / temperature) for logits in (student, teacher))
    return jnp.sum(jnp.abs(p - q).sum(-1) / 2 * weights), jnp.sum(weights)


extensions.register(
    distill.TERMS, "total_variation", distill.TermKind(("temperature",), total_variation)
)
extensions.register(layers.ACTIVATIONS, "cubic", (cubic, False))
extensions.register(optimizers.OPTIMIZERS, "sign", sign)
extensions.register(objectives.OBJECTIVES, "last_token", LAST_TOKEN)
extensions.register(tasks.TASKS, "first_line", FIRST_LINE)
'''
TABLES = {
    "cubic": layers.ACTIVATIONS,
    "sign": optimizers.OPTIMIZERS,
    "last_token": objectives.OBJECTIVES,
    "first_line": tasks.TASKS,
    "total_variation": distill.TERMS,
}
CHANGES = {"model.activation": "cubic", "optimizer.name": "sign", "objective.name": "last_token"}
CHANGES |= {
    "objective.placement": "uniform",
    "data.num_workers": 1,
    "data.target_length": 40,
    "optimizer.learning_rate": 1e-3,
}


def forget() -> None:
    """Bring lm back to what a new process has: its own entries alone."""
    extensions._ENTRIES.clear()
    for name, table in TABLES.items():
        table.pop(name, None)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(FILE)
    yield path
    forget()


def test_a_run_with_own_entries_is_trained_recorded_and_read_with_its_file_alone(
    file,
    go,
    tmp_path,
    capsys,  # noqa: F811
):
    extensions.load([str(file)])
    workdir = go(**CHANGES)
    names = {"cubic", "sign", "last_token"}
    for record in ("config.json", "run.json"):
        config = json.loads((workdir / record).read_text())
        config = config.get("config", config)
        assert config["extensions"]["file"] == dict.fromkeys(names, str(file))
        assert {len(digest) for digest in config["extensions"]["sha256"].values()} == {64}
    assert runs.read_run(workdir).config_dict["extensions"]["file"].keys() == names

    forget()
    out = tmp_path / "out.jsonl"
    predict = ["predict", f"--workdir={workdir}", "--text=a b", f"--out={out}"]
    assert cli.main(predict) == 2
    message = capsys.readouterr().err
    assert f"uses 'cubic', which {file} registers; pass that config file: --ext" in message
    assert cli.main([*predict, f"--extensions={file}"]) == 0
    assert len(out.read_text().splitlines()) == 1


def test_an_entry_that_changed_since_the_run_began_is_refused(file, go):  # noqa: F811
    extensions.load([str(file)])
    workdir = go(**{"model.activation": "cubic"})
    file.write_text(FILE.replace("optax.scale_by_sign()", "optax.identity()"))
    extensions.load([str(file)])
    assert runs.read_run(workdir).model.activation == "cubic"  # its own source is the same
    file.write_text(FILE.replace("x**3", "x**5"))
    extensions.load([str(file)])
    with pytest.raises(ValueError, match="uses 'cubic' of .* restore that version"):
        runs.read_run(workdir)
    with pytest.raises(ValueError, match=r"extensions.sha256.cubic .*--allow_change="):
        go(workdir, **{"model.activation": "cubic"})


def test_the_digest_follows_what_an_entry_uses_and_nothing_else(file):
    text = """
from __future__ import annotations
import dataclasses, functools, jax
from lm import extensions, layers
POWER = 3
@dataclasses.dataclass
class Unused:
    size: int
def helper(x):
    return x**POWER
def make(scale):
    return lambda x: scale * helper(x)
for name, entry in dict(own=make(2), part=functools.partial(helper), jax_own=jax.nn.silu).items():
    extensions.register(layers.ACTIVATIONS, name, (entry, False))
"""
    config = {"activations": ["own", "part", "jax_own"]}

    def digests(text):
        file.write_text(text)
        extensions.load([str(file)])
        names = extensions.record(config)["sha256"]
        for name in names:
            layers.ACTIVATIONS.pop(name)
        extensions._ENTRIES.clear()
        linecache.clearcache()
        return names

    before = digests(text)
    assert digests(text + "STEPS = 5\n") == before
    for change in (("POWER = 3", "POWER = 5"), ("return x**POWER", "return -(x**POWER)")):
        after = digests(text.replace(*change))
        assert {name for name in before if before[name] != after[name]} == {"own", "part"}
    assert digests(text.replace("make(2)", "make(4)"))["own"] != before["own"]


def test_a_task_is_registered_as_an_object(file, tiny_config, tmp_path):
    extensions.load([str(file)])
    run = runs.make_run(tiny_config(stage="finetune", **{"data.task": "first_line"}), tmp_path)
    assert run.data.get_task("first_line").has_inputs
    assert run.config_dict["extensions"]["file"] == {"first_line": str(file)}


def test_a_loss_term_of_a_config_file_is_zero_between_a_model_and_itself(file, go):  # noqa: F811
    extensions.load([str(file)])
    teacher = go(**PAIRS, stage="finetune")
    loss = {"total_variation": {"weight": 2.0, "temperature": 2.0}}
    options = {"teacher.workdir": str(teacher), "steps": 2, "teacher.loss": loss}
    student = go(**PAIRS, stage="distill", **options)
    for row in rows(student, "train"):
        assert abs(row["teacher/total_variation"]) < 1e-5 and row["nats"] > 1
    (name,) = runs.read_run(student).config_dict["extensions"]["file"]
    assert name == "total_variation"


def test_a_config_without_own_entries_records_none(file, tiny_config, tmp_path):
    extensions.load([str(file)])
    assert "extensions" not in runs.make_run(tiny_config(), tmp_path).config_dict


def test_entries_of_lm_are_not_replaced():
    with pytest.raises(ValueError, match="registers 'relu', which exists already"):
        extensions.register(layers.ACTIVATIONS, "relu", (None, False))


@pytest.mark.parametrize("text", [None, "import missing", "def", "1 / 0", "undefined"])
def test_a_file_that_cannot_be_run_is_one_sentence(text, tmp_path, capsys):
    file = tmp_path / "own.py"
    if text is not None:
        file.write_text(text)
    assert cli.main(["show", f"--workdir={tmp_path}", f"--extensions={file}"]) == 2
    assert f"--extensions={file} cannot be run" in capsys.readouterr().err
