"""The commands: each takes the values of its flags and returns an exit code, None for 0."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from absl import flags

from lm import exits, lookup, storage

if TYPE_CHECKING:
    from lm import runs


def _make_run(values: flags.FlagValues) -> runs.Run:
    """Check --config and --workdir."""
    from lm import runs

    return runs.make_run(values.config.to_dict(), values.workdir)


def corpus(values: flags.FlagValues) -> None:
    """Build a corpus of any text (--source, --out), or what a config's training reads (--config).

    --out gets the token shards of each split, the tokenizer, quarantine.jsonl with unreadable
    records, and manifest.json. It appears whole or not at all; train on it with
    --config.data.task=OUT. With --config and --workdir, builds the embedded dataset, the tokenizer
    and the token shards of that run. --overlap counts word n-grams shared by training and
    evaluation data, both sources or corpora, and writes a JSON report to --out.
    """
    from lm.corpus import command

    flags_set = [flag.rstrip("?") for flag in CORPUS if values[flag.rstrip("?")].present]
    is_build = values.source or values.out or values.overlap
    if is_build or None in (values.config, values.workdir):
        print(command.command(values.flag_values_dict(), flags_set))
        return
    command.check_flags("config", flags_set)
    from lm import runs, sources

    run = _make_run(values)
    datasets = {run.data.get_task(name).source.removeprefix("tfds:") for name in run.data.names}
    if datasets & sources.EMBEDDED_DATASETS:
        from lm.sources import pydocs

        print(pydocs.build(str(sources.data_root(run.data.tfds_dir))))
    tokens = runs.make_tokenizer(run)
    for examples in runs.make_examples(run, tokens):
        for split in examples.splits:
            print(split.directory, json.dumps(split.manifest["counts"]))


def tokenizer(values: flags.FlagValues) -> None:
    """Train the config's tokenizer on its training split, and report on held-out texts.

    Reads the tokenizer if it exists. The report goes to tokenizer_report.json in the workdir.
    """
    from lm import logs, runs, tokenizer

    run = _make_run(values)
    texts = runs.Texts(run, runs.splits(run)[1], tokenizer.MAX_REPORTED_TEXTS)
    tokens = runs.make_tokenizer(run)
    print(f"{tokens.directory}: {tokenizer.describe_sizes(tokens, run.model.vocab_size)}")
    stats = tokenizer.text_stats(tokens, texts)
    print(tokenizer.format_stats(stats))
    path = run.workdir / "tokenizer_report.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    logs.write_atomically(path, json.dumps(stats, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _multihost(values: flags.FlagValues) -> Iterator[None]:
    """Join the hosts of a command; exit at once after an error, as the other hosts would wait."""
    from lm import parallel, train

    parallel.initialize(values.coordinator, values.hosts, values.host)
    try:
        yield
    except (ValueError, OSError) as error:
        if parallel.host_index_and_count()[1] > 1:
            parallel.wait_before_exit()
            train.exit_now(exits.one_line(error, None), exits.USER_ERROR)
        raise


def _exit_lost(reason: str) -> None:
    from lm import train

    reason = reason and f" ({reason})"
    train.exit_now(f"another host was lost{reason}; see its own message, and restart all hosts.")


def train(values: flags.FlagValues) -> int:
    """Train a run; the same command continues an interrupted one.

    Exit codes: 0 finished; 2 an error that only you can fix; 3 diverged, with a report in the
    workdir; 75 unfinished: run the same command again.
    """
    from lm import runs, train

    run = _make_run(values)
    allow = tuple(filter(None, values.allow_change.split(",")))
    profile = train.parse_profile(values.profile)
    try:
        with _multihost(values):
            if not values.dry_run:
                figures = train.train(run, allow=allow, profile=profile)
                print(f"{run.name}: {json.dumps(figures)}")
                return 0
            train.check(run, allow)
            train.make_strategy(run)
            print(json.dumps(run.config_dict, indent=2))
            if not run.duration.epochs:  # the updates of an epoch depend on the data
                cost = train.planned_cost(run, runs.total_updates(run, 0))
                print(json.dumps(cost), file=sys.stderr)
    except (train.Unfinished, train.Diverged) as stop:
        print(f"lm: {stop}", file=sys.stderr)
        return stop.code
    return 0


def teacher_cache(values: flags.FlagValues) -> None:
    """Run a teacher once over the batches of a student's run, and store its top-k outputs in --out.

    Stores for each target the --k most likely ids, their log-probabilities, and the log of the sum
    of all other probabilities, each to the power of 1 / temperature. --config is the student's.
    Train it, and any other student with the same teacher, tokenizer, data and temperature, with
    teacher.cache=OUT. Prints the size first. The same command continues an interrupted one; a
    larger --updates extends a cache.
    """
    from lm import runs, train

    if not values.out:
        raise ValueError("`teacher-cache` needs --out=...: the folder to write.")
    run = runs.make_run(values.config.to_dict(), values.out)
    with _multihost(values), train.detect_lost_host(_exit_lost):
        writer = train.CacheWriter(run, values.k, values.dtype, values.updates)
        if writer.is_first_host:
            print(writer.describe(), file=sys.stderr, flush=True)
        if not values.dry_run:
            summary = writer.write()
            if writer.is_first_host:
                print(summary)


def _parse_step(step: str) -> str | int:
    """Parse --step: newest, best or the number of an update."""
    if step.isdecimal():
        return int(step)
    return lookup.lookup({"newest": "newest", "best": "best"}, step or "newest", "--step")


def evaluate(values: flags.FlagValues) -> None:
    """Held-out loss, baselines and task scores of a run, with 95 % intervals.

    Writes evaluate.json and predictions.jsonl into the workdir; --split=test writes
    evaluate-test.json and so on, for the whole split. --step=all or --step=1000,2000 evaluates
    several checkpoints: evaluate.jsonl, curve.png and predictions-1000.jsonl, ..
    """
    from lm import evaluate, parallel, train

    if values.max_examples is not None and values.max_examples < 0:
        raise ValueError(f"--max_examples={values.max_examples} is negative; use 0 for all.")
    names = ("split", "decoding", "max_examples")
    options = {name: values[name].value for name in names}
    steps = [] if values.step == "all" else values.step.split(",")
    several = len(steps) != 1
    if several and not all(map(str.isdecimal, steps)):
        raise ValueError(f"--step={values.step} is not a list of updates; write it as 1000,2000.")
    with _multihost(values), train.detect_lost_host(_exit_lost):
        if several:
            figures = evaluate.evaluate_all(values.workdir, list(map(int, steps)), **options)
        else:
            figures = evaluate.evaluate(values.workdir, _parse_step(values.step), **options)
    if not parallel.host_index_and_count()[0]:
        print(json.dumps(figures, indent=2))


def predict(values: flags.FlagValues) -> None:
    """Generate answers to inputs with a run's model: one JSON line for each, in order.

    --text answers a text; --input the lines of a text file or the rows of a JSONL or TSV file.
    --split answers a split of the task's data; a student is trained on the answers with
    --config.data.train_split=OUT.
    Without these flags, predict answers the lines of standard input; at a terminal it chats.

    Texts and the column "inputs" are used unchanged, so they must begin with the task's prefix.
    Rows without "inputs", and typed lines, fill the task's template; dialogues have a history.
    Other columns are copied to the output line. The same command continues an interrupted one,
    from OUT.part.
    """
    from lm import inference

    options: dict[str, Any] = {"step": _parse_step(values.step), "decoding": values.decoding}
    options |= {"seed": values.seed, "strict": values.strict}
    inputs = [flag for flag in ("text", "input", "split", "interactive") if values[flag].value]
    if len(inputs) > 1:
        raise ValueError(f"--{inputs[0]} and --{inputs[1]} exclude each other; omit one.")
    if values.interactive or not inputs and sys.stdin.isatty():
        for flag in ("out", "nearest"):
            if values[flag].value:
                raise ValueError(
                    f"--{flag}={values[flag].value} is not supported for typed lines; give "
                    f"--input or --split, or pipe lines into standard input."
                )
        inference.interactive(values.workdir, **options)
        return
    with tempfile.NamedTemporaryFile(suffix=".txt") as file:
        rows: Any = inference.InputFile(values.input or file.name)
        if values.text:
            rows = [{"inputs": values.text}]
        elif values.split:
            rows = inference.SplitInputs(values.workdir, values.split)
        elif not values.input:
            shutil.copyfileobj(sys.stdin.buffer, file)  # rows are read twice
            file.flush()
        inference.predict(values.workdir, rows, values.out, nearest=values.nearest, **options)


def show(values: flags.FlagValues) -> None:
    """Print a batch as text: the encoder's inputs and the decoder's targets; or the parameters.

    Without --config, uses the config of the workdir.
    """
    from lm import runs, show

    run = runs.read_run(values.workdir) if values.config is None else _make_run(values)
    if values.model or values.sharding:
        print(show.parameters(run) if values.model else show.sharding(run))
        return
    if not re.fullmatch(r"\d*", values.step):
        raise ValueError(f"--step={values.step} is not the number of an update.")
    runs.check_workdir(run)
    print(show.rows(run, values.split or "train", values.rows, int(values.step or 1)))


def find_run_folders(patterns: str) -> list[str]:
    """Find the run folders that --runs names. Raises ValueError if there are none."""
    folders = [folder for pattern in patterns.split(",") for folder in storage.glob_paths(pattern)]
    runs = [folder for folder in folders if storage.as_path(f"{folder}/config.json").exists()]
    if not runs:
        raise ValueError(f"--runs={patterns} names no run folder (none has a config.json).")
    return runs


def report(values: flags.FlagValues) -> None:
    """Render run folders as one self-contained page of curves, tables and samples."""
    from lm import report

    runs = find_run_folders(values.runs)
    out = values.out or f"{runs[0]}/report.html"
    report.write(runs, out, title=values.title)
    print(out)


def preflight(values: flags.FlagValues) -> int:
    """Compile a run's step for chips that you do not have: memory, speed, cost.

    Needs no data; `make tpu-compiler` installs the TPU compiler. GPUs get an estimate of memory
    from shapes only; local means the devices of this machine. Exit codes: 0 it fits; 1 it does
    not; 2 a user error.
    """
    from lm.preflight import command

    return command.preflight(values.flag_values_dict())


def _import(values: flags.FlagValues) -> None:
    """Import a checkpoint of transformers or T5X as a run folder.

    The checkpoint's model and tokenizer replace those of --config; T5X checkpoints have no
    tokenizer, so set --config.tokenizer.dir. Default config: configs/base.py, fine-tuning.
    """
    from lm import interop

    if values.config is None:
        from configs import base

        config = base.get_config().to_dict()
        config["stage"], config["data"]["task"] = "finetune", "docstring_summary"
    else:
        config = values.config.to_dict()
    print(interop.read(values.checkpoint, values.workdir, config | {"name": "imported"}))


def _export(values: flags.FlagValues) -> None:
    """Export a run's parameters and tokenizer as a transformers checkpoint.

    LoRA factors are merged; --adapters writes only them, for peft.
    """
    from lm import interop

    step = _parse_step(values.step)
    print(interop.write(values.workdir, values.directory, step, values.adapters))


# The flags of each command; one with ? is optional even without a default.
CORPUS = ("source", "out", "column", "unit", "data_dir", "rules", "dedupe", "heldout_fraction")
CORPUS += ("tokenizer", "vocab_size", "shards", "workers", "runner", "runner_flags")
CORPUS += ("temp", "overlap", "ngram", "dry_run", "config?", "workdir?")
HOSTS = ("coordinator", "hosts", "host")
PREDICT = ("workdir", "input", "split", "out", "text", "decoding", "nearest", "seed", "strict")
PREDICT += ("step", "interactive", "extensions")
EVALUATE = ("workdir", "split", "step", "decoding", "max_examples?", "extensions", *HOSTS)
SHOW = ("config?", "workdir", "split", "rows", "model", "sharding", "step", "extensions")
TRAIN = ("config", "workdir", "dry_run", "allow_change", "profile", "extensions", *HOSTS)
CACHE = ("config", "out", "k", "dtype", "updates", "dry_run", "extensions", *HOSTS)
COMMANDS: dict[str, tuple[Callable[[flags.FlagValues], int | None], tuple[str, ...]]] = {
    "corpus": (corpus, CORPUS),
    "tokenizer": (tokenizer, ("config", "workdir")),
    "train": (train, TRAIN),
    "teacher-cache": (teacher_cache, CACHE),
    "evaluate": (evaluate, EVALUATE),
    "predict": (predict, PREDICT),
    "show": (show, SHOW),
    "import": (_import, ("checkpoint", "workdir", "config?")),
    "export": (_export, ("workdir", "directory", "step", "adapters", "extensions")),
    "report": (report, ("runs", "out", "title")),
    "preflight": (preflight, ("config", "slice", "workdir?", "price?", "json")),
}
