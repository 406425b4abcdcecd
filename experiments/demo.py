"""From the docstrings of the installed packages to a distilled student and one page about it.

  python -m experiments.demo --config=configs/demo.py

Every stage is a `python -m lm` command, printed before it runs, to copy and change. What is
finished is skipped; after an interrupt, the same command continues.
"""

from __future__ import annotations

import shlex
import sys
import time

from lm import door

RUNS = ("pretrain", "finetune", "scratch", "distill", "alone")
SUMMARY = "--config=configs/finetune.py"


def commands(config) -> list[list[str]]:
    """The demo as arguments of `python -m lm`, in order."""
    home, data = config.workdir, config.data_dir or f"{config.workdir}/tfds"
    shared = [f"--config.data.dir={data}", f"--config.seed={config.seed}"]
    shared += [f"--config.tokenizer.dir={config.tokenizer}"] * bool(config.tokenizer)
    pretrain = ["--config=configs/pretrain.py", f"--config.steps={config.pretrain}", *shared]
    tokens = f"--config.tokenizer.dir={config.tokenizer or f'{home}/pretrain/tokenizer'}"
    pairs = [f"--config.data.shards={home}/pairs", f"--config.evaluate.decode={config.decode}"]
    pairs += shared[:2]
    finetune = [SUMMARY, f"--config.steps={config.finetune}", *pairs]
    student = ["--config=configs/distill.py", f"--config.steps={config.distill}", *pairs]
    alone = ["--config.stage=finetune", "--config.name=alone", tokens]
    runs = {
        "pretrain": pretrain,
        "finetune": [*finetune, f"--config.init_from={home}/pretrain"],
        "scratch": [*finetune, "--config.name=scratch", tokens],
        "distill": [*student, f"--config.teacher.workdir={home}/finetune"],
        "alone": [*student, *alone],
    }
    made = [["corpus", *pretrain, f"--workdir={home}/pretrain"]]
    for name, flags in runs.items():
        made.append(["train", *flags, f"--workdir={home}/{name}"])
        made.append(["evaluate", f"--workdir={home}/{name}"])
    page = [f"--runs={','.join(f'{home}/{name}' for name in runs)}", f"--out={home}/report.html"]
    return [*made, ["report", *page, "--title=From docstrings to a distilled student"]]


def run(todo: list[list[str]]) -> int:
    """Run commands of the door in turn; the exit code of the first that fails, else 0."""
    start = time.monotonic()
    for number, arguments in enumerate(todo, 1):
        minutes = (time.monotonic() - start) / 60
        line = shlex.join(["python", "-m", "lm", *arguments])
        print(f"\n[{number}/{len(todo)}, {minutes:.1f} min] {line}", file=sys.stderr, flush=True)
        sys.argv[0] = door.PROGRAM  # so that each run records the command that repeats it
        if code := door.main(arguments):
            return code
    minutes = (time.monotonic() - start) / 60
    print(f"\ndone in {minutes:.1f} minutes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    arguments = sys.argv[1:]
    raise SystemExit(
        door.guarded(lambda: run(commands(door.parse("demo", ("config",), arguments).config)))
    )
