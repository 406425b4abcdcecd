"""What is the smallest TPU slice that a preset trains on, and how fast at best?

  python -m experiments.preflight_table [--presets=t5_1_1_small,t5_1_1_base] [--chips=v5e,v5p]
                                        [--only=t5_1_1_small@v5e] [--max_programs=8]

The run is configs/pretrain_wikipedia.py (128 rows of 512 tokens) with bfloat16 activations and
scanned layers. From the smallest slice up, it is compiled as it is, then with the fewest changes
that fit: micro-batches, rematerialization, fsdp. A row is saved as soon as it is complete; existing
rows are kept unless --only names them. Answer: preflight_table.md; every row, with versions and
commit: preflight_table.jsonl.
"""

from __future__ import annotations

import argparse
import tempfile

import tqdm

from configs import pretrain_wikipedia
from experiments import records
from lm import lookup, runs, transformer
from lm.preflight import advice, compiler, roofline, slices

NAME = "preflight_table"
PRESETS = [f"t5_1_1_{size}" for size in ("small", "base", "large", "xl", "xxl")]
PRESETS += ["t5gemma_2b_2b"]
CHIPS = ["v5e", "v5p", "v6e", "v4"]
HEADER = ("preset", "parameters", "slice", "chips", "layout", "micro-batches", "remat")
HEADER += ("peak of memory, GiB", "step, ms", "MFU", "compile, s", "programs")


def make_config(preset: str) -> dict:
    """The config of the table's run for a preset."""
    config = pretrain_wikipedia.get_config(preset)
    config.model.update(dtype="bfloat16", scan_layers=True)
    return config.to_dict()


def make_row(preset: str, chip: str, max_programs: int) -> dict:
    """The smallest slice of a chip that the preset fits, and what the compiler tells of it."""
    programs = 0

    def compile_counted(*args, **kwargs):
        nonlocal programs
        programs += 1
        # A timeout would count as a program that does not fit.
        return compiler.compile_for(*args, timeout=86_400.0, **kwargs)

    with tempfile.TemporaryDirectory() as workdir:
        run = runs.make_run(make_config(preset), workdir)
        limits = {"max_programs": max_programs, "compile": compile_counted}
        trial = advice.smallest(run, slices.sizes(chip), **limits)
        row = dict(preset=preset, chip=chip, parameters=transformer.parameter_count(run.model))
        row |= dict(programs=programs, slice="", rows=run.data.batch_size, lengths=run.lengths)
        if trial is None:
            return row
        final = runs.make_run(advice.changed(run.config_dict, trial.changes), workdir)
    compiled, estimate = trial.compiled, roofline.estimate(trial.compiled)
    layout, fsdp = final.parallel.strategy, final.parallel.fsdp
    return row | dict(
        slice=trial.slice.name,
        chips=trial.slice.chips,
        flags=trial.flags,
        layout=f"{layout} {trial.slice.chips // fsdp}x{fsdp}x1",
        micro_batches=final.parallel.num_microbatches,
        remat=final.model.remat_policy,
        peak=compiled.peak,
        memory=trial.slice.chip.memory,
        step_s=estimate.seconds,
        mfu=estimate.mfu,
        compile_seconds=compiled.seconds,
    )


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = []
    for row in rows:
        cells = [row["preset"], f"{row['parameters'] / 1e6:,.0f} M"]
        cells.append(row["slice"] or f"none of {row['chip']}")
        if row["slice"]:
            cells += [row["chips"], row["layout"], row["micro_batches"], row["remat"]]
            cells.append(f"{row['peak'] / 2**30:.1f} of {row['memory'] / 2**30:.2f}")
            cells += [f"{row['step_s'] * 1e3:.0f}", f"{row['mfu']:.0%}"]
            cells.append(f"{row['compile_seconds']:.0f}")
        cells += [""] * (len(HEADER) - 1 - len(cells)) + [row["programs"]]
        lines.append(cells)
    return records.markdown(HEADER, lines)


def choose(flags: argparse.Namespace, rows: list[dict]) -> list[tuple[str, str]]:
    """The (preset, chip) pairs to compute: those of --only, or all that have no row yet."""
    if flags.only:
        pairs = [tuple(word.split("@")) for word in flags.only]
    else:
        existing = {(row["preset"], row["chip"]) for row in rows}
        pairs = [(preset, chip) for preset in flags.presets for chip in flags.chips]
        pairs = [pair for pair in pairs if pair not in existing]
    for preset, chip in pairs:
        lookup.lookup(dict.fromkeys(PRESETS), preset, "--presets")
        lookup.lookup(dict.fromkeys(CHIPS), chip, "--chips")
    return pairs


def main(arguments: list[str] | None = None) -> None:
    """Compute the rows, and print the table."""
    flags = records.parser(NAME, __doc__)
    flags.add_argument("--presets", type=records.words, default=PRESETS)
    flags.add_argument("--chips", type=records.words, default=CHIPS[:2])
    flags.add_argument("--only", type=records.words, default=[], help="preset@chip,.. to redo")
    flags.add_argument("--max_programs", type=int, default=advice.MAX_PROGRAMS, help="of a row")
    flags = flags.parse_args(arguments)
    key = lambda row: (PRESETS.index(row["preset"]), CHIPS.index(row["chip"]))
    stamp = records.stamp()
    stamp["versions"]["libtpu"] = compiler.requirement().partition("==")[2]
    rows = records.read(flags.out, NAME)
    for preset, chip in tqdm.tqdm(choose(flags, rows), unit="row"):
        row = make_row(preset, chip, flags.max_programs) | stamp
        rows = records.save(flags.out, NAME, [row], key)
        records.put_table(flags.out, NAME, table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
