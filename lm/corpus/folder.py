"""The directory of a finished corpus: its identity, tokenizer and manifest.

  manifest.json      identity, counts of records, tokenizer, package versions
  quarantine.jsonl   unreadable records: source, position, reason, excerpt
  tokenizer/         a copy of the tokenizer
  train/ validation/ token shards, as in lm/shards/shard_files.py

It is written to a hidden directory and renamed when complete.
"""

from __future__ import annotations

import hashlib
import itertools
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

QUARANTINE = "quarantine.jsonl"
PACKAGES = ("array_record", "sentencepiece", "mwparserfromhell")  # that decide the bytes


def build_corpus(
    config: documents.CorpusConfig,
    out: str | pathlib.Path,
    write: Callable[..., tuple[documents.Counts, dict[str, list[documents.EncodedShard]]]],
) -> tuple[dict, bool]:
    """Build the corpus in directory `out`; returns (manifest, whether it existed already).

    write: (source files, staging directory) -> (counts, token files of each split in order); it
    writes quarantine, the tokenizer and the token files. If it fails or is killed, `out` is
    unchanged.
    """
    out, files = resolve_out_dir(out, config), list_files(config)
    identity = corpus_identity(config, files)
    if shard_files.read_manifest(out) is None:
        sources.check_first_records(files)

    def write_all(staging_dir: pathlib.Path) -> dict:
        counts, written = write(files, staging_dir)
        return write_manifests(config, staging_dir, identity, counts, written)

    manifest, existed = shard_files.build_once(out, identity, "--out", write_all)
    if existed:
        _check_complete(out, manifest)
    return manifest, existed


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


def _check_complete(out: pathlib.Path, manifest: dict) -> None:
    """Raise ValueError if a file of the corpus is missing or damaged."""
    hint = shard_files.rebuild_hint(out / "tokenizer")
    manifests = [out / split / shard_files.MANIFEST for split in manifest["splits"]]
    for path in (out / QUARANTINE, *manifests):
        if not path.exists():
            raise ValueError(f"{path} does not exist; {hint}.")
    for path in manifests:
        split_manifest = shard_files.read_manifest(path.parent)
        shard_files.shard_paths(path.parent, split_manifest)
        for name in split_manifest["beside"]:
            shard_files.load_array(path.parent, split_manifest, name)
    try:
        tokenizer.read(out / "tokenizer")
    except ValueError as error:
        raise ValueError(f"{str(error).partition(';')[0]}; {hint}.") from error


def make_tokenizer(
    config: documents.CorpusConfig,
    staging_dir: pathlib.Path,
    counts: documents.Counts,
    texts: Iterable[str],
) -> tokenizer.Tokenizer:
    """Write the corpus's tokenizer: bytes, a copy of a directory's, or one trained on `texts`.

    Raises ValueError if a split has no document by `counts`, or if training fails.
    """
    _check_splits(config, counts, staging_dir / QUARANTINE)
    directory = staging_dir / "tokenizer"
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


def _check_splits(
    config: documents.CorpusConfig, counts: documents.Counts, quarantine: pathlib.Path
) -> None:
    """Raise ValueError unless each split has a document."""
    sizes = {split: counts["splits", split] for split in config.splits}
    total = sum(sizes.values())
    if not total:
        dropped = [f"{counts[key]} by {key[1]}" for key in sorted(counts) if key[0] == "dropped"]
        with quarantine.open() as file:
            reasons = [f" ({json.loads(line)['reason']})" for line in itertools.islice(file, 1)]
        raise ValueError(
            f"{config.source} leaves no document of {counts['read', '']} records: dropped "
            f"{', '.join(dropped) or 0}, unreadable {counts['quarantined', '']}{''.join(reasons)}; "
            f"see --column, --rules and, for long text files, --unit=paragraph."
        )
    if empty := [split for split in config.splits if not sizes[split]]:
        raise ValueError(
            f"--heldout_fraction={config.heldout_fraction} leaves {empty[0]} without a document of "
            f"{total}; use 0 or another fraction."
        )


def write_manifests(
    config: documents.CorpusConfig,
    directory: pathlib.Path,
    identity: dict,
    counts: documents.Counts,
    written: dict[str, list[documents.EncodedShard]],
) -> dict:
    """Write the manifests of all splits and of the corpus; returns the latter.

    Raises ValueError if the files lack a document.
    """
    tokens = tokenizer.Tokenizer(directory / "tokenizer")
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    splits = {}
    for split, shards in written.items():
        shard_identity = {"corpus": digest, "split": split, "tokenizer": tokens.fingerprint}
        names = [documents.file_name(number, len(shards)) for number in range(len(shards))]
        files = dict(zip(names, (shard.written for shard in shards), strict=True))
        text_bytes = {"text_bytes": sum(shard.text_bytes for shard in shards)}
        manifest = shard_files.write_manifest(directory / split, shard_identity, files, text_bytes)
        splits[split] = manifest["counts"]
        actual, expected = manifest["counts"]["documents"], counts["splits", split]
        if actual != expected:
            raise ValueError(
                f"the workers wrote {actual} of the {expected} documents of {split}; set --temp to "
                f"storage that all of them share."
            )
    records = documents.manifest_counts(config, counts)
    manifest = {"identity": identity, "records": records, "splits": splits}
    manifest["tokenizer"] = {"fingerprint": tokens.fingerprint, "pieces": tokens.vocab_size}
    manifest["tokenizer"] |= {"size": tokens.size, "rows": tokenizer.padded_rows(tokens.size)}
    manifest["packages"] = {"unicode": unicodedata.unidata_version}
    manifest["packages"] |= {name: metadata.version(name) for name in PACKAGES}
    (directory / shard_files.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest
