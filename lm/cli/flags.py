"""The flags of all commands, and the parser of a command line."""

from __future__ import annotations

import re
import sys
from typing import NamedTuple

from absl import flags
from ml_collections import config_flags

from lm import lookup


class Flag(NamedTuple):
    """A flag: its kind (a key of DEFINE, or positional), default (None: required), and help."""

    kind: str
    default: str | int | float | bool | None
    help: str


DEFINE = {
    "text": flags.DEFINE_string,
    "positional": flags.DEFINE_string,
    "flag": flags.DEFINE_bool,
    "integer": flags.DEFINE_integer,
    "number": flags.DEFINE_float,
    "config": config_flags.DEFINE_config_file,
}
FLAGS = {
    "config": Flag("config", None, "config file, a preset after a colon; keys: --config.steps=10"),
    "workdir": Flag("text", None, "directory of the run: config, logs, checkpoints, results"),
    "runs": Flag("text", None, "run folders and patterns such as runs/demo/*, separated by commas"),
    "source": Flag("text", "", "files, folders, globs, URLs, tfds:name@split; comma-separated"),
    "out": Flag("text", "", "path to write; empty: stdout (report: <first run>/report.html)"),
    "title": Flag("text", "lm", "title of the page"),
    "text": Flag("text", "", "a single input, used verbatim, instead of --input"),
    "input": Flag("text", "", "text file, JSONL or TSV; empty: standard input, one input per line"),
    "strict": Flag("flag", False, "refuse inputs that are too long instead of truncating them"),
    "nearest": Flag("text", "", "write the answer nearest to the targets by bleu, chrf,.."),
    "seed": Flag("integer", 0, "seed of sampling"),
    "interactive": Flag("flag", False, "chat; the default on a terminal without --input"),
    "split": Flag("text", "", "train, heldout, test,..; default: show train, evaluate heldout"),
    "rows": Flag("integer", 3, "examples to print"),
    "max_examples": Flag(
        "integer", None, "examples per task; 0: all; default: all (heldout: config)"
    ),
    "checkpoint": Flag("positional", None, "directory of a transformers or T5X checkpoint"),
    "directory": Flag("positional", None, "directory to write, new or empty"),
    "adapters": Flag("flag", False, "write only the LoRA factors, in the format of peft"),
    "column": Flag("text", "", "text column of JSONL, TSV, Parquet and TFDS; empty: text"),
    "unit": Flag("text", "file", "document in a text file: file, paragraph or line"),
    "data_dir": Flag("text", "", "TFDS directory; empty: $TFDS_DATA_DIR or ~/tensorflow_datasets"),
    "rules": Flag("text", "default", "cleaning and filter rules: default, c4, none, name=limit,.."),
    "dedupe": Flag("text", "near", "duplicates to drop: near (and exact), exact or none"),
    "heldout_fraction": Flag("number", 0.01, "fraction of documents in the split validation"),
    "tokenizer": Flag("text", "unigram", "unigram, bpe or bytes: train that kind; or a directory"),
    "vocab_size": Flag("integer", 32_000, "vocabulary size of the tokenizer to train"),
    "shards": Flag("integer", 0, "files per split; 0: one per 64 MiB of source"),
    "workers": Flag("integer", 0, "processes; 0: one per CPU; any number gives equal output"),
    "model": Flag("flag", False, "print the table of parameters instead of a batch"),
    "sharding": Flag("flag", False, "print each parameter's shards instead of a batch"),
    "runner": Flag("text", "", "Apache Beam runner, such as DirectRunner; empty: local processes"),
    "runner_flags": Flag("text", "", "flags for Beam in one string; see lm/corpus/beam.py"),
    "temp": Flag("text", "", "folder that all workers of the runner share, such as gs://bucket/x"),
    "overlap": Flag("text", "", "build nothing; report the overlap of --source with this data"),
    "ngram": Flag("integer", 13, "words per n-gram of --overlap"),
    "k": Flag("integer", 16, "number of most likely ids to store per target"),
    "dtype": Flag("text", "float16", "of log-probabilities: float16, bfloat16 or float32"),
    "updates": Flag("integer", 0, "number of batches to store; 0: all batches of the run"),
    "decoding": Flag("text", "", "greedy, 'beam num_beams=4', 'sample top_p=0.9'; empty: config's"),
    "step": Flag("text", "", "newest (empty), best, or an update; evaluate: also all or 100,200"),
    "allow_change": Flag("text", "", "config keys that may change: optimizer.learning_rate,.."),
    "profile": Flag("text", "", "updates to trace into WORKDIR/profile, such as 10:15"),
    "coordinator": Flag("text", "", "address:port of host 0, if several hosts train one run"),
    "hosts": Flag("integer", 0, "number of hosts"),
    "host": Flag("integer", -1, "index of this host, from 0"),
    "dry_run": Flag("flag", False, "check, print the plan, and stop"),
    "slice": Flag("text", None, "TPU slice by its Cloud name (v5e-8, v5p-128), local, or h100-8"),
    "extensions": Flag("text", "", "config files that register the run's own functions"),
    "price": Flag("number", None, "price of one chip per hour, in any currency"),
    "json": Flag("flag", False, "print one JSON object instead of a page"),
}
RENAMED = {  # old flag: new
    "examples": "max_examples",
    "heldout": "heldout_fraction",
    "pieces": "vocab_size",
}
PARSE_ERRORS = (  # messages of absl, ml_collections and Python, and readable ones
    (r"invalid literal for int.*", "is not a whole number; write it in digits."),
    (r"could not convert string to float.*", "is not a number; write it as 0.5 or 1e-3."),
    (r"\('Non-boolean.*", "is not a boolean; write true or false."),
    (r"Failed to parse .* as a ConfigDict.*", "is a whole section; set one of its keys."),
)


def parse_flags(command: str, names: tuple[str, ...], arguments: list[str]) -> flags.FlagValues:
    """Parse the arguments of a command.

    names: keys of FLAGS; a ? at the end makes a flag optional.
    Raises ValueError naming the wrong flag or config key, and the nearest one.
    """
    is_optional = {name.removesuffix("?"): name.endswith("?") for name in names}
    values = flags.FlagValues()
    for name in is_optional:
        kind, default, text = FLAGS[name]
        DEFINE[kind](name, default, text, flag_values=values)
    for argument in arguments:
        name = argument.lstrip("-").partition("=")[0]
        if RENAMED.get(name) in is_optional:
            raise ValueError(f"`{command}` does not take --{name}; it is now --{RENAMED[name]}.")
    # ml_collections needs the file before its keys, and reads the keys from sys.argv.
    arguments = sorted(arguments, key=lambda argument: not argument.startswith("--config="))
    sys.argv = [sys.argv[0], command, *arguments]
    try:
        _, *positional = values([command, *arguments])
        if "config" in values and values.config is not None:
            values.config.is_locked  # noqa: B018  (raises if the config file cannot be read)
    except (flags.Error, AttributeError, KeyError, TypeError, OSError) as error:
        message = f"{_explain(error)} (see `python -m lm {command} --help`)"
        raise ValueError(message) from error
    for name in is_optional:
        if FLAGS[name].kind == "positional" and positional and values[name].value is None:
            setattr(values, name, positional.pop(0))
    if positional:
        hint = lookup.nearest(positional[0].lstrip("-"), is_optional)
        raise ValueError(
            f"`{command}` does not take {positional[0]!r}{hint}; write flags as --flag=value."
        )
    for name, optional in is_optional.items():
        if values[name].value is None and not optional:
            usage = name.upper() if FLAGS[name].kind == "positional" else f"--{name}=..."
            raise ValueError(f"`{command}` needs {usage}: {FLAGS[name].help}.")
    return values


def _explain(error: Exception) -> str:
    """Rephrase a parse error of absl or ml_collections as one sentence."""
    if isinstance(error, OSError):
        return f"--config cannot be read: {str(error).strip().splitlines()[-1].strip()}"
    text = str(error.args[0]) if error.args else str(error)
    if isinstance(error, AttributeError | KeyError):
        names = re.findall(r"\w+", text.replace("\\n", " "))
        hint = f"; did you mean {names[4]!r}?" if "Did" in names[:2] else "."
        return f"the config has no key {names[0]!r}{hint}"
    if "Traceback" in text:  # "flag --config=x: Traceback ... Error: message"
        flag, _, trace = text.partition(": ")
        text = f"{flag}: {trace.strip().splitlines()[-1].partition(': ')[2]}"
    text = " ".join(text.split())
    for pattern, message in PARSE_ERRORS:
        text = re.sub(rf"flag (\S+): {pattern}", rf"\1 {message}", text)
    return text
