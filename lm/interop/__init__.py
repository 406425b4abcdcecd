"""Checkpoints and vocabularies of other codebases, in and out: transformers both ways, T5X in.

names, transformers: weights and config.json; vocabulary: tokenizer files; t5x: T5X's weights.
"""

from __future__ import annotations

import copy
import dataclasses
import pathlib
import shutil

import jax

from lm import checkpoints, choose, evaluate, layers, run, steps, tokenizer, transformer
from lm.interop import t5x, transformers, vocabulary

# Keys of config.model that are the reader's own choice, not the checkpoint's.
CHOSEN = ("dropout_rate", "dtype", "layers", "remat")


def read(directory, workdir, config: dict) -> str:
    """Turn a foreign checkpoint into a run's folder that holds parameters and a tokenizer.

    directory: a transformers checkpoint, or a step of T5X's. config: nested dict of all keys; its
    sections model and tokenizer give way to the checkpoint's. T5X keeps no config and no tokenizer
    beside its weights: model.activation and relative_limit, where the shapes fit both, are the
    config's, and tokenizer.dir names a directory with a SentencePiece model.
    The folder appears whole or not at all. Returns what was read, in a line.
    Raises ValueError for what cannot be read, and where a run is already.
    """
    directory, workdir = pathlib.Path(directory).expanduser(), pathlib.Path(workdir)
    if workdir.exists() and any(workdir.iterdir()):
        raise ValueError(f"{workdir} is not empty; give a new --workdir to import into.")
    if not directory.is_dir():
        raise ValueError(f"{directory} is no directory; give the one that holds the checkpoint.")
    reader = t5x if t5x.found(directory) else transformers
    part = workdir.with_name(workdir.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    config = copy.deepcopy(config)
    told = reader.read_architecture(directory)
    chosen = {key: config["model"][key] for key in CHOSEN}
    if reader is t5x:
        chosen |= _untold(told, config["model"])
    model = transformer.ModelConfig(**told | chosen)
    config["model"] = dataclasses.asdict(model)
    try:
        vocabulary.read(_vocabulary_dir(directory, config), part / "tokenizer")
        tokens = tokenizer.Tokenizer(part / "tokenizer")
        named = dict(pieces=tokens.pieces, num_sentinels=tokens.num_sentinels)
        config["tokenizer"] |= named | dict(
            normalization=tokens.normalization, dir="", kind="unigram"
        )
        this = run.make_run(config, part)
        # Arrays of the readers lie so that a CPU device takes them over: no second copy.
        params = jax.tree.map(jax.device_put, reader.read_params(directory, model))
        facts = {"config": config, "tokenizer": tokens.fingerprint, "data": {}}
        with checkpoints.Checkpoints(part / "checkpoints", background=False) as saved:
            saved.save(steps.State(0, params, None), facts | {"position": {"next_index": 0}})
        run.claim(this, tokens)
        workdir.parent.mkdir(parents=True, exist_ok=True)
        workdir.exists() and workdir.rmdir()
        part.rename(workdir)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    count = transformer.parameter_count(model)
    return (
        f"{workdir}: {count:,} parameters and {tokens.size:,} ids; start from it with "
        f"--config=configs/finetune.py:{workdir}"
    )


def _untold(told: dict, words: dict) -> dict:
    # What the shapes of a T5X checkpoint do not tell is as the config says.
    gated = lambda word: choose.choose(layers.ACTIVATIONS, word, "model.activation")[1]
    same = gated(words["activation"]) == gated(told["activation"])
    chosen = {"activation": words["activation"]} if same else {}
    return chosen | {"relative_limit": words["relative_limit"]}


def _vocabulary_dir(directory: pathlib.Path, config: dict) -> pathlib.Path:
    named = config["tokenizer"]["dir"]
    return pathlib.Path(named).expanduser() if named else directory


def write(workdir, directory) -> str:
    """Write a run's newest parameters and tokenizer as a transformers checkpoint.

    The directory appears whole or not at all; AutoModelForSeq2SeqLM and AutoTokenizer load it.
    Returns what was written, in a line. Raises ValueError for a model that no family of
    transformers can express, and where the directory is not empty.
    """
    directory = pathlib.Path(directory).expanduser()
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} is not empty; give a new directory to export into.")
    this = run.read_run(workdir)
    tokens = run.make_tokenizer(this)
    params, step = evaluate.read_params(this, tokens)
    part = directory.with_name(directory.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        transformers.write(params, this.model, part)
        vocabulary.write(tokens.directory, part)
        directory.exists() and directory.rmdir()
        part.rename(directory)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return f"{directory}: update {step} of {workdir} as a transformers checkpoint"
