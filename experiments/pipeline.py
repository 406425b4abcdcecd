"""From a corpus to a distilled student and one page about it: pretrain, finetune, distill, report.

  python -m experiments.pipeline --config=configs/demo.py
  python -m experiments.pipeline --config=configs/pipeline.py --config.corpus='texts/*.txt' \\
      --config.finetune.file=configs/own_task.py --config.workdir=runs/own

Every stage is a `python -m lm` command, which is printed before it runs. Finished stages are
skipped; after an interrupt, the same command continues. --dry_run only prints the commands.
configs/pipeline.py documents the keys.
"""

from __future__ import annotations

import shlex
import sys
import time

from experiments import verdicts
from lm import cli

RUNS = ("pretrain", "finetune", "scratch", "distill", "alone")


def commands(config) -> list[list[str]]:
    """The pipeline's commands in order, as arguments of `python -m lm`.

    Each run is followed by its evaluation: pretrain; finetune, initialized from it; scratch, from
    random weights; distill, with finetune as teacher; alone, the same student without a teacher.
    """
    home, runs = config.workdir, flags(config)
    made = [prepared(config)]
    for name, words in runs.items():
        made.append(["train", *words, f"--workdir={home}/{name}"])
        split = [f"--split={config.split}", f"--max_examples={config.decode}"]
        split *= bool(config.split and name != "pretrain")
        made.append(["evaluate", *split, f"--workdir={home}/{name}"])
    return made


def page(config) -> list[str]:
    """Return the arguments of `python -m experiments.verdicts` that write the page."""
    folders = ",".join(f"{config.workdir}/{name}" for name in RUNS)
    return [f"--runs={folders}", f"--out={config.workdir}/report.html", f"--title={config.title}"]


def prepared(config) -> list[str]:
    """The command that makes tokenizer and token shards of the pre-training data."""
    if not config.corpus:
        words = flags(config)["pretrain"]
        return ["corpus", *words, f"--workdir={config.workdir}/pretrain"]
    words = [f"--source={config.corpus}", f"--out={config.workdir}/corpus"]
    words += [f"--data_dir={config.data_dir}"] * bool(config.data_dir)
    return ["corpus", *words, f"--tokenizer={config.tokenizer or 'unigram'}", *_words(config.clean)]


def flags(config) -> dict[str, list[str]]:
    """The flags of `train` for each run."""
    home, data = config.workdir, config.data_dir or f"{config.workdir}/tfds"
    shared = [f"--config.data.tfds_dir={data}", f"--config.seed={config.seed}"]
    named = config.tokenizer or (f"{home}/corpus/tokenizer" if config.corpus else "")
    corpus = [f"--config.data.task={home}/corpus"] * bool(config.corpus)
    pretrain = [*_stage(config.pretrain), *corpus, *shared]
    pretrain += [f"--config.tokenizer.dir={named}"] * bool(named)
    tokens = f"--config.tokenizer.dir={named or f'{home}/pretrain/tokenizer'}"
    pairs = [
        f"--config.data.shards_dir={home}/pairs",
        f"--config.evaluate.max_decoded_examples={config.decode}",
    ]
    pairs += shared
    finetune = [*_stage(config.finetune), *pairs]
    student = [*_stage(config.distill, config.finetune.file), *pairs, "--config.stage=distill"]
    alone = ["--config.stage=finetune", "--config.name=alone", tokens]
    return {
        "pretrain": pretrain,
        "finetune": [*finetune, f"--config.init_from={home}/pretrain"],
        "scratch": [*finetune, "--config.name=scratch", tokens],
        "distill": [*student, f"--config.teacher.workdir={home}/finetune"],
        "alone": [*student, *alone],
    }


def _stage(stage, file: str = "") -> list[str]:
    """A stage's flags: its config file, its updates unless 0, and its own."""
    steps = [f"--config.steps={stage.steps}"] * bool(stage.steps)
    return [f"--config={stage.file or file}", *steps, *_words(stage.flags)]


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ValueError(
            f"{text!r} cannot be split into flags ({error}); close its quotes."
        ) from error


def printed(arguments: list[str], module: str = "lm") -> str:
    """Formats a command for a shell."""
    return shlex.join(["python", "-m", module, *arguments])


def show(commands: list[list[str]]) -> int:
    """Prints the commands and returns 0."""
    print("\n".join(map(printed, commands)))
    return 0


def run(todo: list[list[str]]) -> int:
    """Runs lm commands in turn; returns the exit code of the first that fails, else 0."""
    start = time.monotonic()
    for number, arguments in enumerate(todo, 1):
        minutes = (time.monotonic() - start) / 60
        place = f"\n[{number}/{len(todo)}, {minutes:.1f} min]"
        print(f"{place} {printed(arguments)}", file=sys.stderr, flush=True)
        sys.argv[0] = cli.PROGRAM  # so that each run records the command that repeats it
        if code := cli.main(arguments):
            return code
    minutes = (time.monotonic() - start) / 60
    print(f"\ndone in {minutes:.1f} minutes", file=sys.stderr)
    return 0


def main(arguments: list[str]) -> int:
    """Runs a pipeline, or prints its commands; returns the exit code."""
    if cli.HELP & set(arguments):
        print(__doc__)
        return 0
    chosen = cli.parse_flags("pipeline", ("config", "dry_run"), arguments)
    todo = commands(chosen.config)
    if chosen.dry_run:
        last = printed(page(chosen.config), "experiments.verdicts")
        print("\n".join([*map(printed, todo), last]))
        return 0
    return run(todo) or verdicts.main(page(chosen.config))


if __name__ == "__main__":
    raise SystemExit(cli.run_guarded(lambda: main(sys.argv[1:])))
