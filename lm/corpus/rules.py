"""Rules that clean or drop documents: pure functions selected by name, for any language.

A rule receives one line or the whole text and returns it, cleaned, or None to drop it. The C4 rules
are extended to more scripts; on ASCII they equal C4's, except that sentences are counted by their
terminal marks. C4's language detection, word list and removal of repeated lines are not included.
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
    """scope: "line" or "text". limit: its default number, None for a rule without one.

    apply: (line or text, limit) -> the cleaned line or text; None drops it.
    """

    scope: str
    apply: Callable[[str, int | None], str | None]
    meaning: str
    limit: int | None = None


def _drop_if(
    scope: str, is_bad: Callable[..., bool], meaning: str, limit: int | None = None
) -> Rule:
    """A rule that drops what is bad: is_bad(text) or is_bad(text, limit)."""
    bad = is_bad if limit else lambda text, _: is_bad(text)
    return Rule(scope, lambda text, n: None if bad(text, n) else text, meaning, limit)


def _mentions_policy(line: str) -> bool:
    lower = line.lower()
    return any(phrase in lower for phrase in POLICIES)


RULES = {
    "min_characters": _drop_if(
        "text", lambda text, n: len(text) < n, "drop a text of fewer characters", 50
    ),
    "max_characters": _drop_if(
        "text", lambda text, n: len(text) > n, "drop a text of more characters", 1_000_000
    ),
    "min_sentences": _drop_if(
        "text", lambda text, n: len(SENTENCE.findall(text)) < n, "drop a text of fewer sentences", 3
    ),
    "curly_bracket": _drop_if(
        "text", lambda text: "{" in text, "drop a text with {, which is code"
    ),
    "lorem_ipsum": _drop_if(
        "text", lambda text: "lorem ipsum" in text.lower(), "drop a text with lorem ipsum"
    ),
    "strip": Rule("line", lambda line, _: line.strip(), "remove the spaces around each line"),
    "max_word": _drop_if(
        "line",
        lambda line, n: max(map(len, line.split()), default=0) > n,
        "drop a line with a longer word, in characters",
        1000,
    ),
    "citations": Rule(
        "line", lambda line, _: CITATION.sub("", line), "remove [1], [edit], [citation needed]"
    ),
    "terminal_mark": _drop_if(
        "line",
        lambda line: not line.endswith(ENDS) or line.endswith(ELLIPSES),
        "drop a line that does not end in a sentence mark",
    ),
    "min_words": _drop_if(
        "line", lambda line, n: len(split_words(line)) < n, "drop a line of fewer words", 5
    ),
    "javascript": _drop_if(
        "line", lambda line: "javascript" in line.lower(), "drop a line that mentions javascript"
    ),
    "policy": _drop_if(
        "line", _mentions_policy, "drop a line that mentions cookies or terms of use"
    ),
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
                raise ValueError(f"--rules: {word!r} cannot be read; write {form}.")
            limit = int(value)
        limits[name] = limit
    return tuple(limits.items())


def format_rules(rules: RuleLimits) -> str:
    """Format rules as a spec with every limit, so that it does not depend on the defaults."""
    return ",".join(name if limit is None else f"{name}={limit}" for name, limit in rules)


class CleanResult(NamedTuple):
    """text: cleaned and stripped. dropped: the rule that dropped it, or "". lines: rule -> lines
    that it dropped."""

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
        if rule.scope == "text":
            text = rule.apply(text, limit) or ""
        else:
            cleaned = [rule.apply(line, limit) for line in text.split("\n")]
            remaining = [line for line in cleaned if line is not None]
            if len(remaining) < len(cleaned):
                lines[name] = len(cleaned) - len(remaining)
            text = "\n".join(remaining)
        text = text.strip()
        if not text:
            return CleanResult("", name, lines)
    return CleanResult(text, "", lines)
