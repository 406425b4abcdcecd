"""The flags of every command: their kinds, defaults and help, and how a line is read."""

from __future__ import annotations

import re
import sys

from absl import flags
from ml_collections import config_flags

from lm import lookup

FLAGS = {  # name: (kind, default or None where it must be given, help)
    "config": ("config", None, "config file, a preset after a colon; keys as --config.steps=10"),
    "workdir": ("text", None, "directory of the run: config, logs, checkpoints, results"),
    "runs": ("text", None, "run folders, separated by commas; patterns as runs/demo/* allowed"),
    "source": ("text", "", "files, folders, globs, addresses, tfds:name@split; commas between"),
    "out": ("text", "", "what to write; empty: standard output (report: <first run>/report.html)"),
    "title": ("text", "lm", "title of the page"),
    "text": ("text", "", "one input, as it stands, instead of --input"),
    "input": ("text", "", "text file, JSONL or TSV; empty: standard input, a line each"),
    "strict": ("flag", False, "refuse inputs that are too long instead of cutting them"),
    "nearest": ("text", "", "write of several answers the one nearest to targets by bleu, chrf,.."),
    "seed": ("integer", 0, "of what is sampled"),
    "interactive": ("flag", False, "ask line by line; so it is on a terminal without --input"),
    "split": (
        "text",
        "",
        "show: train (empty) or heldout; evaluate: heldout (empty), test,.. whole; predict: any",
    ),
    "rows": ("integer", 3, "examples to print"),
    "examples": (
        "integer",
        None,
        "of each task, 0: all; not given: all of a --split, of heldout the run's evaluate.*",
    ),
    "checkpoint": ("place", None, "directory of transformers (config.json, safetensors), or T5X's"),
    "directory": ("place", None, "directory to write, new or empty"),
    "adapters": ("flag", False, "write what LoRA has learnt, alone, as peft does"),
    "column": ("text", "", "where the text is in JSONL, TSV, Parquet and TFDS; empty: text"),
    "unit": ("text", "file", "what is a document in a text file: file, paragraph or line"),
    "data_dir": ("text", "", "TFDS's directory; empty: $TFDS_DATA_DIR or ~/tensorflow_datasets"),
    "rules": ("text", "default", "rules that clean and filter: default, c4, none, name=limit,.."),
    "dedupe": ("text", "near", "duplicates to drop: near (and exact), exact or none"),
    "heldout": ("number", 0.01, "share of documents in the split validation; 0: no such split"),
    "tokenizer": ("text", "unigram", "kind to train: unigram, bpe or bytes; or a directory"),
    "pieces": ("integer", 32_000, "pieces of a tokenizer that is trained"),
    "shards": ("integer", 0, "files of each split; 0: one for 64 MiB of source"),
    "workers": ("integer", 0, "processes; 0: one a processor. The result is the same"),
    "model": ("flag", False, "print the table of parameters instead of a batch"),
    "sharding": ("flag", False, "print what a device holds of each parameter instead of a batch"),
    "runner": ("text", "", "Apache Beam's, as DirectRunner; empty: local processes"),
    "runner_flags": ("text", "", "Beam's own flags in one word; examples in lm/corpus/beam.py"),
    "temp": ("text", "", "folder that the runner's workers reach, as gs://bucket/folder"),
    "overlap": ("text", "", "build nothing; say what of these evaluation data --source has"),
    "ngram": ("integer", 13, "words of a run that --overlap compares"),
    "k": ("integer", 16, "likeliest ids of each target that are kept"),
    "dtype": ("text", "float16", "of their log-probabilities: float16, bfloat16 or float32"),
    "updates": ("integer", 0, "batches to ask the teacher about, from the first; 0: the run's"),
    "decoding": ("text", "", "greedy, 'beam width=4', 'sample top_p=0.9',..; empty: the run's own"),
    "step": ("text", "", "newest (empty), best, an update's number; evaluate: all, or 100,200"),
    "allow_change": (
        "text",
        "",
        "keys that may differ from the run's own: optimizer.learning_rate,..",
    ),
    "profile": ("text", "", "updates to trace into the workdir's folder profile, as 10:15"),
    "coordinator": ("text", "", "address:port of host 0, where several hosts train one run"),
    "hosts": ("integer", 0, "how many they are"),
    "host": ("integer", -1, "which of them this one is, from 0"),
    "dry_run": ("flag", False, "check and print what would be done, then stop"),
    "slice": ("text", None, "TPU slice as Cloud names it (v5e-8, v5p-128), local, or h100-8"),
    "price": ("number", None, "of one chip for an hour, in any currency"),
    "json": ("flag", False, "print one JSON object instead of a page"),
}


WRONG_TYPES = (  # what absl, ml_collections and Python say of a flag's value, and what we do
    (r"invalid literal for int.*", "is no whole number; write it in digits."),
    (r"could not convert string to float.*", "is no number; write it as 0.5 or 1e-3."),
    (r"Failed to parse .* as a ConfigDict.*", "is for a whole section; set one of its keys."),
)


def parse_flags(name: str, takes: tuple[str, ...], arguments: list[str]) -> flags.FlagValues:
    """The flags of a command. Raises ValueError, naming the nearest flag or key."""
    values = flags.FlagValues()
    optional = {flag for flag in takes if flag.endswith("?")}
    takes = tuple(flag.removesuffix("?") for flag in takes)
    for flag in takes:
        kind, default, text = FLAGS[flag]
        if kind == "config":
            config_flags.DEFINE_config_file(flag, None, text, flag_values=values)
        else:
            define = {"flag": flags.DEFINE_bool, "integer": flags.DEFINE_integer}
            define["number"] = flags.DEFINE_float
            define.get(kind, flags.DEFINE_string)(flag, default, text, flag_values=values)
    # ml_collections wants the file before its keys, and reads those from sys.argv itself.
    arguments = sorted(arguments, key=lambda flag: not flag.startswith("--config="))
    sys.argv = [sys.argv[0], name, *arguments]
    try:
        rest = values([name, *arguments])[1:]
        for flag in takes:
            if FLAGS[flag][0] == "place" and rest and getattr(values, flag) is None:
                setattr(values, flag, rest.pop(0))
        given = {flag: getattr(values, flag) for flag in takes}
        if given.get("config") is not None:
            given["config"].is_locked  # noqa: B018  (a file that could not be read raises here)
    except (flags.Error, AttributeError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{_sentence(error)} (see `python -m lm {name} --help`)") from error
    if rest:
        hint = lookup.nearest(rest[0].lstrip("-"), takes)
        raise ValueError(f"`{name}` does not take {rest[0]!r}{hint}; write flags as --flag=value.")
    for flag, value in given.items():
        if value is None and f"{flag}?" not in optional:
            place = flag.upper() if FLAGS[flag][0] == "place" else f"--{flag}=..."
            raise ValueError(f"`{name}` needs {place}: {FLAGS[flag][2]}.")
    return values


def _sentence(error: Exception) -> str:
    """What absl or ml_collections has to say, without the traceback that they put into it."""
    if isinstance(error, OSError):
        return f"--config cannot be read: {str(error).strip().splitlines()[-1].strip()}"
    said = str(error.args[0]) if error.args else str(error)
    if "Traceback" in said:
        flag, _, trace = said.partition(": ")
        said = f"{flag}: {trace.strip().splitlines()[-1].partition(': ')[2]}"
    if isinstance(error, AttributeError | KeyError):
        names = re.findall(r"\w+", said.replace("\\n", " "))
        near = f"; did you mean {names[4]!r}?" if "Did" in names[:2] else "."
        said = f"the config has no key {names[0]!r}{near}"
    said = " ".join(said.split())
    for pattern, cure in WRONG_TYPES:
        said = re.sub(rf"flag (\S+): {pattern}", rf"\1 {cure}", said)
    return said
