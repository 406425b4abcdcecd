"""The command `python -m lm corpus` with --source: build a corpus, or print the plan."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from typing import Any

from lm import logs, sources, storage
from lm.corpus import beam, build, documents, folder, overlap, rules

FIELDS = tuple(field.name for field in dataclasses.fields(documents.CorpusConfig))
MODE_FLAGS = {  # the flags of each of the command's modes
    "overlap": ("overlap", "source", "out", "column", "unit", "data_dir", "workers", "ngram"),
    "source": (*FIELDS, "out", "workers", "runner", "runner_flags", "temp", "dry_run"),
    "config": ("config", "workdir"),
}


def check_flags(mode: str, names: Iterable[str]) -> None:
    """Raise ValueError for flags that a mode does not take. mode: a key of MODE_FLAGS."""
    if unused := sorted(set(names) - set(MODE_FLAGS[mode])):
        raise ValueError(f"--{mode} takes no --{', --'.join(unused)}; leave that out.")


def command(flags: dict[str, Any], set_flags: Iterable[str] = ()) -> str:
    """Build a corpus or measure overlap; returns the text to print.

    flags: those of MODE_FLAGS["overlap"] and ["source"]. set_flags: names of those that the user
    set. Raises ValueError.
    """
    if flags["workers"] < 0:
        raise ValueError(f"--workers={flags['workers']} is below 0; use 0 for one a processor.")
    if flags["overlap"]:
        check_flags("overlap", set_flags)
        return _overlap(flags)
    if not (flags["source"] and flags["out"]):
        raise ValueError(
            "`corpus` needs --source=... and --out=..., to build a corpus of any text; or "
            "--config=... and --workdir=..., to prepare what a config's training reads."
        )
    check_flags("source", set_flags)
    flags |= {name: os.path.expanduser(flags[name]) for name in ("out", "tokenizer")}
    config = documents.CorpusConfig(**{name: flags[name] for name in FIELDS})
    if flags["dry_run"]:
        return plan(config, flags["out"])
    skipped = _skipped_files(config)
    manifest, existed = _build(config, flags)
    suffix = " is already there" if existed else ""
    return "\n".join([summary(manifest), *skipped, f"{flags['out']}{suffix}"])


def _build(config: documents.CorpusConfig, flags: dict[str, Any]) -> tuple[dict, bool]:
    """Build by local processes or Beam: (manifest, whether it existed already)."""
    out, runner = flags["out"], flags["runner"]
    if runner:
        if flags["workers"]:
            raise ValueError("--workers are local processes; a runner's own are in --runner_flags.")
        return beam.build(config, out, runner, flags["runner_flags"], flags["temp"])
    for name in ("runner_flags", "temp"):
        if flags[name]:
            raise ValueError(f"--{name}={flags[name]} needs a --runner; set one, or leave it out.")
    return build.build(config, out, flags["workers"])


def _overlap(flags: dict[str, Any]) -> str:
    """Measure overlap: returns the table; writes the report as JSON to --out, if set."""
    if not flags["source"]:
        raise ValueError("--overlap needs --source=..., the training data.")
    out = storage.as_path(flags["out"]).expanduser()
    parent_exists = storage.is_remote(out) or out.parent.is_dir()
    if flags["out"] and (out.is_dir() or not parent_exists):
        raise ValueError(f"--out={out} must be a file in an existing folder; name another.")
    options = {name: flags[name] for name in ("column", "unit", "data_dir", "workers")}
    report = overlap.measure_overlap(flags["source"], flags["overlap"], n=flags["ngram"], **options)
    if flags["out"]:
        logs.write_atomically(out, json.dumps(report, indent=2) + "\n")
    return overlap.format_report(report)


def plan(config: documents.CorpusConfig, out: str) -> str:
    """Describe what would be read, done and written, without writing."""
    path, files = folder.resolve_out_dir(out, config), folder.list_files(config)
    sources.check_first_records(files)
    lines = [f"{file.size():>18,} bytes  {file.kind:<12} {file.name}" for file in files]
    lines += [f"{sum(file.size() for file in files):>18,} bytes  in {len(files)} files"]
    lines += [*_skipped_files(config), ""]
    for name, limit in rules.parse_rules(config.rules):
        rule = name if limit is None else f"{name}={limit}"
        lines.append(f"{'rule':<16} {rule}: {rules.RULES[name].meaning}")
    for field in ("dedupe", "heldout_fraction", "tokenizer", "vocab_size"):
        lines.append(f"{field:<16} {getattr(config, field)}")
    count = config.shard_count(files)
    state = "is already there" if path.exists() else "would be written"
    return "\n".join([*lines, f"{'out':<16} {out}, files a split: {count}; it {state}"])


def _skipped_files(config: documents.CorpusConfig) -> list[str]:
    """A line about files with unknown suffixes in the source's directories, if there are any."""
    names = sources.skipped_files(config.source)
    return [f"not read: {len(names):,} files of no known kind, as {names[0]}"] if names else []


def summary(manifest: dict) -> str:
    """Format the counts of all records, a line each."""
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
