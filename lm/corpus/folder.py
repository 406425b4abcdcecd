"""The folder of a finished corpus: what identifies it, its tokenizer, its manifest.

  manifest.json      identity, counts of all that was read, tokenizer, package versions
  quarantine.jsonl   records that could not be read: source, position, reason, excerpt
  tokenizer/         a copy of it, so that the corpus stands by itself
  train/ validation/ the stored tokens, as lm/shards/files.py has them

All is made in a hidden folder beside it and appears by one renaming.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import unicodedata
from collections.abc import Iterable
from importlib import metadata

import tqdm

from lm import lookup, sources, storage, tokenizer
from lm.corpus import documents, rules
from lm.shards import shard_files

QUARANTINE = "quarantine.jsonl"
PACKAGES = ("array_record", "sentencepiece", "mwparserfromhell")  # which decide the bytes


def corpus_identity(recipe: documents.CorpusConfig, parts: list[sources.SourceFile]) -> dict:
    """All that decides the bytes of a corpus, as JSON: the recipe, and the sources by their hashes.

    Neither depends on where the sources lie.
    """
    said = dataclasses.asdict(recipe) | {
        "rules": rules.format_rules(rules.parse_rules(recipe.rules))
    }
    del said["source"], said["data_dir"], said["column"]
    said["shards"] = recipe.shard_count(parts)
    if recipe.tokenizer not in tokenizer.KINDS:
        if not storage.as_path(recipe.tokenizer).is_dir():
            hint = lookup.nearest(recipe.tokenizer, tokenizer.KINDS) or "."
            raise ValueError(
                f"--tokenizer={recipe.tokenizer!r} is neither a directory with a tokenizer nor one "
                f"of {', '.join(tokenizer.KINDS)}{hint}"
            )
        said["tokenizer"] = tokenizer.read(storage.as_path(recipe.tokenizer))[1]["fingerprint"]
    if recipe.tokenizer not in tokenizer.TRAINED_KINDS:
        del said["pieces"]
    progress = tqdm.tqdm(parts, desc="hashing", unit=" parts", disable=None)
    found = [
        {"name": name, "sha256": part.digest(), "column": part.column}
        for name, part in zip(source_names(parts), progress, strict=True)
    ]
    return {"sources": found, **said}


def source_names(parts: list[sources.SourceFile]) -> list[str]:
    """What a corpus calls its sources: files by their path from the folder that holds them all."""
    is_local = lambda part: part.kind != "tfds" and "://" not in part.name
    folders = [os.path.dirname(os.path.abspath(part.name)) for part in parts if is_local(part)]
    root = os.path.commonpath(folders) if folders else ""
    return [os.path.relpath(part.name, root) if is_local(part) else part.name for part in parts]


def resolve_out_dir(out, recipe: documents.CorpusConfig) -> pathlib.Path:
    """Where `out` really lies, behind all links.

    Raises ValueError for an address, and within a folder that the recipe's source reads.
    """
    if "://" in str(out):
        raise ValueError(f"--out={out} is an address; name a local folder, and copy it there.")
    place = pathlib.Path(out).expanduser().resolve()
    for item in recipe.source.split(","):
        read = pathlib.Path(item.strip().partition("**")[0]).expanduser()
        if item.strip() and read.is_dir() and place.is_relative_to(read.resolve()):
            raise ValueError(
                f"--out={out} lies in --source={item.strip()}, which would read it the next time; "
                f"set an --out elsewhere."
            )
    return place


def read_finished_corpus(out: pathlib.Path, identity: dict) -> dict | None:
    """The manifest of the corpus in `out`, None where nothing is there yet.

    Raises ValueError where `out` holds another corpus, a damaged one, or anything else.
    """
    if manifest := shard_files.read_manifest(out):
        other = manifest.get("identity", {})
        differing = [key for key in identity if other.get(key) != identity[key]]
        if not differing:
            _check_whole(out, manifest)
            return manifest
        raise ValueError(
            f"{out} holds a corpus of other {' and '.join(differing)}; remove it or set another "
            f"--out."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already and is no corpus; set another --out.")
    return None


def _check_whole(out: pathlib.Path, manifest: dict) -> None:
    """Raise ValueError unless all that a finished corpus is made of is there."""
    for split in manifest["splits"]:
        own = shard_files.read_manifest(out / split)
        if own is None:
            missing = out / split / shard_files.MANIFEST
            raise ValueError(f"{missing} does not exist; {shard_files.rebuild_hint(out / split)}.")
        shard_files.shard_paths(out / split, own)
        for name in own["beside"]:
            shard_files.load_array(out / split, own, name)
    if not (out / QUARANTINE).exists():
        raise ValueError(
            f"{out / QUARANTINE} does not exist; {shard_files.rebuild_hint(out / 'tokenizer')}."
        )
    try:
        tokenizer.read(out / "tokenizer")
    except ValueError as error:
        reason = str(error).partition(";")[0]
        raise ValueError(f"{reason}; {shard_files.rebuild_hint(out / 'tokenizer')}.") from error


def make_tokenizer(
    recipe: documents.CorpusConfig, directory: pathlib.Path, texts: Iterable[str]
) -> tokenizer.Tokenizer:
    """The corpus's tokenizer in `directory`: a copy of the recipe's, or trained on these texts."""
    if recipe.tokenizer == "bytes":
        return tokenizer.write_byte_tokenizer(directory, 100)
    if recipe.tokenizer not in tokenizer.TRAINED_KINDS:
        return tokenizer.write(directory, *tokenizer.read(storage.as_path(recipe.tokenizer)))
    try:
        return tokenizer.train(texts, directory, kind=recipe.tokenizer, vocab_size=recipe.pieces)
    except ValueError as error:
        # It speaks to those who have a config; here only `pieces` is a flag.
        said, others, _ = str(error).partition(", or a lower tokenizer.character_coverage")
        said = said.replace("--config.", "").replace("tokenizer.vocab_size", "--pieces")
        raise ValueError(f"{said}{others and '.'}") from error


def check_splits(
    recipe: documents.CorpusConfig, held: dict[str, int], tally: documents.Tally
) -> None:
    """Raise ValueError unless each split has a document. held: split -> documents."""
    if not sum(held.values()):
        dropped = ", ".join(
            f"{count} by {name}" for name, count in sorted(tally.dropped.items()) if count
        )
        first = tally.first and f" ({tally.first})"
        raise ValueError(
            f"{recipe.source} leaves no document of {tally.read} records: dropped {dropped or 0}, "
            f"unreadable {tally.quarantined}{first}; see --column, --rules and, for long text "
            f"files, --unit=paragraph."
        )
    if empty := [split for split in recipe.splits if not held[split]]:
        raise ValueError(
            f"--heldout={recipe.heldout} leaves {empty[0]} without a document of "
            f"{sum(held.values())}; use 0 or another share."
        )


def finish_corpus(
    room: pathlib.Path,
    out: pathlib.Path,
    identity: dict,
    tally: documents.Tally,
    written: list[documents.SplitFiles],
) -> dict:
    """Write the manifests of the splits and of the whole, and make the folder appear as `out`.

    written: the files in order. Returns the manifest.
    """
    tokens = tokenizer.Tokenizer(room / "tokenizer")
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    splits = {}
    for split in written[0].written:
        own = {"corpus": digest, "split": split, "tokenizer": tokens.fingerprint}
        name = lambda number: documents.file_name(number, len(written))
        files = {name(number): shard.written[split] for number, shard in enumerate(written)}
        text_bytes = sum(shard.text_bytes[split] for shard in written)
        made = shard_files.write_manifest(room / split, own, files, {"text_bytes": text_bytes})
        splits[split] = made["counts"]
    manifest = {"identity": identity, "records": tally.counts(), "splits": splits}
    manifest["tokenizer"] = {"fingerprint": tokens.fingerprint, "pieces": tokens.vocab_size}
    manifest["tokenizer"] |= {"size": tokens.size, "rows": tokenizer.padded_rows(tokens.size)}
    manifest["packages"] = {"unicode": unicodedata.unidata_version}
    manifest["packages"] |= {name: metadata.version(name) for name in PACKAGES}
    (room / shard_files.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    room.replace(out)
    return manifest
