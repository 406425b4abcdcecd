"""Rules that clean or drop a document: pure functions, chosen by name, for any language.

A rule looks at one line or at the whole text, and returns what remains of it, or None to drop it.
C4's rules are here in a form that knows more scripts; on ASCII they are C4's own, except that
sentences are counted by their marks. What C4 has beyond them is a matter of one language or of the
whole collection: its language detector, its list of bad words, its removal of repeated lines.
Source: Raffel et al. 2020, section 2.2, arXiv:1910.10683; c4_utils.py of TFDS.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from lm import lookup

# Scripts that put no space between words: Thai to Tibetan, Burmese, Khmer, kana, Han.
SPACELESS = "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
SPACELESS += "\U00020000-\U0003ffff"
WORD = re.compile(rf"[{SPACELESS}]|[^\s{SPACELESS}]+")

# Unicode's Sentence_Terminal in the scripts of large corpora; those that need no space after them.
SPACED_MARKS = ".?!։؟۔።፧፨᠃᠉‼⁇⁈⁉"
FREE_MARKS = "।॥།༎၊။។៕。！．？｡"
CLOSING = "\"')\\]»’”」』"  # between a mark and the end of its sentence
# From the first of its marks and all of them, or a long run of marks would take the square of it.
SPACED = rf"(?<![{SPACED_MARKS}])[{SPACED_MARKS}]++(?=[{CLOSING}]*+(?:\s|$))"
SENTENCE = re.compile(rf"[{FREE_MARKS}]+|{SPACED}")
# C4 takes a line that ends in a quotation mark, whatever is before it.
ENDS = (*SPACED_MARKS, *FREE_MARKS, '"', "»", "”", "」", "』")
ELLIPSES = ("...", "…")

CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
POLICIES = ("terms of use", "privacy policy", "cookie policy")
POLICIES += ("uses cookies", "use of cookies", "use cookies")


def split_words(text: str) -> list[str]:
    """What stands between spaces; of scripts that have none, each character."""
    return WORD.findall(text)


def _min_characters(text: str, least: int) -> str | None:
    return text if len(text) >= least else None


def _max_characters(text: str, most: int) -> str | None:
    return text if len(text) <= most else None


def _min_sentences(text: str, least: int) -> str | None:
    return text if len(SENTENCE.findall(text)) >= least else None


def _curly_bracket(text: str, _) -> str | None:
    return None if "{" in text else text


def _lorem_ipsum(text: str, _) -> str | None:
    return None if "lorem ipsum" in text.lower() else text


def _strip(line: str, _) -> str | None:
    return line.strip()


def _max_word(line: str, most: int) -> str | None:
    return line if max(map(len, line.split()), default=0) <= most else None


def _citations(line: str, _) -> str | None:
    return CITATION.sub("", line)


def _terminal_mark(line: str, _) -> str | None:
    return line if line.endswith(ENDS) and not line.endswith(ELLIPSES) else None


def _min_words(line: str, least: int) -> str | None:
    return line if len(split_words(line)) >= least else None


def _javascript(line: str, _) -> str | None:
    return None if "javascript" in line.lower() else line


def _policy(line: str, _) -> str | None:
    lower = line.lower()
    return None if any(words in lower for words in POLICIES) else line


class Rule(NamedTuple):
    """scope: what the rule is shown, "line" or "text". limit: its default number, None for none.

    remains: (line or text, limit) -> what remains of it; None drops it.
    """

    scope: str
    remains: Callable[[str, int | None], str | None]
    meaning: str
    limit: int | None = None


RULES = {
    "min_characters": Rule("text", _min_characters, "drop a text of fewer characters", 50),
    "max_characters": Rule("text", _max_characters, "drop a text of more characters", 1_000_000),
    "min_sentences": Rule("text", _min_sentences, "drop a text of fewer sentences", 3),
    "curly_bracket": Rule("text", _curly_bracket, "drop a text with {, which is code"),
    "lorem_ipsum": Rule("text", _lorem_ipsum, "drop a text with lorem ipsum"),
    "strip": Rule("line", _strip, "remove the spaces around each line"),
    "max_word": Rule("line", _max_word, "drop a line with a word of more characters", 1000),
    "citations": Rule("line", _citations, "remove [1], [edit], [citation needed]"),
    "terminal_mark": Rule("line", _terminal_mark, "drop a line that ends in no mark of sentences"),
    "min_words": Rule("line", _min_words, "drop a line of fewer words", 5),
    "javascript": Rule("line", _javascript, "drop a line that speaks of javascript"),
    "policy": Rule("line", _policy, "drop a line that speaks of cookies and terms of use"),
}
C4 = "max_characters=190000,strip,max_word,citations,terminal_mark,min_words,lorem_ipsum,javascript"
C4 += ",curly_bracket,policy,min_sentences"
PRESETS = {"none": "", "default": "min_characters,max_characters", "c4": C4}

RuleLimits = tuple[tuple[str, int | None], ...]  # (name, limit), in the order in which they apply


def parse_rules(spec: str) -> RuleLimits:
    """The rules that a spec names, with their limits.

    spec: names of RULES or PRESETS separated by commas, as "c4,min_characters=200"; of a rule that
    is named twice the later limit counts.
    Raises ValueError for an unknown name, and for a limit that is no whole number above 0.
    """
    made: dict[str, int | None] = {}
    for word in filter(None, spec.split(",")):
        name, given, value = (part.strip() for part in word.partition("="))
        if name in PRESETS and not given:
            made |= dict(parse_rules(PRESETS[name]))
            continue
        limit = lookup.lookup(RULES | PRESETS, name, "--rules")
        limit = limit.limit if name in RULES else None
        if given:
            if limit is None or not value.isdecimal() or int(value) < 1:
                takes = f"{name}=N with N from 1, as {name}={limit}" if limit else f"{name} alone"
                raise ValueError(f"--rules: {word!r} cannot be read; write {takes}.")
            limit = int(value)
        made[name] = limit
    return tuple(made.items())


def format_rules(rules: RuleLimits) -> str:
    """The spec of these rules with every limit, which says the same whatever the defaults are."""
    return ",".join(name if limit is None else f"{name}={limit}" for name, limit in rules)


class CleanResult(NamedTuple):
    """text: what the rules left, without space around it. dropped: the rule that left nothing, or
    "". lines: rule -> how many lines it dropped."""

    text: str
    dropped: str
    lines: dict[str, int]


def clean(text: str, rules: RuleLimits) -> CleanResult:
    """Apply rules in their order, each to what the one before it left."""
    text, lines = text.strip(), {}
    if not text:
        return CleanResult("", "empty", lines)
    for name, limit in rules:
        rule = RULES[name]
        if rule.scope == "text":
            left = rule.remains(text, limit) or ""
        else:
            before = text.split("\n")
            after = [rule.remains(line, limit) for line in before]
            kept = [line for line in after if line is not None]
            if len(kept) < len(before):
                lines[name] = len(before) - len(kept)
            left = "\n".join(kept)
        text = left.strip()
        if not text:
            return CleanResult("", name, lines)
    return CleanResult(text, "", lines)
