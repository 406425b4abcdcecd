"""Statistics of how a tokenizer encodes texts: how many tokens, how long, how much is used."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lm.tokenizer import model

MAX_REPORTED_TEXTS = 2000  # held-out texts that the command reports on

STAT_FORMATS = {  # key: format, description
    "tokens_per_word": ("{:.3f}", "tokens per space-separated word (fertility)"),
    "tokens_per_character": ("{:.3f}", "tokens per character, for scripts without spaces"),
    "bytes_per_token": ("{:.3f}", "UTF-8 bytes per token"),
    "byte_share": ("{:.3%}", "of the tokens are single bytes: no piece has the character"),
    "unk_share": ("{:.3%}", "of the tokens are unk: lost text"),
    "restored_share": ("{:.3%}", "of the texts are equal after encoding and decoding"),
    "unused_share": ("{:.3%}", "of the pieces longer than a byte occur in none of the texts"),
}


def describe_sizes(tokens: model.Tokenizer, vocab_size: int) -> str:
    """The tokenizer's three sizes, and how they compare to a model's vocab_size."""
    text = (
        f"{tokens.vocab_size} pieces + {tokens.num_extra_ids} sentinels = {tokens.size} ids, "
        f"padded to {tokens.rows} rows"
    )
    if vocab_size == tokens.rows:
        return text
    unused = vocab_size - tokens.size
    return f"{text}; model.vocab_size={vocab_size} differs, {unused} of its rows have no id"


def text_stats(tokens: model.Tokenizer, texts: Iterable[str], num_longest: int = 10) -> dict:
    """Statistics of a tokenizer on texts (best held-out ones), as a JSON-compatible dict.

    fingerprint, pieces, size, rows: of the tokenizer. texts, tokens, words, characters, bytes:
    counts, the last three after normalization. The keys of STAT_FORMATS: ratios; None if the
    denominator is 0. longest_pieces: the longest pieces that occur, each with its characters and
    count.
    Raises ValueError if the texts contain no token.
    """
    id_counts = np.zeros(tokens.size, np.int64)
    names = ("texts", "tokens", "words", "characters", "bytes")
    totals, restored = np.zeros(len(names), np.int64), 0
    for text in texts:
        ids, normalized = tokens.encode(text), tokens.normalize(text)
        id_counts += np.bincount(ids, minlength=tokens.size)
        lengths = (len(normalized.split()), len(normalized), len(normalized.encode()))
        totals += (1, len(ids), *lengths)
        restored += tokens.decode(ids) == text
    counts = dict(zip(names, totals.tolist(), strict=True))
    num_tokens = counts["tokens"]
    if not num_tokens:
        raise ValueError(f"the {counts['texts']} texts to report on hold no token; give more text.")

    pieces = np.setdiff1d(np.flatnonzero(tokens.piece_bytes(tokens.size)), tokens.byte_ids)
    sizes = {"pieces": tokens.vocab_size, "size": tokens.size, "rows": tokens.rows}
    ratios = {
        "tokens_per_word": _ratio(num_tokens, counts["words"]),
        "tokens_per_character": _ratio(num_tokens, counts["characters"]),
        "bytes_per_token": _ratio(counts["bytes"], num_tokens),
        "byte_share": _ratio(id_counts[tokens.byte_ids].sum(), num_tokens),
        "unk_share": _ratio(id_counts[tokens.unk], num_tokens),
        "restored_share": _ratio(restored, counts["texts"]),
        "unused_share": _ratio((id_counts[pieces] == 0).sum(), len(pieces)),
    }
    longest = [(piece, tokens.decode([piece])) for piece in pieces[id_counts[pieces] > 0].tolist()]
    longest.sort(key=lambda pair: -len(pair[1]))  # stable: pieces of equal length by id
    rows = [
        {"piece": text, "characters": len(text), "count": int(id_counts[piece])}
        for piece, text in longest[:num_longest]
    ]
    header = {"fingerprint": tokens.fingerprint} | sizes
    return header | counts | ratios | {"longest_pieces": rows}


def _ratio(numerator, denominator) -> float | None:
    return float(numerator) / float(denominator) if denominator else None


def format_stats(stats: dict) -> str:
    """The result of text_stats as lines of text."""
    counts = ", ".join(
        f"{stats[name]:,} {name}" for name in ("tokens", "words", "characters", "bytes")
    )
    lines = [f"{stats['texts']:,} texts: {counts}"]
    for name, (value_format, description) in STAT_FORMATS.items():
        value = "-" if stats[name] is None else value_format.format(stats[name])
        lines.append(f"  {value:>9}  {description}")
    longest = " ".join(repr(row["piece"]) for row in stats["longest_pieces"])
    return "\n".join([*lines, f"  longest pieces: {longest or '-'}"])
