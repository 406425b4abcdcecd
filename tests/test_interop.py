"""Laws of the commands import and export: round trips, training, no partial output."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import base, distill, finetune, models, pretrain
from experiments import parity
from lm import (
    checkpoints,
    cli,
    inference,
    interop,
    logs,
    runs,
    tokenizer,
    train,
    transformer,
)
from lm.interop import t5x, transformers, vocabulary

WORDS = dict(vocab_size=512, d_model=16, d_ff=24, num_heads=4, num_kv_heads=4, head_dim=8)
WORDS |= dict(num_encoder_layers=2, num_decoder_layers=2, scan_layers=True)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, tiny_tokens):
    """A directory as transformers writes it, of a random T5 1.1 and the tiny tokenizer."""
    directory = tmp_path_factory.mktemp("foreign") / "checkpoint"
    config = transformer.ModelConfig.from_flat(WORDS)
    transformers.write(parity.random_params(config), config, directory)
    vocabulary.write(tiny_tokens.directory, directory)
    return directory


@pytest.fixture(scope="module")
def imported(foreign, tmp_path_factory):
    """The workdir that `lm import` writes from it."""
    workdir = tmp_path_factory.mktemp("imported") / "run"
    assert cli.main(["import", str(foreign), f"--workdir={workdir}"]) == 0
    return workdir


def params_of(workdir):
    run = runs.read_run(workdir)
    return run, inference.read_params(run, runs.make_tokenizer(run))[0]


def equal(one, other) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_an_imported_run_has_the_config_parameters_and_ids_of_the_checkpoint(imported, tiny_tokens):
    run, params = params_of(imported)
    for field, value in (WORDS | dict(scan_layers=False)).items():
        assert getattr(run.model, field) == value
    equal(params, parity.random_params(run.model))
    text = "Returns the shape of an array.\n\n  Raises: ValueError é ☃"
    actual = runs.make_tokenizer(run)
    np.testing.assert_array_equal(actual.encode(text), tiny_tokens.encode(text))
    assert run.tokenizer.vocab_size == tiny_tokens.vocab_size


def test_an_export_of_an_import_is_the_same_checkpoint(imported, foreign, tmp_path):
    assert cli.main(["export", f"--workdir={imported}", str(tmp_path / "out")]) == 0
    for name in ("config.json", "model.safetensors", "tokenizer.json", "spiece.model"):
        assert (tmp_path / "out" / name).read_bytes() == (foreign / name).read_bytes(), name


def test_an_imported_run_predicts(imported, capsys):
    assert cli.main(["predict", f"--workdir={imported}", "--text=What is it?"]) == 0
    assert json.loads(capsys.readouterr().out)["inputs"] == "What is it?"


SPEAK = """
import json, sys
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokens = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1])
for text in json.loads(sys.argv[2]):
    rows = tokens(text, return_tensors="pt")
    ids = model.generate(**rows, max_new_tokens=128, do_sample=False, num_beams=1)
    print(json.dumps(ids[0, 1:].tolist()))
"""


@pytest.mark.parametrize("version", [pytest.param("4.57", marks=pytest.mark.slow), "5"])
def test_transformers_generates_our_predictions_from_an_export(version, imported, tmp_path, capsys):
    """From text to text: their tokenizer, model and `generate`, and our `predict`."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    if version == "4.57" and not parity.OLD.is_dir():
        pytest.skip("transformers 4.57 is not here")
    interop.write(imported, tmp_path / "out")
    texts = ["Returns the mean.", "x", "Compute the  loss\tof é."]
    process = subprocess.run(
        [sys.executable, "-c", SPEAK, tmp_path / "out", json.dumps(texts)],
        env={"PATH": "", "HOME": str(tmp_path)} | parity.path_of(version),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    (tmp_path / "texts").write_text("\n".join(texts))
    cli.main(["predict", f"--workdir={imported}", f"--input={tmp_path / 'texts'}"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    tokens = tokenizer.Tokenizer(imported / "tokenizer")
    for row, line in zip(rows, process.stdout.splitlines(), strict=True):
        assert row["prediction"] == tokens.decode([i for i in json.loads(line) if i > 1])


def test_a_runs_folder_is_a_preset(imported):
    config = finetune.get_config(str(imported))
    assert config.init_from == str(imported) and config.model.dropout_rate == 0.1
    assert runs.make_run(config.to_dict(), "nowhere").model.d_model == 16
    config = distill.get_config(str(imported))
    assert (config.teacher.workdir, config.init_from) == (str(imported), "")
    student = runs.make_run(config.to_dict(), "nowhere").model
    assert (student.num_encoder_layers, student.d_model, student.vocab_size) == (1, 16, 512)


def test_a_preset_that_is_neither_lists_the_presets(tmp_path):
    with pytest.raises(ValueError, match="run's folder.* choose one of .*t5_1_1_small"):
        models.apply(finetune.get_config().unlock(), str(tmp_path))


@pytest.mark.parametrize("rows", [512, 640])
def test_training_starts_from_an_import_and_logs_it(imported, tiny_config, rows, capfd):
    config = tiny_config(**{"model.vocab_size": rows, "init_from": str(imported)})
    config["model"] |= {**runs.read_config(imported)["model"], "vocab_size": rows}
    config["steps"], workdir = 1, imported.parent / f"tuned-{rows}"
    run = runs.make_run(config, workdir)
    expected = params_of(imported)[1]
    started = train.initial_params(run, runs.make_tokenizer(run), None)
    message = capfd.readouterr().err
    assert started["embed"]["embedding"].shape == (rows, 16)
    known = 512 if rows == 512 else runs.make_tokenizer(run).size
    for path, leaf in checkpoints.flatten(started).items():
        axis = {"embed.embedding": 0, "head": 1}.get(path, 0)
        old = checkpoints.flatten(expected)[path]
        count = known if path in ("embed.embedding", "head") else len(old)
        first = lambda x, axis=axis, count=count: np.take(np.asarray(x), range(count), axis)
        np.testing.assert_array_equal(first(leaf), first(old))
    assert "all parameters whole" in message if rows == 512 else f"{known:,} of 640 rows" in message


def test_an_import_can_be_a_teacher_and_initialize_the_student(imported, tiny_config, tmp_path):
    config = tiny_config(**{"stage": "distill", "steps": 2, "teacher.workdir": str(imported)})
    config["tokenizer"]["dir"] = ""
    config["teacher"]["student_init"] = "last"
    config["model"] |= runs.read_config(imported)["model"] | {"num_decoder_layers": 1}
    run, params = runs.make_run(config, tmp_path / "run"), params_of(imported)[1]
    started = train.initial_params(run, runs.make_tokenizer(run), params)
    equal(started["encoder"], params["encoder"])
    equal(started["decoder"]["layers"], jax.tree.map(lambda x: x[1:], params["decoder"]["layers"]))
    train.train(run)
    rows = [row for row in logs.read(run.workdir / "metrics.jsonl") if row["split"] == "train"]
    assert rows[-1]["step"] == 2
    assert all(row["teacher/forward_kl"] > 0 for row in rows)
    taught = params_of(run.workdir)[1]
    assert not np.array_equal(taught["embed"]["embedding"], started["embed"]["embedding"])


def t5x_checkpoint(directory, config):
    """A T5X step folder of random parameters, arrays inside the msgpack file."""
    import flax.serialization

    params = parity.random_params(config)
    flat = {}
    for tower in ("encoder", "decoder"):
        for path, leaf in checkpoints.flatten(params[tower]["layers"]).items():
            for layer in range(len(leaf)):
                flat[tower, layer, path] = np.asarray(leaf[layer])
    target = {"token_embedder": {"embedding": params["embed"]["embedding"]}}
    for tower in ("encoder", "decoder"):
        own = "self_attention" if tower == "decoder" else "attention"
        layers = {}
        for layer in range(2):
            at = lambda path, tower=tower, layer=layer: flat[tower, layer, path]
            attend = lambda part, at=at: {
                name: {
                    "kernel": at(f"{part}.{name}.kernel").reshape(
                        (-1, 16) if name == "out" else (16, -1)
                    )
                }
                for name in ("query", "key", "value", "out")
            }
            actual = {own: attend("self_attention")}
            actual[f"pre_{own}_layer_norm"] = {"scale": at("self_norm.scale")}
            actual["pre_mlp_layer_norm"] = {"scale": at("ff_norm.scale")}
            parts = (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down"))
            actual["mlp"] = {t: {"kernel": at(f"feed_forward.{o}.kernel")} for t, o in parts}
            if tower == "decoder":
                actual["encoder_decoder_attention"] = attend("cross_attention")
                actual["pre_cross_attention_layer_norm"] = {"scale": at("cross_norm.scale")}
            layers[f"layers_{layer}"] = actual
        layers["relpos_bias"] = {"rel_embedding": params[tower]["relative"]["relative_bias"].T}
        layers[f"{tower}_norm"] = params[tower]["norm"]
        target[tower] = layers
    target["decoder"]["logits_dense"] = {"kernel": params["head"]}
    directory.mkdir()
    content = {"target": jax.tree.map(np.asarray, target), "state": {"step": np.int32(7)}}
    (directory / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(content))
    return params


def test_a_t5x_checkpoint_is_imported_with_tokenizer_dir(tmp_path, tiny_tokens):
    config = transformer.ModelConfig.from_flat(WORDS)
    params = t5x_checkpoint(tmp_path / "checkpoint_7", config)
    assert t5x.find_checkpoint(tmp_path / "checkpoint_7")
    vocabulary.write(tiny_tokens.directory, tmp_path / "vocabulary")
    command = ["import", str(tmp_path / "checkpoint_7"), f"--workdir={tmp_path / 'run'}"]
    command += ["--config=configs/finetune.py", "--config.model.activation=swiglu"]
    command += [
        "--config.model.position.relative_attention_max_distance=100"
    ]  # neither shows in the shapes
    assert cli.main(command) == 2  # T5X keeps no vocabulary
    assert not (tmp_path / "run").exists()
    for name, words in (("run", tmp_path / "vocabulary"), ("again", tiny_tokens.directory)):
        command[2:3] = [f"--workdir={tmp_path / name}"]
        assert cli.main([*command, f"--config.tokenizer.dir={words}"]) == 0
        run, read = params_of(tmp_path / name)
        equal(read, params)
        assert runs.make_tokenizer(run).fingerprint == tiny_tokens.fingerprint
    assert run.data.input_length == 96  # the config's own
    assert (run.model.activation, run.model.position.relative_attention_max_distance) == (
        "swiglu",
        100,
    )


MEASURE = """
import sys
from lm import cli

def kilobytes(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))

small, big = sys.argv[1:]
cli.main(["import", small, f"--workdir={small}-run"])  # all that the command itself needs
before = kilobytes("VmRSS")
cli.main(["import", big, f"--workdir={big}-run"])
print(kilobytes("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_an_import_takes_less_than_1_3_times_the_memory_of_the_checkpoint(foreign, tmp_path):
    sizes = dict(vocab_size=140_000, d_model=256, d_ff=9_000, num_heads=4, num_kv_heads=4)
    config = transformer.ModelConfig(**sizes, num_encoder_layers=2, num_decoder_layers=2)
    params = jax.tree.map(
        lambda x: np.full(x.shape, 0.5, np.float32), transformer.param_shapes(config)
    )
    params["head"][0] = 1  # not the embedding's copy, which would not be read
    shutil.copytree(foreign, tmp_path / "small")
    transformers.write(params, config, tmp_path / "big")
    for path in foreign.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            shutil.copy(path, tmp_path / "big")
    command = [sys.executable, "-c", MEASURE, tmp_path / "small", tmp_path / "big"]
    process = subprocess.run(command, cwd=parity.ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    peak, checkpoint = (
        int(process.stdout.split()[-1]),
        4 * transformer.parameter_count(config) / 1024,
    )
    assert checkpoint > 250_000
    assert checkpoint * 0.9 < peak < checkpoint * 1.3, (peak, checkpoint)


MISTAKES = {
    "not empty": (lambda d: d / "imported", "w", "not empty; give a new --workdir"),
    "no directory": (lambda d: d / "nothing", "new", "does not exist; give the directory"),
    "where one is": (
        lambda d: d / "imported",
        ".",
        "is the current directory; give a new",
    ),
    "a list": (lambda d: d / "list", "new", "has no JSON object"),
    "a word for a size": (lambda d: d / "word", "new", "model.d_model='16' is not an integer"),
    "no header": (lambda d: d / "header", "new", "is not as transformers or T5X write it"),
    "no checkpoint": (lambda d: d / "empty", "new", "has no config.json"),
    "no vocabulary": (lambda d: d / "bare", "new", "no vocabulary"),
    "cut": (lambda d: d / "cut", "new", "cut or damaged"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_a_sentence_and_leaves_no_files(foreign, tmp_path, case, capsys, monkeypatch):
    directory, workdir, message = MISTAKES[case]
    (tmp_path / "current").mkdir()
    monkeypatch.syspath_prepend(parity.ROOT)
    monkeypatch.chdir(tmp_path / "current")
    for name in ("list", "word", "header"):
        shutil.copytree(foreign, tmp_path / name)
    (tmp_path / "list" / "config.json").write_text("[1]")
    config = json.loads((foreign / "config.json").read_text()) | {"d_model": "16"}
    (tmp_path / "word" / "config.json").write_text(json.dumps(config))
    (tmp_path / "header" / "model.safetensors").write_bytes(b"\x08" + bytes(7) + b'{"a":{}}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "something").write_text("text")
    shutil.copytree(foreign, tmp_path / "imported")
    shutil.copytree(foreign, tmp_path / "cut")
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(foreign / name, tmp_path / "bare")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    before = sorted(path.name for path in tmp_path.iterdir())
    workdir = "." if workdir == "." else tmp_path / workdir
    assert cli.main(["import", str(directory(tmp_path)), f"--workdir={workdir}"]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_vocabulary_larger_than_the_embedding_is_refused(foreign, tmp_path):
    config = transformer.ModelConfig.from_flat(WORDS | dict(vocab_size=128))
    transformers.write(parity.random_params(config), config, tmp_path / "small")
    for path in foreign.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            shutil.copy(path, tmp_path / "small")
    with pytest.raises(ValueError, match="model.vocab_size=128 is smaller than the tokenizer's"):
        interop.read(tmp_path / "small", tmp_path / "run", base.get_config().to_dict())
    assert not (tmp_path / "run").exists()


def test_similar_names_in_the_same_directory_are_not_touched(foreign, imported, tmp_path):
    for name in ("run.part", ".run.part", "out.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis").write_text("text")
    assert cli.main(["import", str(foreign), f"--workdir={tmp_path / 'run'}"]) == 0
    assert cli.main(["export", f"--workdir={imported}", str(tmp_path / "out")]) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".run.part", "out", "out.part", "run", "run.part"]
    assert (tmp_path / "run.part" / "thesis").read_text() == "text"


def test_an_export_that_fails_leaves_no_files(imported, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(vocabulary, "write", full)
    assert cli.main(["export", f"--workdir={imported}", str(tmp_path / "out")]) == 2
    assert "no space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_was_not_imported_is_no_run(foreign, capsys):
    command = ["train", "--dry_run", "--workdir=nowhere"]
    for flag in (f"=configs/finetune.py:{foreign}", f".init_from={foreign}"):
        config = ["--config=configs/finetune.py"] if flag.startswith(".") else []
        assert cli.main([*command, *config, f"--config{flag}"]) == 2
        assert f"python -m lm import {foreign}" in capsys.readouterr().err


def test_a_tilde_stands_for_the_home_directory(imported, monkeypatch):
    monkeypatch.setenv("HOME", str(imported.parent))
    assert finetune.get_config("~/run").init_from == str(imported)


def test_an_import_keeps_the_checkpoints_dropout_and_a_preset_does_not(foreign, tmp_path):
    config = json.loads((foreign / "config.json").read_text()) | {"dropout_rate": 0.25}
    shutil.copytree(foreign, tmp_path / "wet")
    (tmp_path / "wet" / "config.json").write_text(json.dumps(config))
    interop.read(tmp_path / "wet", tmp_path / "run", paired())
    interop.write(tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dropout_rate"] == 0.25
    assert pretrain.get_config(str(tmp_path / "run")).model.dropout_rate == 0


def paired() -> dict:
    """The default config with a task of pairs."""
    config = base.get_config()
    config.data.task = "docstring_summary"
    return config.to_dict() | {"stage": "finetune"}


def test_an_export_never_overwrites(imported, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    assert cli.main(["export", f"--workdir={imported}", str(tmp_path / "out")]) == 2
    assert "not empty; give a new directory" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
