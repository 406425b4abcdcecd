"""Checkpoints and vocabularies of other codebases: transformers in and out, T5X in.

transformers  weights and config.json of transformers
names         its names for our parameters and config keys
safetensors   its file format of weights
vocabulary    its tokenizer files
t5x           T5X's weights
peft          LoRA factors, as the library peft writes them
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

import jax

from lm import (
    checkpoints,
    inference,
    layers,
    lookup,
    runs,
    steps,
    storage,
    tokenizer,
    transformer,
)
from lm.interop import peft, t5x, transformers, vocabulary

# Errors on reading a file that does not have the expected structure.
FORMAT_ERRORS = (AttributeError, IndexError, KeyError, TypeError)


def read(directory: str | os.PathLike, workdir: str | os.PathLike, config: dict) -> str:
    """Import a checkpoint of transformers, or a step of T5X, into a new run's workdir.

    The workdir appears complete or not at all.

    Args:
      directory: of the checkpoint.
      workdir: of the new run.
      config: nested dict of all keys. The checkpoint replaces its sections model and tokenizer,
        except what T5X does not store: the relative bias's maximal distance, model.activation if
        the shapes fit it, and tokenizer.dir, a directory with a SentencePiece model.

    Returns a line about the import. Raises ValueError for an unreadable checkpoint, and if the
    workdir is not empty.
    """
    if storage.is_remote(directory):
        fix = "copy it to a disk with `gcloud storage cp --recursive`."
        raise ValueError(f"{directory} is in a bucket, from which no checkpoint is imported; {fix}")
    directory, config = pathlib.Path(directory).expanduser(), copy.deepcopy(config)
    if not directory.exists():
        raise ValueError(f"{directory} does not exist; give the directory of the checkpoint.")
    reader = t5x if t5x.find_checkpoint(directory) else transformers
    with _staging_dir(workdir, "--workdir to import into") as staging:
        try:
            model, assumed = _architecture(reader, directory, config["model"])
            _import_vocabulary(directory, config["tokenizer"]["dir"], staging / "tokenizer")
        except FORMAT_ERRORS as error:
            raise _damaged(directory, error) from error
        tokens = tokenizer.Tokenizer(staging / "tokenizer")
        config["model"] = dataclasses.asdict(model)
        sizes = {"vocab_size": tokens.vocab_size, "num_extra_ids": tokens.num_extra_ids}
        config["tokenizer"] |= sizes | {"normalization": tokens.normalization, "dir": ""}
        run = runs.make_run(config, staging)
        try:
            # The readers align arrays so that a CPU device uses them without a copy.
            params = jax.tree.map(jax.device_put, reader.read_params(directory, model))
        except FORMAT_ERRORS as error:
            raise _damaged(directory, error) from error
        metadata = {"config": runs.without_operational(config), "tokenizer": tokens.fingerprint}
        metadata |= {"data": {}, "position": {"next_index": 0}}
        with checkpoints.Checkpoints(staging / "checkpoints", background=False) as manager:
            manager.save(steps.State(0, params, None, 0), metadata)
        runs.claim(run, tokens)
    return (
        f"{workdir}: {transformer.parameter_count(model):,} parameters, head {model.lm_head}, "
        f"{tokens.size:,} ids{assumed}; start from it with --config=configs/finetune.py:{workdir}"
    )


def _architecture(reader, directory: pathlib.Path, config: dict):
    """The model's config, and a note on values that the checkpoint does not determine."""
    fields, assumed, config = reader.read_architecture(directory), {}, transformer.flatten(config)
    if reader is t5x:
        has_gate = lambda name: lookup.lookup(layers.ACTIVATIONS, name, "model.activation")[1]
        if has_gate(config["activation"]) == has_gate(fields["activation"]):
            assumed["activation"] = config["activation"]
        key = "position.relative_attention_max_distance"
        assumed[key] = config[key]
    compute = {key: config[key] for key in transformer.COMPUTE_KEYS if key != "dropout_rate"}
    model = transformer.ModelConfig.from_flat(fields | compute | assumed)
    note = ", ".join(f"{key}={value}" for key, value in assumed.items())
    return model, f"; assumed, since T5X does not store it: {note}" if note else ""


def _damaged(directory: pathlib.Path, error: Exception) -> ValueError:
    return ValueError(
        f"{directory} is not as transformers or T5X write it ({error}); copy it again."
    )


def _import_vocabulary(directory: pathlib.Path, tokenizer_dir: str, out: pathlib.Path) -> None:
    source = storage.as_path(tokenizer_dir).expanduser() if tokenizer_dir else directory
    metadata = source / tokenizer.METADATA_FILE
    if metadata.exists() and b'"fingerprint"' in metadata.read_bytes():  # a tokenizer of ours
        storage.copy_dir(tokenizer.Tokenizer(source).directory, out, tokenizer.METADATA_FILE)
    else:
        vocabulary.read(source, out)


@contextlib.contextmanager
def _staging_dir(directory: str | os.PathLike, name: str) -> Iterator[pathlib.Path]:
    """Yield a temporary directory that is renamed to `directory`, or deleted on an error.

    For a bucket it is on a local disk, and copied. name: of the argument, in errors.
    """
    directory = storage.as_path(directory).expanduser().absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} is not empty; give a new {name}.")
    if directory == pathlib.Path.cwd():
        raise ValueError(f"{directory} is the current directory; give a new {name}, by its name.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    parent = None if storage.is_remote(directory) else directory.parent
    staging = pathlib.Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=parent))
    try:
        yield staging
        if storage.is_remote(directory):
            last_file = peft.CONFIG if (staging / peft.CONFIG).exists() else "config.json"
            storage.copy_dir(staging, directory, last_file)  # without it nothing can be loaded
            return
        staging.chmod(0o755)
        staging.rename(directory)  # replaces an empty directory
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write(
    workdir: str | os.PathLike,
    directory: str | os.PathLike,
    which: str | int = "newest",
    adapters: bool = False,
) -> str:
    """Export a run's parameters and tokenizer for AutoModelForSeq2SeqLM and AutoTokenizer.

    which: the checkpoint. adapters: write LoRA factors alone, for peft, instead of merging them
    into the kernels. The directory appears complete or not at all. Returns a line about the export.
    Raises ValueError for a model that no family of transformers can represent, for `adapters`
    without LoRA, and if the directory is not empty.
    """
    with _staging_dir(directory, "directory to export into") as staging:
        run = runs.read_run(workdir)
        tokens = runs.make_tokenizer(run)
        if adapters:
            return _write_adapters(run, tokens, which, staging, directory)
        params, step = inference.read_params(run, tokens, which)
        transformers.write(params, run.model, staging)
        vocabulary.write(tokens.directory, staging)
    return f"{directory}: update {step} of {workdir} as a transformers checkpoint"


def _write_adapters(run: runs.Run, tokens, which, staging: pathlib.Path, directory) -> str:
    if not run.lora.rank:
        raise ValueError(f"{run.workdir} has no adapters (lora.rank=0); leave out --adapters.")
    params, step = inference.read_trainable_params(run, tokens, which)
    peft.write(params, run.model, run.lora, staging)
    base = run.init_from or run.teacher.workdir
    return (
        f"{directory}: the adapters of update {step} of {run.workdir}, for peft; export their base "
        f"model from {base} with `python -m lm export`"
    )
