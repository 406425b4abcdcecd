"""What the tokens of some texts are like: how many, how long, how much of the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lm.tokenizer import model

MAX_REPORTED_TEXTS = 2000  # held-out texts, at most, that the command reports on

STAT_FORMATS = {  # of the printed table: key, form, meaning
    "tokens_per_word": ("{:.3f}", "tokens a word, words as spaces part them (fertility)"),
    "tokens_per_character": ("{:.3f}", "tokens a character, for scripts without spaces"),
    "bytes_per_token": ("{:.3f}", "bytes of UTF-8 a token"),
    "byte_share": ("{:.3%}", "of the tokens are single bytes, for want of a piece"),
    "unk_share": ("{:.3%}", "of the tokens are unk: text that is lost"),
    "restored_share": ("{:.3%}", "of the texts come back from their tokens as they were"),
    "unused_share": ("{:.3%}", "of the pieces longer than a byte are in none of the texts"),
}


def describe_sizes(tokens: model.Tokenizer, vocab_size: int) -> str:
    """The tokenizer's three numbers, and what a model of `vocab_size` rows makes of them."""
    said = (
        f"{tokens.pieces} pieces + {tokens.num_sentinels} sentinels = {tokens.size} ids, padded to "
        f"{tokens.rows} rows"
    )
    if vocab_size == tokens.rows:
        return said
    spare = vocab_size - tokens.size
    return f"{said}; model.vocab_size={vocab_size} differs, {spare} of its rows are no id's"


def text_stats(tokens: model.Tokenizer, texts: Iterable[str], longest: int = 10) -> dict:
    """How `tokens` spells `texts`, best such as it was not fitted to: facts as JSON has them.

    fingerprint, pieces, size, rows: the tokenizer's. texts, tokens, words, characters, bytes:
    counts, the last three of the texts as the model sees them (normalise); words are what spaces
    part. Of these the ratios of ROWS; None where nothing is to be divided by. longest_pieces: the
    `longest` longest pieces in these texts, each with its characters and how often it is used.
    Raises ValueError where the texts hold no token.
    """
    counts = np.zeros(tokens.size, np.int64)
    made = dict.fromkeys(("texts", "tokens", "words", "characters", "bytes"), 0)
    restored = 0
    for text in texts:
        ids, seen = tokens.encode(text), tokens.normalise(text)
        counts += np.bincount(ids, minlength=tokens.size)
        found = (1, len(ids), len(seen.split()), len(seen), len(seen.encode()))
        made = {name: made[name] + more for name, more in zip(made, found, strict=True)}
        restored += tokens.decode(ids) == text
    if not made["tokens"]:
        raise ValueError(f"the {made['texts']} texts to report on hold no token; give more text.")

    total, lengths = made["tokens"], tokens.piece_bytes(tokens.size)
    pieces = np.setdiff1d(np.flatnonzero(lengths), tokens.byte_pieces)
    facts = {name: getattr(tokens, name) for name in ("fingerprint", "pieces", "size", "rows")}
    return (
        facts
        | made
        | {
            "tokens_per_word": _ratio(total, made["words"]),
            "tokens_per_character": _ratio(total, made["characters"]),
            "bytes_per_token": _ratio(made["bytes"], total),
            "byte_share": _ratio(counts[tokens.byte_pieces].sum(), total),
            "unk_share": _ratio(counts[tokens.unk], total),
            "restored_share": _ratio(restored, made["texts"]),
            "unused_share": _ratio((counts[pieces] == 0).sum(), len(pieces)),
            "longest_pieces": _longest_pieces(tokens, pieces[counts[pieces] > 0], counts, longest),
        }
    )


def _ratio(part, whole) -> float | None:
    return float(part) / float(whole) if whole else None


def _longest_pieces(
    tokens: model.Tokenizer, pieces: np.ndarray, counts: np.ndarray, most: int
) -> list:
    """The longest of `pieces` in characters, those of equal length by their ids."""
    shown = [(piece, tokens.decode([piece])) for piece in pieces.tolist()]
    shown = sorted(shown, key=lambda pair: -len(pair[1]))[:most]
    return [
        {"piece": text, "characters": len(text), "count": int(counts[piece])}
        for piece, text in shown
    ]


def format_stats(found: dict) -> str:
    """What `measure` found, a line each."""
    counts = ("tokens", "words", "characters", "bytes")
    counted = ", ".join(f"{found[name]:,} {name}" for name in counts)
    lines = [f"{found['texts']:,} texts: {counted}"]
    for name, (form, meaning) in STAT_FORMATS.items():
        value = "-" if found[name] is None else form.format(found[name])
        lines.append(f"  {value:>9}  {meaning}")
    longest = " ".join(repr(row["piece"]) for row in found["longest_pieces"])
    return "\n".join([*lines, f"  longest pieces: {longest or '-'}"])
