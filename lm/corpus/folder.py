"""The directory of a finished corpus: its identity, tokenizer and manifest.

  manifest.json      identity, counts of records, tokenizer, package versions
  quarantine.jsonl   unreadable records: source, position, reason, excerpt
  tokenizer/         a copy of the tokenizer
  train/ validation/ token shards, as in lm/shards/shard_files.py

It is written to a hidden directory beside it and renamed when complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import unicodedata
from collections.abc import Callable, Iterable
from importlib import metadata

import tqdm

from lm import lookup, sources, storage, tokenizer
from lm.corpus import documents, rules
from lm.shards import shard_files
from lm.storage import staging

QUARANTINE = "quarantine.jsonl"
PACKAGES = ("array_record", "sentencepiece", "mwparserfromhell")  # that decide the bytes


def build_corpus(
    config: documents.CorpusConfig,
    out: str | pathlib.Path,
    write: Callable[..., tuple[documents.Tally, list[documents.SplitFiles]]],
) -> tuple[dict, bool]:
    """Build the corpus in directory `out`; returns (manifest, whether it existed already).

    write: (source files, staging directory) -> (tally, token files); it writes the tokenizer, the
    token files and quarantine. If it fails or is killed, `out` is unchanged.
    """
    out, files = resolve_out_dir(out, config), list_files(config)
    identity = corpus_identity(config, files)
    if manifest := read_finished_corpus(out, identity):
        return manifest, True
    sources.check_first_records(files)
    with staging.staging_dir(out) as staging_dir:
        if manifest := read_finished_corpus(out, identity):  # written by another process
            return manifest, True
        tally, written = write(files, staging_dir)
        return finish_corpus(staging_dir, out, identity, tally, written), False


def list_files(config: documents.CorpusConfig) -> list[sources.SourceFile]:
    """The files of the config's sources, in order."""
    return sources.list_files(
        config.source, column=config.column, unit=config.unit, data_dir=config.data_dir
    )


def corpus_identity(config: documents.CorpusConfig, files: list[sources.SourceFile]) -> dict:
    """Everything that decides the bytes of a corpus, as JSON: the config and hashes of the sources.

    It does not depend on where the sources are stored.
    """
    tokens = config.tokenizer
    if tokens not in tokenizer.KINDS:
        directory = storage.as_path(tokens)
        if not directory.is_dir():
            hint = lookup.nearest(tokens, tokenizer.KINDS) or "."
            raise ValueError(
                f"--tokenizer={tokens!r} is neither a directory with a tokenizer nor one of "
                f"{', '.join(tokenizer.KINDS)}{hint}"
            )
        tokens = tokenizer.read(directory)[1]["fingerprint"]
    progress = tqdm.tqdm(files, desc="hashing", unit=" files", disable=None)
    hashes = [
        {"name": name, "sha256": file.digest(), "column": file.column}
        for name, file in zip(source_names(files), progress, strict=True)
    ]
    identity = {"sources": hashes, "unit": config.unit}
    identity |= {"rules": rules.format_rules(rules.parse_rules(config.rules))}
    identity |= {"dedupe": config.dedupe, "heldout": config.heldout_fraction, "tokenizer": tokens}
    if config.tokenizer in tokenizer.TRAINED_KINDS:
        identity["pieces"] = config.vocab_size
    return identity | {"shards": config.shard_count(files)}


def source_names(files: list[sources.SourceFile]) -> list[str]:
    """Names of the sources in a corpus: local files relative to their common parent."""
    is_local = lambda file: file.kind != "tfds" and "://" not in file.name
    parents = [os.path.dirname(os.path.abspath(file.name)) for file in files if is_local(file)]
    root = os.path.commonpath(parents) if parents else ""
    return [os.path.relpath(file.name, root) if is_local(file) else file.name for file in files]


def resolve_out_dir(out: str | pathlib.Path, config: documents.CorpusConfig) -> pathlib.Path:
    """Resolve `out` to a local path without links.

    Raises ValueError for an address, and for a directory inside one that the source reads.
    """
    if "://" in str(out):
        raise ValueError(f"--out={out} is an address; name a local folder, and copy it there.")
    path = pathlib.Path(out).expanduser().resolve()
    for item in config.source.split(","):
        directory = pathlib.Path(item.strip().partition("**")[0]).expanduser()
        if item.strip() and directory.is_dir() and path.is_relative_to(directory.resolve()):
            raise ValueError(
                f"--out={out} lies in --source={item.strip()}, which would read it the next time; "
                f"set an --out elsewhere."
            )
    return path


def read_finished_corpus(out: pathlib.Path, identity: dict) -> dict | None:
    """Read the manifest of the corpus in `out`; None if `out` is missing or empty.

    Raises ValueError if `out` holds another corpus, a damaged one, or anything else.
    """
    if manifest := shard_files.read_manifest(out):
        stored = manifest.get("identity", {})
        differing = [key for key in identity if stored.get(key) != identity[key]]
        if not differing:
            _check_complete(out, manifest)
            return manifest
        raise ValueError(
            f"{out} holds a corpus of other {' and '.join(differing)}; remove it or set another "
            f"--out."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not a corpus; set another --out.")
    return None


def _check_complete(out: pathlib.Path, manifest: dict) -> None:
    """Raise ValueError if a file of the corpus is missing or damaged."""
    for split in manifest["splits"]:
        split_manifest = shard_files.read_manifest(out / split)
        if split_manifest is None:
            missing = out / split / shard_files.MANIFEST
            raise ValueError(f"{missing} does not exist; {shard_files.rebuild_hint(out / split)}.")
        shard_files.shard_paths(out / split, split_manifest)
        for name in split_manifest["beside"]:
            shard_files.load_array(out / split, split_manifest, name)
    hint = shard_files.rebuild_hint(out / "tokenizer")
    if not (out / QUARANTINE).exists():
        raise ValueError(f"{out / QUARANTINE} does not exist; {hint}.")
    try:
        tokenizer.read(out / "tokenizer")
    except ValueError as error:
        raise ValueError(f"{str(error).partition(';')[0]}; {hint}.") from error


def make_tokenizer(
    config: documents.CorpusConfig, directory: pathlib.Path, texts: Iterable[str]
) -> tokenizer.Tokenizer:
    """Write the corpus's tokenizer to `directory`: a copy of the config's, or a trained one."""
    if config.tokenizer == "bytes":
        return tokenizer.write_byte_tokenizer(directory, 100)
    if config.tokenizer not in tokenizer.TRAINED_KINDS:
        return tokenizer.write(directory, *tokenizer.read(storage.as_path(config.tokenizer)))
    try:
        options = {"kind": config.tokenizer, "vocab_size": config.vocab_size}
        return tokenizer.train(texts, directory, **options)
    except ValueError as error:
        # Its message names config keys; here only --vocab_size is a flag.
        reason, suffix, _ = str(error).partition(", or a lower tokenizer.character_coverage")
        reason = reason.replace("--config.", "").replace("tokenizer.vocab_size", "--vocab_size")
        raise ValueError(f"{reason}{suffix and '.'}") from error


def check_splits(
    config: documents.CorpusConfig, counts: dict[str, int], tally: documents.Tally
) -> None:
    """Raise ValueError unless each split has a document. counts: split -> documents."""
    total = sum(counts.values())
    if not total:
        dropped = [f"{count} by {name}" for name, count in sorted(tally.dropped.items()) if count]
        first = tally.first and f" ({tally.first})"
        raise ValueError(
            f"{config.source} leaves no document of {tally.read} records: dropped "
            f"{', '.join(dropped) or 0}, unreadable {tally.quarantined}{first}; see --column, "
            f"--rules and, for long text files, --unit=paragraph."
        )
    if empty := [split for split in config.splits if not counts[split]]:
        raise ValueError(
            f"--heldout_fraction={config.heldout_fraction} leaves {empty[0]} without a "
            f"document of {total}; use 0 or another fraction."
        )


def finish_corpus(
    staging_dir: pathlib.Path,
    out: pathlib.Path,
    identity: dict,
    tally: documents.Tally,
    written: list[documents.SplitFiles],
) -> dict:
    """Write all manifests and rename the staging directory to `out`; return the manifest.

    written: the files in order.
    """
    tokens = tokenizer.Tokenizer(staging_dir / "tokenizer")
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    splits = {}
    for split in written[0].written:
        shard_identity = {"corpus": digest, "split": split, "tokenizer": tokens.fingerprint}
        name = lambda number: documents.file_name(number, len(written))
        files = {name(number): shard.written[split] for number, shard in enumerate(written)}
        counts = {"text_bytes": sum(shard.text_bytes[split] for shard in written)}
        shards = shard_files.write_manifest(staging_dir / split, shard_identity, files, counts)
        splits[split] = shards["counts"]
    manifest = {"identity": identity, "records": tally.counts(), "splits": splits}
    manifest["tokenizer"] = {"fingerprint": tokens.fingerprint, "pieces": tokens.vocab_size}
    manifest["tokenizer"] |= {"size": tokens.size, "rows": tokenizer.padded_rows(tokens.size)}
    manifest["packages"] = {"unicode": unicodedata.unidata_version}
    manifest["packages"] |= {name: metadata.version(name) for name in PACKAGES}
    (staging_dir / shard_files.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    staging_dir.replace(out)
    return manifest
