"""Rules that clean or drop documents: pure functions selected by name, for any language.

The C4 rules are extended to more scripts; on ASCII they equal C4's, except that sentences are
counted by their terminal marks. C4's language detection, word list and removal of repeated lines
are not included.
Source: Raffel et al. 2020, section 2.2, arXiv:1910.10683; c4_utils.py of TFDS.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from lm import lookup

# Scripts without spaces between words: Thai to Tibetan, Burmese, Khmer, kana, Han.
SPACELESS = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
SPACELESS += "\U00020000-\U0003ffff"
WORD = re.compile(rf"[{SPACELESS}]|[^\s{SPACELESS}]+")

# Unicode's Sentence_Terminal in the scripts of large corpora: followed by a space, and not.
SPACED_MARKS = ".?!։؟۔።፧፨᠃᠉‼⁇⁈⁉"
FREE_MARKS = "।॥།༎၊။។៕。！．？｡"
CLOSING = "\"')\\]»’”」』"  # may stand between a mark and the end of its sentence
# Possessive, and only from the first mark: a long run of marks would take quadratic time.
SPACED = rf"(?<![{SPACED_MARKS}])[{SPACED_MARKS}]++(?=[{CLOSING}]*+(?:\s|$))"
SENTENCE = re.compile(rf"[{FREE_MARKS}]+|{SPACED}")
# C4 accepts a line that ends in a quotation mark.
ENDS = (*SPACED_MARKS, *FREE_MARKS, '"', "»", "”", "」", "』")
ELLIPSES = ("...", "…")

CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
POLICIES = ("terms of use", "privacy policy", "cookie policy")
POLICIES += ("uses cookies", "use of cookies", "use cookies")


def split_words(text: str) -> list[str]:
    """Split at white space; in scripts without spaces, into characters."""
    return WORD.findall(text)


class Rule(NamedTuple):
    """A cleaning or filter rule.

    scope: "line" or "text". apply: (line or text, limit) -> whether to drop it, or the cleaned line
    or text. limit: the default; None for a rule without one.
    """

    scope: str
    meaning: str
    apply: Callable[[str, int | None], bool | str]
    limit: int | None = None


def _longest_word(line: str) -> int:
    return max(map(len, line.split()), default=0)


def _has_no_mark(line: str, _: None) -> bool:
    return not line.endswith(ENDS) or line.endswith(ELLIPSES)


def _mentions_policy(line: str, _: None) -> bool:
    lower = line.lower()
    return any(phrase in lower for phrase in POLICIES)


def _contains(phrase: str) -> Callable[[str, None], bool]:
    return lambda text, _: phrase in text.lower()


RULES = {
    "min_characters": Rule(
        "text", "drop a text of fewer characters", lambda text, n: len(text) < n, 50
    ),
    "max_characters": Rule(
        "text", "drop a text of more characters", lambda text, n: len(text) > n, 1_000_000
    ),
    "min_sentences": Rule(
        "text", "drop a text of fewer sentences", lambda text, n: len(SENTENCE.findall(text)) < n, 3
    ),
    "curly_bracket": Rule("text", "drop a text with {, which is code", _contains("{")),
    "lorem_ipsum": Rule("text", "drop a text with lorem ipsum", _contains("lorem ipsum")),
    "strip": Rule("line", "remove the spaces around each line", lambda line, _: line.strip()),
    "max_word": Rule(
        "line",
        "drop a line with a longer word, in characters",
        lambda line, n: _longest_word(line) > n,
        1000,
    ),
    "citations": Rule(
        "line", "remove [1], [edit], [citation needed]", lambda line, _: CITATION.sub("", line)
    ),
    "terminal_mark": Rule("line", "drop a line that does not end in a sentence mark", _has_no_mark),
    "min_words": Rule(
        "line", "drop a line of fewer words", lambda line, n: len(split_words(line)) < n, 5
    ),
    "javascript": Rule("line", "drop a line that mentions javascript", _contains("javascript")),
    "policy": Rule("line", "drop a line that mentions cookies or terms of use", _mentions_policy),
}
C4 = "max_characters=190000,strip,max_word,citations,terminal_mark,min_words,lorem_ipsum,javascript"
C4 += ",curly_bracket,policy,min_sentences"
PRESETS = {"none": "", "default": "min_characters,max_characters", "c4": C4}

RuleLimits = tuple[tuple[str, int | None], ...]  # (name, limit), in order of application


def parse_rules(spec: str) -> RuleLimits:
    """Parse names of RULES or PRESETS separated by commas, as "c4,min_characters=200".

    The last limit given for a rule counts.
    Raises ValueError for an unknown name, and for a limit that is not a whole number above 0.
    """
    limits: dict[str, int | None] = {}
    for word in filter(None, spec.split(",")):
        name, has_value, value = (piece.strip() for piece in word.partition("="))
        if name in PRESETS and not has_value:
            limits |= dict(parse_rules(PRESETS[name]))
            continue
        rule = lookup.lookup(RULES | PRESETS, name, "--rules")
        limit = rule.limit if name in RULES else None
        if has_value:
            if limit is None or not value.isdecimal() or int(value) < 1:
                form = f"{name}=N with N from 1, as {name}={limit}" if limit else f"{name} alone"
                raise ValueError(f"--rules: {word!r} is not valid; write {form}.")
            limit = int(value)
        limits[name] = limit
    return tuple(limits.items())


def format_rules(rules: RuleLimits) -> str:
    """Format rules as a spec with every limit, so that it does not depend on the defaults."""
    return ",".join(name if limit is None else f"{name}={limit}" for name, limit in rules)


class CleanResult(NamedTuple):
    """A cleaned text; else the rule that dropped it, or "empty". lines: rule -> lines dropped."""

    text: str
    dropped: str
    lines: dict[str, int]


def clean(text: str, rules: RuleLimits) -> CleanResult:
    """Apply rules in order, each to the output of the previous one."""
    text, lines = text.strip(), {}
    if not text:
        return CleanResult("", "empty", lines)
    for name, limit in rules:
        rule = RULES[name]
        pieces = [text] if rule.scope == "text" else text.split("\n")
        outcomes = [(piece, rule.apply(piece, limit)) for piece in pieces]
        remaining = [
            piece if outcome is False else outcome
            for piece, outcome in outcomes
            if outcome is not True
        ]
        if rule.scope == "line" and len(remaining) < len(pieces):
            lines[name] = len(pieces) - len(remaining)
        text = "\n".join(remaining).strip()
        if not text:
            return CleanResult("", name, lines)
    return CleanResult(text, "", lines)
