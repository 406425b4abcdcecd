"""What is the smallest TPU slice that a preset trains on, how fast at best?  preflight_table.md.

  python -m experiments.preflight_table [--presets=t5_1_1_small,t5_1_1_base] [--chips=v5e,v5p]
                                        [--only=t5_1_1_small@v5e] [--tries=6]

The run is configs/pretrain_wikipedia.py, its batch of 128 rows of 512 tokens, with bfloat16
activations and scanned layers. From the smallest slice up, the run is compiled as it is, then with
as few changes as make it fit: micro-batches, remat, fsdp; what cannot fit by its shapes is not
compiled. A row is kept as soon as it is found; rows that are there are not made again, but by
--only. Every row, with versions and commit, is in preflight_table.jsonl.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import tempfile
import time

import tqdm

from configs import pretrain_wikipedia
from lm import logs, lookup, runs, transformer
from lm.preflight import compiler, search, slices

HERE = pathlib.Path(__file__).parent
RECORD, PAGE = HERE / "preflight_table.jsonl", HERE / "preflight_table.md"
PRESETS = [f"t5_1_1_{size}" for size in ("small", "base", "large", "xl", "xxl")]
PRESETS += ["t5gemma_2b_2b"]
CHIPS = ["v5e", "v5p", "v6e", "v4"]
HEADER = ("preset", "parameters", "slice", "chips", "layout", "micro-batches", "remat")
HEADER += ("peak of memory, GiB", "step, ms", "MFU", "compile, s", "programs")


def config_of(preset: str) -> dict:
    """The pre-training that the table is about, of one preset."""
    config = pretrain_wikipedia.get_config(preset)
    config.model.update(dtype="bfloat16", layers="scanned")
    return config.to_dict()


def row_of(preset: str, chip: str, tries: int) -> dict:
    """The smallest slice of a chip that the preset fits, and what the compiler says of it."""
    start, programs = time.perf_counter(), 0

    def compile_counted(*given, **more):
        nonlocal programs
        programs += 1
        # One that was stopped would count as one that does not fit.
        return compiler.compile_for(*given, timeout=86_400.0, **more)

    with tempfile.TemporaryDirectory() as workdir:
        run = runs.make_run(config_of(preset), workdir)
        offered = slices.sizes(chip)
        found = search.smallest(run, offered, tries=tries, compile=compile_counted)
    parameters = transformer.parameter_count(run.model)
    made = dict(preset=preset, chip=chip, parameters=parameters, programs=programs)
    made |= dict(
        rows=run.data.batch_size, lengths=run.lengths, all_seconds=time.perf_counter() - start
    )
    if found is None:
        return made | dict(slice="")
    target = slices.slice_named(found.slice)
    made |= dict(slice=found.slice, chips=target.chips, proven=found.proven, flags=found.flags)
    made |= dict(layout=search.name_of(found.layout, target.chips), remat=found.layout.remat)
    made |= dict(
        num_microbatches=found.layout.num_microbatches, peak=found.peak, step_s=found.step_s
    )
    return made | dict(memory=target.chip.memory, mfu=found.mfu, compile_seconds=found.seconds)


def table(rows: list[dict]) -> str:
    """The rows as the page shows them."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + " --- |" * len(HEADER)]
    for row in rows:
        cells = [
            row["preset"],
            f"{row['parameters'] / 1e6:,.0f} M",
            row["slice"] or f"none of {row['chip']}",
        ]
        if row["slice"]:
            of = f"{row['peak'] / 2**30:.1f} of {row['memory'] / 2**30:.2f}"
            cells += [row["chips"], row["layout"], row["num_microbatches"], row["remat"], of]
            if row["proven"]:
                cells += [
                    f"{row['step_s'] * 1e3:.0f}",
                    f"{row['mfu']:.0%}",
                    f"{row['compile_seconds']:.0f}",
                ]
            else:
                cells += ["not compiled", "", ""]
        cells += [""] * (len(HEADER) - 1 - len(cells)) + [row["programs"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def kept() -> list[dict]:
    """The rows that are there."""
    return logs.read(RECORD) if RECORD.exists() else []


def keep(row: dict) -> None:
    """Put a row among those that are there, in the table's order, and make the page's table."""
    place = lambda one: (one["preset"], one["chip"])
    rows = [one for one in kept() if place(one) != place(row)] + [row]
    rows.sort(key=lambda one: (PRESETS.index(one["preset"]), CHIPS.index(one["chip"])))
    before, mark, after = PAGE.read_text().partition("<!-- table -->\n")
    _, end, rest = after.partition("<!-- end of table -->\n")
    logs.write_atomically(RECORD, "".join(json.dumps(one) + "\n" for one in rows))
    logs.write_atomically(PAGE, before + mark + table(rows) + "\n" + end + rest)


def asked(arguments) -> list[tuple[str, str]]:
    """The (preset, chip) to make: those of --only, or all asked for that are not there yet."""
    if arguments.only:
        pairs = [tuple(word.split("@")) for word in arguments.only]
    else:
        there = {(row["preset"], row["chip"]) for row in kept()}
        pairs = [(preset, chip) for preset in arguments.presets for chip in arguments.chips]
        pairs = [pair for pair in pairs if pair not in there]
    for preset, chip in pairs:
        lookup.lookup(dict.fromkeys(PRESETS), preset, "--presets")
        lookup.lookup(dict.fromkeys(CHIPS), chip, "--chips")
    return pairs


def main() -> None:
    """Make the rows asked for, and print the table."""
    known = argparse.ArgumentParser(prog="python -m experiments.preflight_table")
    listed = lambda text: text.split(",")
    known.add_argument("--presets", type=listed, default=PRESETS)
    known.add_argument("--chips", type=listed, default=CHIPS[:2])
    known.add_argument("--only", type=listed, default=[], help="preset@chip,.. to make again")
    known.add_argument("--tries", type=int, default=search.TRIES, help="programs for a row at most")
    arguments = known.parse_args()
    stamp = dict(date=str(datetime.date.today()), commit=logs.commit())
    stamp |= dict(versions=logs.versions() | {"libtpu": compiler.requirement().partition("==")[2]})
    for preset, chip in tqdm.tqdm(asked(arguments), unit="row"):
        keep(row_of(preset, chip, arguments.tries) | stamp)
    print(table(kept()))


if __name__ == "__main__":
    main()
