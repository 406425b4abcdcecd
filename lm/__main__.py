"""The door: python -m lm <command>. One sentence for what a user can cause, and a non-zero exit."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import sys
from collections.abc import Callable

from absl import flags, logging
from ml_collections import config_flags

from lm import choose
from lm.sources import places

HELP = {"--help", "-h", "help"}
UNFINISHED = 75  # exit code: run the same command again
FLAGS = {  # name: (kind, default or None where it must be given, help)
    "config": ("config", None, "config file, a preset after a colon; keys as --config.steps=10"),
    "workdir": ("text", None, "directory of the run: config, logs, checkpoints, results"),
    "runs": ("text", None, "run folders, separated by commas; patterns as runs/demo/* allowed"),
    "source": ("text", "", "files, folders, globs, addresses, tfds:name@split; commas between"),
    "out": ("text", "", "what to write; empty: standard output (report: <first run>/report.html)"),
    "title": ("text", "lm", "title of the page"),
    "text": ("text", "", "one input to answer, instead of --input"),
    "input": ("text", "", "text file, one input a line; empty: standard input"),
    "split": ("text", "train", "train or heldout"),
    "rows": ("integer", 3, "examples to print"),
    "checkpoint": ("place", None, "directory of transformers (config.json, safetensors), or T5X's"),
    "directory": ("place", None, "directory to write, new or empty"),
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
    "step": ("text", "", "newest (empty), best or an update's number; show: the batch it takes"),
    "allow_change": ("text", "", "keys that may differ from the run's own: optimizer.peak,.."),
    "profile": ("text", "", "updates to trace into the workdir's folder profile, as 10:15"),
    "coordinator": ("text", "", "address:port of host 0, where several hosts train one run"),
    "hosts": ("integer", 0, "how many they are"),
    "host": ("integer", -1, "which of them this one is, from 0"),
    "dry_run": ("flag", False, "check and print what would be done, then stop"),
    "slice": ("text", None, "TPU slice as Cloud names it (v5e-8, v5p-128), local, or h100-8"),
    "price": ("number", None, "of one chip for an hour, in any currency"),
    "json": ("flag", False, "print one JSON object instead of a page"),
    "search": ("flag", False, "rank layouts of the run on the slice by their predicted step"),
}


WRONG_TYPES = (  # what absl, ml_collections and Python say of a flag's value, and what we do
    (r"invalid literal for int.*", "is no whole number; write it in digits."),
    (r"could not convert string to float.*", "is no number; write it as 0.5 or 1e-3."),
    (r"Failed to parse .* as a ConfigDict.*", "is for a whole section; set one of its keys."),
)


def parse(name: str, takes: tuple[str, ...], arguments: list[str]) -> flags.FlagValues:
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
        hint = choose.nearest(rest[0].lstrip("-"), takes)
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


def usage(name: str) -> str:
    """The help of one command."""
    function, takes = COMMANDS[name]
    lines = [f"python -m lm {name}: {inspect.cleandoc(function.__doc__)}", ""]
    for flag in takes:
        kind, default, text = FLAGS[flag.removesuffix("?")]
        given = "required" if default is None and not flag.endswith("?") else "optional"
        given = given if default in (None, "") else f"default {default!r}"
        shown = flag.upper() if kind == "place" else "--" + flag.removesuffix("?")
        lines.append(f"  {shown:<12} {text} ({given})")
    if {"config", "config?"} & set(takes):
        lines += ["", "Every key of a config, its unit and its default: configs/base.py."]
    return "\n".join(lines)


def checked_run(values):
    """The checked run of --config and --workdir."""
    from lm import run

    return run.make_run(values.config.to_dict(), values.workdir)


def corpus(values) -> None:
    """Build a corpus of any text (--source, --out), or what a config's training reads (--config).

    The folder --out holds the stored tokens of its splits, their tokenizer, quarantine.jsonl with
    what could not be read, and manifest.json. It appears whole or not at all; a run reads it with
    --config.data.task=DIRECTORY. With --config and --workdir, the embedded dataset, the tokenizer
    and the token shards of that run are made. With --overlap, runs of words common to training and
    evaluation data are counted; both are sources or finished corpora, and --out is a JSON file.
    """
    from lm.corpus import command

    given = [flag.rstrip("?") for flag in CORPUS if values[flag.rstrip("?")].present]
    texts = values.source or values.out or values.overlap
    if texts or None in (values.config, values.workdir):
        print(command.command(values.flag_values_dict(), given))
        return
    command.check_given("config", given)
    from lm import run, sources, tasks

    this = checked_run(values)
    if {tasks.task_named(name).dataset for name in this.data.names} & sources.EMBEDDED:
        from lm import pydocs

        print(pydocs.build(str(sources.data_root(this.data.dir))))
    tokens = run.make_tokenizer(this)
    for examples in run.make_examples(this, tokens):
        for part in examples.parts:
            print(part.directory, json.dumps(part.manifest["counts"]))


def tokenizer(values) -> None:
    """Train the config's tokenizer on its training split, or find it; report on held-out texts.

    The report is printed, and written to tokenizer_report.json in the workdir.
    """
    from lm import logs, run, tokenizer

    this = checked_run(values)
    texts = run.Texts(this, run.splits(this)[1], tokenizer.REPORTED)
    made = run.make_tokenizer(this)
    print(f"{made.directory}: {tokenizer.numbers(made, this.model.vocab_size)}")
    found = tokenizer.measure(made, texts)
    print(tokenizer.table(found))
    place = this.workdir / "tokenizer_report.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    logs.write_atomically(place, json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def train(values) -> int:
    """Train a run to its last update; continues where an earlier call was stopped.

    Exit codes: 0 at the end; 2 a mistake, or what only you can cure; 3 training diverged (a report
    is in the workdir); 75 unfinished: run the same command again.
    """
    from lm import parallel, run, train

    this = checked_run(values)
    allow = tuple(filter(None, values.allow_change.split(",")))
    profile = train.traced(values.profile)
    parallel.start(values.coordinator, values.hosts, values.host)
    try:
        if values.dry_run:
            train.check(this, allow)
            train.layout(this)
            print(json.dumps(this.config, indent=2))
            if "epoch" not in this.config["duration"]:  # which needs the data
                print(json.dumps(train.planned(this, run.total_updates(this, 0))), file=sys.stderr)
            return 0
        figures = train.train(this, allow=allow, profile=profile)
    except (train.Unfinished, train.Diverged) as stop:
        print(f"lm: {stop}", file=sys.stderr)
        return stop.code
    except (ValueError, OSError) as error:
        if parallel.hosts()[1] > 1:  # which would wait for this one
            train.leave(" ".join(str(error).split()), 2)
        raise
    print(f"{this.name}: {json.dumps(figures)}")
    return 0


def _chosen(step: str) -> str | int:
    """What --step names: newest, best or an update's number."""
    if step.isdecimal():
        return int(step)
    return choose.choose({"newest": "newest", "best": "best"}, step or "newest", "--step")


def evaluate(values) -> None:
    """Held-out loss, unigram baselines and task scores of a run; writes evaluate.json."""
    from lm import evaluate

    print(json.dumps(evaluate.evaluate(values.workdir, _chosen(values.step)), indent=2))


def predict(values) -> None:
    """Answer inputs with a run's model: one JSON line each, in order."""
    from lm import evaluate, logs

    if values.text:
        texts = [values.text]
    else:
        data = places.place(values.input).read_bytes() if values.input else sys.stdin.buffer.read()
        # Not splitlines(): it would also cut at U+2028 and form feeds inside a line.
        texts = data.decode("utf-8", "replace").removesuffix("\n").split("\n")
    answers = evaluate.predict(values.workdir, texts, _chosen(values.step))
    rows = [
        json.dumps({"inputs": text, "prediction": answer}, ensure_ascii=False) + "\n"
        for text, answer in zip(texts, answers, strict=True)
    ]
    if values.out:
        logs.write_atomically(values.out, "".join(rows))
    else:
        sys.stdout.writelines(rows)


def show(values) -> None:
    """Print a batch as text, what goes in and must come out; or the model's parameters.

    Of a workdir that a run has claimed, its own config is taken where none is given.
    """
    from lm import run, show

    this = run.read_run(values.workdir) if values.config is None else checked_run(values)
    for asked, table in ((values.model, show.parameters), (values.sharding, show.sharding)):
        if asked:
            print(table(this))
            return
    if not re.fullmatch(r"\d*", values.step):
        raise ValueError(f"--step={values.step} is no update's number; write it in digits.")
    run.check_workdir(this)
    print(show.rows(this, values.split, values.rows, int(values.step or 1)))


def report(values) -> None:
    """Turn run folders into one self-contained page of claims, curves, tables and samples."""
    from lm import report

    patterns = values.runs.split(",")
    folders = [folder for pattern in patterns for folder in places.matching(pattern)]
    runs = [folder for folder in folders if places.place(f"{folder}/config.json").exists()]
    if not runs:
        raise ValueError(f"--runs={values.runs} names no run folder (none has a config.json).")
    out = values.out or f"{runs[0]}/report.html"
    report.write(runs, out, title=values.title)
    print(out)


def preflight(values) -> int:
    """Compile a run's step for chips that are not here: does it fit, how fast is it, what it costs.

    Needs no data; `make tpu-compiler` installs the TPU compiler. Of GPUs only memory is known, from
    shapes; local means this machine's devices. Exit codes: 0 it fits; 1 it does not; 2 a mistake.
    """
    from lm.preflight import command

    return command.preflight(values.flag_values_dict())


def import_checkpoint(values) -> None:
    """Turn a checkpoint of transformers or T5X into a run's folder, to use or start from.

    The model and tokenizer of --config give way to the checkpoint's; of T5X, which keeps no
    tokenizer, --config.tokenizer.dir names a directory with one. Without a config: configs/base.py,
    of a fine-tuning run.
    """
    from lm import interop

    if values.config is None:
        from configs import base

        config = base.get_config().to_dict()
        config["stage"], config["data"]["task"] = "finetune", "docstring_summary"
    else:
        config = values.config.to_dict()
    print(interop.read(values.checkpoint, values.workdir, config | {"name": "imported"}))


def export_checkpoint(values) -> None:
    """Write a run's parameters and tokenizer as a transformers checkpoint."""
    from lm import interop

    print(interop.write(values.workdir, values.directory, _chosen(values.step)))


CORPUS = ("source", "out", "column", "unit", "data_dir", "rules", "dedupe", "heldout", "tokenizer")
CORPUS += ("pieces", "shards", "workers", "runner", "runner_flags", "temp", "overlap", "ngram")
CORPUS += ("dry_run", "config?", "workdir?")
TRAIN = ("config", "workdir", "dry_run", "allow_change", "profile", "coordinator", "hosts", "host")
COMMANDS = {
    "corpus": (corpus, CORPUS),
    "tokenizer": (tokenizer, ("config", "workdir")),
    "train": (train, TRAIN),
    "evaluate": (evaluate, ("workdir", "step")),
    "predict": (predict, ("workdir", "text", "input", "out", "step")),
    "show": (show, ("config?", "workdir", "split", "rows", "model", "sharding", "step")),
    "import": (import_checkpoint, ("checkpoint", "workdir", "config?")),
    "export": (export_checkpoint, ("workdir", "directory", "step")),
    "report": (report, ("runs", "out", "title")),
    "preflight": (preflight, ("config", "slice", "workdir?", "price?", "json", "search")),
}


def overview() -> str:
    """The help of the door: every command in a line."""
    summary = lambda function: function.__doc__.splitlines()[0]
    lines = [f"  {name:<10} {summary(function)}" for name, (function, _) in COMMANDS.items()]
    return "\n".join(["python -m lm <command> [flags]; each has its own --help", "", *lines])


def guarded(work: Callable[[], int | None]) -> int:
    """Do the work: its exit code or 0; 2 with one sentence on stderr for a user's mistake, 75 where
    it was interrupted or has waited in vain.
    """
    # Recompiling is the longest wait of a short run; orbax and tfds say much that is no news.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/lm/jax"))
    logging.set_verbosity(logging.FATAL)
    try:
        places.place(os.environ["JAX_COMPILATION_CACHE_DIR"])  # of gs://, as all else reaches it
        return work() or 0
    except (ValueError, OSError) as error:
        if os.environ.get("LM_TRACEBACK"):  # for whoever looks for the place, not the cure
            raise
        print(f"lm: {' '.join(str(error).split())}", file=sys.stderr)
        return UNFINISHED if isinstance(error, TimeoutError) else 2
    except KeyboardInterrupt:
        print("\nlm: interrupted; run the same command again.", file=sys.stderr)
        return UNFINISHED


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in HELP:
        print(overview())
        return 0

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # where none saves first, as Ctrl-C

    def work():
        name, *rest = arguments
        function, takes = choose.choose(COMMANDS, name, "the command")
        if HELP & set(rest):
            print(usage(name))
            return 0
        return function(parse(name, takes, rest))

    return guarded(work)


if __name__ == "__main__":
    raise SystemExit(main())
