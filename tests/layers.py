"""The layers of lm/, lowest first: the table of README's map and of the law of imports."""

from __future__ import annotations

import pathlib
import re

README = pathlib.Path(__file__).parents[1] / "README.md"
MAP = re.compile(r"(?<=<!-- map: make golden -->\n).*?(?=<!-- end of map -->)", re.DOTALL)

# (layer, its packages and modules, contents). Each may import those of the strings before its own.
LAYERS = (
    (
        "vocabulary",
        ("exits", "batch extensions lookup storage"),
        "exit codes; the batch record; entries that config files add; lookup by name; disks and gs://",
    ),
    (
        "math",
        ("attention losses optimizers objectives metrics", "cpu_kernels", "decoding"),
        "pure functions of arrays",
    ),
    (
        "model",
        ("layers", "transformer"),
        "flax.linen modules, config, KV cache, LoRA, parameter and FLOP counts",
    ),
    (
        "learning",
        ("steps initialization", "distill"),
        "train and eval steps; where parameters start; distillation losses",
    ),
    (
        "data",
        ("sources", "tokenizer", "tasks", "shards", "pipeline"),
        "records, tokens, text-to-text tasks, stored tokens, batches in exact order",
    ),
    (
        "devices",
        ("checkpoints logs", "parallel"),
        "checkpoints that verify themselves; metrics, events, goodput; pmap and mesh",
    ),
    ("runs", ("runs",), "config sections that check themselves; the workdir that a run claims"),
    (
        "use",
        ("inference", "evaluate", "train interop"),
        "generate, predict, chat; scores; the training loop; checkpoints of other codebases",
    ),
    (
        "tools",
        ("corpus show report", "preflight"),
        "build corpora; inspect configs and batches; pages; compile a run for any TPU slice",
    ),
    ("command line", ("cli",), "commands and flags"),
)
RANK = {
    name: rank
    for rank, names in enumerate(group for _, groups, _ in LAYERS for group in groups)
    for name in names.split()
}


def readme_map() -> str:
    """LAYERS as README's table."""
    rows = [
        f"| {layer} | {' '.join(f'`{name}`' for name in ' '.join(groups).split())} | {contents} |\n"
        for layer, groups, contents in LAYERS
    ]
    return "| layer | packages and modules | contents |\n| --- | --- | --- |\n" + "".join(rows)


def write_readme_map() -> None:
    README.write_text(MAP.sub(readme_map().replace("\\", r"\\"), README.read_text()))
