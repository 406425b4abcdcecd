"""The commands: each takes the values of its flags, and returns an exit code or None for 0."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import tempfile

from lm import exits, lookup, storage


def checked_run(values):
    """The checked run of --config and --workdir."""
    from lm import runs

    return runs.make_run(values.config.to_dict(), values.workdir)


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
    from lm import runs, sources

    run = checked_run(values)
    read = {run.data.get_task(name).source.removeprefix("tfds:") for name in run.data.names}
    if read & sources.EMBEDDED_DATASETS:
        from lm.sources import pydocs

        print(pydocs.build(str(sources.data_root(run.data.tfds_dir))))
    tokens = runs.make_tokenizer(run)
    for examples in runs.make_examples(run, tokens):
        for part in examples.parts:
            print(part.directory, json.dumps(part.manifest["counts"]))


def tokenizer(values) -> None:
    """Train the config's tokenizer on its training split, or find it; report on held-out texts.

    The report is printed, and written to tokenizer_report.json in the workdir.
    """
    from lm import logs, runs, tokenizer

    run = checked_run(values)
    texts = runs.Texts(run, runs.splits(run)[1], tokenizer.MAX_REPORTED_TEXTS)
    made = runs.make_tokenizer(run)
    print(f"{made.directory}: {tokenizer.describe_sizes(made, run.model.vocab_size)}")
    found = tokenizer.text_stats(made, texts)
    print(tokenizer.format_stats(found))
    place = run.workdir / "tokenizer_report.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    logs.write_atomically(place, json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def train(values) -> int:
    """Train a run to its last update; continues where an earlier call was stopped.

    Exit codes: 0 at the end; 2 a mistake, or what only you can cure; 3 training diverged (a report
    is in the workdir); 75 unfinished: run the same command again.
    """
    from lm import parallel, runs, train

    run = checked_run(values)
    allow = tuple(filter(None, values.allow_change.split(",")))
    profile = train.parse_profile(values.profile)
    parallel.initialize(values.coordinator, values.hosts, values.host)
    try:
        if values.dry_run:
            train.check(run, allow)
            train.make_strategy(run)
            print(json.dumps(run.config, indent=2))
            if "epoch" not in run.config["duration"]:  # which needs the data
                print(
                    json.dumps(train.planned_cost(run, runs.total_updates(run, 0))), file=sys.stderr
                )
            return 0
        figures = train.train(run, allow=allow, profile=profile)
    except (train.Unfinished, train.Diverged) as stop:
        print(f"lm: {stop}", file=sys.stderr)
        return stop.code
    except (ValueError, OSError) as error:
        if parallel.host_index_and_count()[1] > 1:  # which would wait for this one
            parallel.wait_before_exit()
            train.exit_now(exits.one_line(error, None), exits.USER_ERROR)
        raise
    print(f"{run.name}: {json.dumps(figures)}")
    return 0


def _chosen(step: str) -> str | int:
    """What --step names: newest, best or an update's number."""
    if step.isdecimal():
        return int(step)
    return lookup.lookup({"newest": "newest", "best": "best"}, step or "newest", "--step")


def _lost(said: str) -> None:
    """End this host's evaluation: another one is gone."""
    from lm import train

    why = said and f" ({said})"
    train.exit_now(f"another host was lost{why}; see to what it said, and start them all again.")


@contextlib.contextmanager
def _together(values):
    """What the hosts of a command do as one: a mistake of this one ends it, others would wait."""
    from lm import parallel, train

    parallel.initialize(values.coordinator, values.hosts, values.host)
    try:
        with train.detect_lost_host(_lost):
            yield
    except (ValueError, OSError) as error:
        if parallel.host_index_and_count()[1] > 1:
            parallel.wait_before_exit()
            train.exit_now(exits.one_line(error, None), exits.USER_ERROR)
        raise


def teacher_cache(values) -> None:
    """Ask a student's teacher once about all batches of its run, and keep what it says in --out.

    Kept are the --k likeliest ids of each target, their log-probabilities, and what all others have
    together. --config is the student's; teacher.cache=OUT then trains it, and any other of the same
    teacher, tokenizer, data and temperature, without the teacher. The size is printed first. What
    is interrupted goes on when the same command is run again, and more --updates make a cache
    longer.
    """
    from lm import runs, train

    if not values.out:
        raise ValueError("`teacher-cache` needs --out=...: the folder to write.")
    run = runs.make_run(values.config.to_dict(), values.out)
    with _together(values):
        writer = train.CacheWriter(run, values.k, values.dtype, values.updates)
        if writer.first:
            print(writer.account(), file=sys.stderr, flush=True)
        if not values.dry_run:
            said = writer.write()
            print(said) if writer.first else None


def evaluate(values) -> None:
    """Held-out loss, baselines and task scores of a run, with 95 % intervals, into its workdir.

    evaluate.json and predictions.jsonl are of what the run holds out; those of --split=test have
    -test in their names, and are of the whole split. Several checkpoints, as --step=all or
    1000,2000: their scores by update, in evaluate.jsonl and curve.png, and what each answers, in
    predictions-1000.jsonl, ..
    """
    from lm import evaluate, parallel

    if values.examples is not None and values.examples < 0:
        raise ValueError(f"--examples={values.examples} is too small; use 0, all, or more.")
    chosen = {"split": values.split, "decoding": values.decoding, "max_examples": values.examples}
    numbers = values.step.split(",")
    several = values.step == "all" or len(numbers) > 1
    if several and values.step != "all" and not all(map(str.isdecimal, numbers)):
        raise ValueError(f"--step={values.step} are no updates' numbers; write them as 1000,2000.")
    with _together(values):
        if several:
            steps = [] if values.step == "all" else list(map(int, numbers))
            found = evaluate.evaluate_all(values.workdir, steps, **chosen)
        else:
            found = evaluate.evaluate(values.workdir, _chosen(values.step), **chosen)
    if not parallel.host_index_and_count()[0]:
        print(json.dumps(found, indent=2))


def predict(values) -> None:
    """Answer inputs with a run's model: one JSON line each, in order.

    A line of text, --text and a row with "inputs" are asked as they stand, the task's words before
    them included. Of any other row of JSONL or TSV the run's task makes the input from its columns;
    columns are passed on. With --split the pairs of the task's own data are asked; a student learns
    from the answers with --config.data.train_split=OUT. What is interrupted goes on where it was when the
    same command is run again, from OUT.part. On a terminal, without --input, --split and --text,
    lines are asked as they are typed: the task's words are put before them, and a dialogue has a
    history.
    """

    from lm import inference

    chosen = {"step": _chosen(values.step), "decoding": values.decoding, "seed": values.seed}
    given = [flag for flag in ("text", "input", "split", "interactive") if values[flag].value]
    if len(given) > 1:
        raise ValueError(f"--{given[0]} and --{given[1]} cannot both be; leave one out.")
    chosen["strict"] = values.strict
    if values.interactive or not given and sys.stdin.isatty():
        for flag in ("out", "nearest"):
            if values[flag].value:
                raise ValueError(
                    f"--{flag}={values[flag].value} is of no use for lines that are typed; give "
                    f"--input or --split, or pipe lines into standard input."
                )
        inference.interactive(values.workdir, **chosen)
        return
    with tempfile.NamedTemporaryFile(suffix=".txt") as file:
        rows = inference.InputFile(values.input or file.name)
        if values.text:
            rows = [{"inputs": values.text}]
        elif values.split:
            rows = inference.SplitInputs(values.workdir, values.split)
        elif not values.input:
            shutil.copyfileobj(sys.stdin.buffer, file)  # to be read twice
            file.flush()
        inference.predict(values.workdir, rows, values.out, nearest=values.nearest, **chosen)


def show(values) -> None:
    """Print a batch as text, what goes in and must come out; or the model's parameters.

    Of a workdir that a run has claimed, its own config is taken where none is given.
    """
    from lm import runs, show

    run = runs.read_run(values.workdir) if values.config is None else checked_run(values)
    for asked, table in ((values.model, show.parameters), (values.sharding, show.sharding)):
        if asked:
            print(table(run))
            return
    if not re.fullmatch(r"\d*", values.step):
        raise ValueError(f"--step={values.step} is no update's number; write it in digits.")
    runs.check_workdir(run)
    print(show.rows(run, values.split or "train", values.rows, int(values.step or 1)))


def report(values) -> None:
    """Turn run folders into one self-contained page of claims, curves, tables and samples."""
    from lm import report

    patterns = values.runs.split(",")
    folders = [folder for pattern in patterns for folder in storage.glob_paths(pattern)]
    runs = [folder for folder in folders if storage.as_path(f"{folder}/config.json").exists()]
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
    """Write a run's parameters and tokenizer as a transformers checkpoint.

    What LoRA has learnt is merged into them; with --adapters it alone is written, for peft.
    """
    from lm import interop

    which = _chosen(values.step)
    print(interop.write(values.workdir, values.directory, which, values.adapters))


CORPUS = ("source", "out", "column", "unit", "data_dir", "rules", "dedupe", "heldout", "tokenizer")
CORPUS += ("pieces", "shards", "workers", "runner", "runner_flags", "temp", "overlap", "ngram")
CORPUS += ("dry_run", "config?", "workdir?")
TRAIN = ("config", "workdir", "dry_run", "allow_change", "profile", "coordinator", "hosts", "host")
EVALUATE = ("workdir", "split", "step", "decoding", "examples?", "coordinator", "hosts", "host")
CACHE = ("config", "out", "k", "dtype", "updates", "dry_run", "coordinator", "hosts", "host")
PREDICT = ("workdir", "input", "split", "out", "text", "decoding", "nearest", "seed", "strict")
PREDICT += ("step", "interactive")
COMMANDS = {
    "corpus": (corpus, CORPUS),
    "tokenizer": (tokenizer, ("config", "workdir")),
    "train": (train, TRAIN),
    "teacher-cache": (teacher_cache, CACHE),
    "evaluate": (evaluate, EVALUATE),
    "predict": (predict, PREDICT),
    "show": (show, ("config?", "workdir", "split", "rows", "model", "sharding", "step")),
    "import": (import_checkpoint, ("checkpoint", "workdir", "config?")),
    "export": (export_checkpoint, ("workdir", "directory", "step", "adapters")),
    "report": (report, ("runs", "out", "title")),
    "preflight": (preflight, ("config", "slice", "workdir?", "price?", "json")),
}
