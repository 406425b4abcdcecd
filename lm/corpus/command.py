"""What `python -m lm corpus` does with a source: build it, or say what would be built."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from typing import Any

from lm import logs, sources, storage
from lm.corpus import beam, build, documents, folder, overlap, rules

FIELDS = tuple(field.name for field in dataclasses.fields(documents.CorpusConfig))
TAKES = {  # what each of the three things that `corpus` does has a use for
    "overlap": ("overlap", "source", "out", "column", "unit", "data_dir", "workers", "ngram"),
    "source": (*FIELDS, "out", "workers", "runner", "runner_flags", "temp", "dry_run"),
    "config": ("config", "workdir"),
}


def check_given(what: str, given: Iterable[str]) -> None:
    """Raise ValueError for flags that were given and have no use. what: a key of TAKES."""
    if odd := sorted(set(given) - set(TAKES[what])):
        raise ValueError(f"--{what} takes no --{', --'.join(odd)}; leave that out.")


def command(flags: dict[str, Any], given: Iterable[str] = ()) -> str:
    """Build the corpus that these flags ask for, or find it; what became of it, as text.

    flags: those of TAKES's "overlap" and "source". given: the names of those that the user set.
    Raises ValueError.
    """
    if flags["workers"] < 0:
        raise ValueError(f"--workers={flags['workers']} is below 0; use 0 for one a processor.")
    if flags["overlap"]:
        check_given("overlap", given)
        return _compared(flags)
    if not (flags["source"] and flags["out"]):
        raise ValueError(
            "`corpus` needs --source=... and --out=..., to build a corpus of any text; or "
            "--config=... and --workdir=..., to prepare what a config's training reads."
        )
    check_given("source", given)
    flags |= {name: os.path.expanduser(flags[name]) for name in ("out", "tokenizer")}
    recipe, out = documents.CorpusConfig(**{name: flags[name] for name in FIELDS}), flags["out"]
    if flags["dry_run"]:
        return plan(recipe, out)
    not_read = _not_read(recipe)
    manifest, found = _built(recipe, out, flags)
    there = f"{out}{' is already there' if found else ''}"
    return "\n".join([summary(manifest), *not_read, there])


def _built(recipe: documents.CorpusConfig, out, flags: dict[str, Any]) -> tuple[dict, bool]:
    """By local processes or by Beam: the manifest, and whether it was there already."""
    if flags["runner"]:
        if flags["workers"]:
            raise ValueError("--workers are local processes; a runner's own are in --runner_flags.")
        return beam.build(recipe, out, flags["runner"], flags["runner_flags"], flags["temp"])
    for name in ("runner_flags", "temp"):
        if flags[name]:
            raise ValueError(f"--{name}={flags[name]} needs a --runner; set one, or leave it out.")
    return build.build(recipe, out, flags["workers"])


def _compared(flags: dict[str, Any]) -> str:
    """What --overlap asks for: a table, and with --out the whole report as JSON."""
    if not flags["source"]:
        raise ValueError("--overlap needs --source=..., the training data.")
    out = storage.as_path(flags["out"]).expanduser()
    there = storage.is_remote(out) or out.parent.is_dir()
    if flags["out"] and (out.is_dir() or not there):
        raise ValueError(f"--out={out} is to be a file, in a folder that is there; name another.")
    where = {name: flags[name] for name in ("column", "unit", "data_dir", "workers")}
    report = overlap.measure_overlap(flags["source"], flags["overlap"], n=flags["ngram"], **where)
    if flags["out"]:
        logs.write_atomically(out, json.dumps(report, indent=2) + "\n")
    return overlap.format_report(report)


def plan(recipe: documents.CorpusConfig, out) -> str:
    """What would be read, done and written, as lines of text; nothing is written."""
    place, parts = folder.resolve_out_dir(out, recipe), build.parts_of(recipe)
    sources.check_first_records(parts)
    lines = [f"{part.size():>18,} bytes  {part.kind:<12} {part.name}" for part in parts]
    lines += [f"{sum(part.size() for part in parts):>18,} bytes  in {len(parts)} parts"]
    lines += [*_not_read(recipe), ""]
    for name, limit in rules.parse_rules(recipe.rules):
        shown = name if limit is None else f"{name}={limit}"
        lines.append(f"{'rule':<12} {shown}: {rules.RULES[name].meaning}")
    for field in ("dedupe", "heldout", "tokenizer", "pieces"):
        lines.append(f"{field:<12} {getattr(recipe, field)}")
    count = recipe.shard_count(parts)
    there = "is there already" if place.exists() else "would be written"
    return "\n".join([*lines, f"{'out':<12} {out}, files a split: {count}; it {there}"])


def _not_read(recipe: documents.CorpusConfig) -> list[str]:
    """A line for the files in the source's folders whose suffix is not known, or none."""
    names = sources.skipped_files(recipe.source)
    return [f"not read: {len(names):,} files of no known kind, as {names[0]}"] if names else []


def summary(manifest: dict) -> str:
    """What became of all records, as lines of text."""
    records, tokens = manifest["records"], manifest["tokenizer"]
    rows = [("records read", records["read"])]
    rows += [(f"dropped: {name}", count) for name, count in records["dropped"].items()]
    rows += [(f"duplicates: {name}", count) for name, count in records["duplicates"].items()]
    rows += [(f"unreadable: {folder.QUARANTINE}", records["quarantined"])]
    for split, counts in manifest["splits"].items():
        rows += [(f"{split}: {key}", counts[key]) for key in ("documents", "text_bytes", "tokens")]
    rows += [(f"lines dropped: {name}", count) for name, count in records["lines"].items()]
    rows += [(f"tokenizer: {key}", tokens[key]) for key in ("pieces", "size", "rows")]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {count:>15,}" for name, count in rows)
