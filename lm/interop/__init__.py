"""Checkpoints and vocabularies of other codebases, in and out: transformers both ways, T5X in.

names, transformers: weights and config.json; vocabulary: tokenizer files; t5x: T5X's weights;
peft: what LoRA has learnt.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

import jax

from lm import (
    checkpoints,
    evaluate,
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

FOREIGN = (AttributeError, IndexError, KeyError, TypeError)  # what files of other kinds provoke


def read(directory, workdir, config: dict) -> str:
    """Turn a foreign checkpoint into a run's folder that holds parameters and a tokenizer.

    directory: a transformers checkpoint, or a step of T5X's. config: nested dict of all keys; its
    sections model and tokenizer give way to the checkpoint's. T5X keeps no config and no tokenizer
    beside its weights: model.activation and the relative bias's distance limit, where the shapes
    fit both, are the config's, and tokenizer.dir names a directory with a SentencePiece model.
    The folder appears whole or not at all. Returns what was read, in a line.
    Raises ValueError for what cannot be read, and where something is already.
    """
    if storage.is_remote(directory):
        raise ValueError(
            f"{directory} is in a bucket, and a checkpoint to import is read from a disk alone; "
            f"copy it to one with `gcloud storage cp --recursive`."
        )
    directory, config = pathlib.Path(directory).expanduser(), copy.deepcopy(config)
    if not directory.exists():
        raise ValueError(f"{directory} does not exist; give the directory of the checkpoint.")
    reader = t5x if t5x.found(directory) else transformers
    with _whole(workdir, "--workdir to import into") as draft:
        try:
            model, assumed = _architecture(reader, directory, config["model"])
            _take_vocabulary(directory, config["tokenizer"]["dir"], draft / "tokenizer")
        except FOREIGN as error:
            raise _damaged(directory, error) from error
        tokens = tokenizer.Tokenizer(draft / "tokenizer")
        config["model"] = dataclasses.asdict(model)
        named = dict(vocab_size=tokens.vocab_size, num_extra_ids=tokens.num_extra_ids)
        config["tokenizer"] |= named | dict(normalization=tokens.normalization, dir="")
        run = runs.make_run(config, draft)
        try:
            # Arrays of the readers lie so that a CPU device takes them over: no second copy.
            params = jax.tree.map(jax.device_put, reader.read_params(directory, model))
        except FOREIGN as error:
            raise _damaged(directory, error) from error
        facts = {
            "config": runs.without_operational(config),
            "tokenizer": tokens.fingerprint,
            "data": {},
        }
        with checkpoints.Checkpoints(draft / "checkpoints", background=False) as saved:
            saved.save(steps.State(0, params, None, 0), facts | {"position": {"next_index": 0}})
        runs.claim(run, tokens)
    return (
        f"{workdir}: {transformer.parameter_count(model):,} parameters, head {model.lm_head}, "
        f"{tokens.size:,} ids{assumed}; start from it with --config=configs/finetune.py:{workdir}"
    )


def _architecture(reader, directory: pathlib.Path, words: dict):
    # The model, and, for the account, what of it no file tells.
    told, assumed, words = reader.read_architecture(directory), {}, transformer.flatten(words)
    if reader is t5x:
        gated = lambda word: lookup.lookup(layers.ACTIVATIONS, word, "model.activation")[1]
        if gated(words["activation"]) == gated(told["activation"]):
            assumed = {"activation": words["activation"]}
        limit = "position.relative_attention_max_distance"
        assumed[limit] = words[limit]
    chosen = {key: words[key] for key in transformer.COMPUTE_KEYS if key != "dropout_rate"}
    model = transformer.ModelConfig.from_flat(told | chosen | assumed)
    said = ", ".join(f"{key}={value}" for key, value in assumed.items())
    return model, f"; assumed, since T5X does not tell: {said}" if said else ""


def _damaged(directory: pathlib.Path, error: Exception) -> ValueError:
    return ValueError(
        f"{directory} is not as transformers or T5X write it ({type(error).__name__}: {error}); "
        f"copy it again."
    )


def _take_vocabulary(directory: pathlib.Path, named: str, out: pathlib.Path) -> None:
    source = storage.as_path(named).expanduser() if named else directory
    facts = source / tokenizer.METADATA_FILE
    if facts.exists() and b'"fingerprint"' in facts.read_bytes():  # made here
        storage.copy_dir(tokenizer.Tokenizer(source).directory, out, tokenizer.METADATA_FILE)
    else:
        vocabulary.read(source, out)


@contextlib.contextmanager
def _whole(directory, what: str) -> Iterator[pathlib.Path]:
    """A draft beside `directory` that takes its name when the work is done, or goes if it fails.

    Of a bucket's it is on a disk, and sent there then.
    """
    directory = storage.as_path(directory).expanduser().absolute()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory} is not empty; give a new {what}.")
    if directory == pathlib.Path.cwd():
        raise ValueError(f"{directory} is where you are; give a new {what}, by its name.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    beside = None if storage.is_remote(directory) else directory.parent
    draft = pathlib.Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=beside))
    try:
        yield draft
        if storage.is_remote(directory):
            mark = peft.CONFIG if (draft / peft.CONFIG).exists() else "config.json"
            storage.copy_dir(draft, directory, mark)  # without which it is of no kind
            return
        draft.chmod(0o755)
        draft.rename(directory)  # an empty directory gives way
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def write(workdir, directory, which: str | int = "newest", adapters: bool = False) -> str:
    """Write a run's parameters and tokenizer as a transformers checkpoint; which: of what step.

    The directory appears whole or not at all; AutoModelForSeq2SeqLM and AutoTokenizer load it.
    What LoRA has learnt is merged into the kernels, or with `adapters` written alone, for peft.
    Returns what was written, in a line. Raises ValueError for a model that no family of
    transformers can express, without LoRA for `adapters`, and where the directory is not empty.
    """
    with _whole(directory, "directory to export into") as draft:
        run = runs.read_run(workdir)
        tokens = runs.make_tokenizer(run)
        if adapters:
            return _write_adapters(run, tokens, which, draft, directory)
        params, step = inference.read_params(run, tokens, which)
        transformers.write(params, run.model, draft)
        vocabulary.write(tokens.directory, draft)
    return f"{directory}: update {step} of {workdir} as a transformers checkpoint"


def _write_adapters(run: runs.Run, tokens, which, draft: pathlib.Path, directory) -> str:
    if not run.lora.rank:
        raise ValueError(f"{run.workdir} has no adapters (lora.rank=0); leave out --adapters.")
    params, step = inference.read_trainable_params(run, tokens, which)
    peft.write(params, run.model, run.lora, draft)
    taken = run.init_from or run.teacher.workdir
    return (
        f"{directory}: the adapters of update {step} of {run.workdir}, for peft; their model is "
        f"what `python -m lm export` makes of {taken}"
    )
