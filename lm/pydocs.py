"""The embedded corpus: the English of the docstrings in the installed Python packages.

It is read from the machine itself, so it needs no download, and it is a TFDS dataset like any
other. A document is a docstring's prose, paragraph by paragraph; where its first paragraph is one
sentence and enough prose follows, that sentence is the summary of what follows.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import importlib.metadata
import inspect
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import tensorflow_datasets as tfds
import tqdm

from lm import choose

# Left out: this package, and packaging tools, whose copies of other packages would come twice.
LEFT_OUT = {"lm", "pip", "setuptools", "wheel"}
LEFT_OUT_FOLDERS = {"test", "tests", "_test", "_tests", "_vendor", "vendored", "site-packages"}
TEST_FILE = re.compile(r"test_.*|.*_tests?|conftest")

SPLITS = {"train": 90, "validation": 5, "test": 5}  # percent of the modules
DOCUMENT_WORDS = 8  # at least, in a document
PARAGRAPH_WORDS = 4  # at least, in a paragraph
SUMMARY_WORDS = 30  # at most, in a summary
BODY_WORDS = 20  # at least, in what a summary sums up
POOL_FILES = 300  # with fewer, starting processes costs more than it saves
POOL_PROCESSES = 8  # at most


class Document(NamedTuple):
    """A docstring's prose: `text`, paragraphs parted by empty lines, and where they hold a pair,
    its `summary` (the first paragraph) and `body` (the others), else "" and "".
    """

    module: str
    name: str
    body: str
    summary: str
    text: str


# Which text is prose: one rule a function.


WORD = re.compile(r"""["'(]*[A-Za-z]+(?:['-][A-Za-z]+)*["')]*[.,;:!?]*["')]*""")
FUNCTION_WORDS = set(
    "a an the this that these those it its is are was were be been has have had do does can may "
    "will would should must no not if when where which who what how of to in on at by for from "
    "with without as into and or but than then all any each only you your we they there".split()
)


def is_long(text: str) -> bool:
    """It has the words of a sentence, not of a heading or a signature."""
    return len(text.split()) >= PARAGRAPH_WORDS


def is_wordy(text: str) -> bool:
    """At least three of four of its space-parted pieces are plain words, not code or numbers."""
    pieces = text.split()
    return 4 * sum(WORD.fullmatch(piece) is not None for piece in pieces) >= 3 * len(pieces)


def is_english(text: str) -> bool:
    """At least one of six of its words is among those that hold an English sentence together."""
    words = re.findall(r"[a-z]+", text.lower())
    return 6 * sum(word in FUNCTION_WORDS for word in words) >= max(1, len(words))


def is_whole(text: str) -> bool:
    """It does not end by announcing what is left out, such as code."""
    return not text.endswith(":")


def is_prose(text: str) -> bool:
    """A paragraph on which all of the rules above hold."""
    return is_long(text) and is_wordy(text) and is_english(text) and is_whole(text)


def is_sentence(text: str) -> bool:
    """It does not go on after a full stop."""
    return not re.search(r"[a-z0-9)\]\"'][.!?][\"')]*\s+[A-Z]", text)


# From a docstring to its paragraphs.


MARKUP = [(re.compile(pattern), plain) for pattern, plain in (
    (r":[\w:+-]+:`", "`"),  # :role:`text`
    (r"`+[~!]?([^`<]*?)\s*<[^`>]*>`+_*", r"\1"),  # `text <target>`_
    (r"`+[~!]?([^`]*)`+_*", r"\1"),  # `text`, ``text``
    (r"!?\[([^]]+)\]\([^)\s]*\)", r"\1"),  # [text](target)
    (r"\s*\[#?\w*\]_", ""),  # [1]_
    (r"(?<!\w)(\*{1,2})(\S(?:[^*]*[^\s*])?)\1(?!\w)", r"\2"),  # *text*, **text**
    (r"</?[a-z]+>", ""),  # <b>
    (r"\\([*_`|])", r"\1"),  # \*
)]  # fmt: skip

RULE = re.compile(r"[^\w\s][^\w]{2,}")  # a heading's underline, a table's border
TABLE = re.compile(r"\|.*|.*\S\s{3,}\S.*")
DIRECTIVE = re.compile(r"\.\.\s+(?:([\w-]+)::)?\s*(.*)")
SPOKEN = {"note", "warning", "tip", "important", "hint", "caution", "attention", "admonition"}
UNREAD = {"example", "examples", "usage", "references", "reference", "see also", "todo", "methods"}
BULLET = re.compile(r"(?:[-*+•]|\(?\d+[.)]|:[\w ,*|.\[\]]+:)\s+(?=\S)")  # or ":param x:"
NAMED = re.compile(r"\*{0,2}[\w.]+(?: ?\([^)]*\))?:\s+(?=\S)")  # "x:", "x (type):"


def unmarked(text: str) -> str:
    """The words without the marks of reStructuredText and Markdown."""
    for pattern, plain in MARKUP:
        text = pattern.sub(plain, text)
    return text


def paragraphs(docstring: str) -> list[str]:
    """A cleaned docstring's paragraphs of running text, each on one line, prose or not.

    Doctests, literal blocks, tables, directives and the sections in UNREAD are left out; the
    descriptions of parameters stay, each a paragraph, without the parameters' names.
    """
    found: list[list[str]] = []
    opened = item = None  # the indents of the paragraph and of the item that are being read
    for indent, line in _readable(docstring.splitlines()):
        if not line:
            opened = item = None
            continue
        goes_on = opened is not None and (indent == opened if item is None else indent > item)
        # Inside running text "word:" may well begin a line without beginning an item.
        head = BULLET.match(line) or (None if goes_on else NAMED.match(line))
        if head or not goes_on:
            found.append([line[head.end() :] if head else line])
            opened, item = indent, indent if head else None
        else:
            found[-1].append(line)
    return [unmarked(" ".join(lines)) for lines in found]


def _readable(lines: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(indent, stripped line) of every line; "" for what ends a paragraph or is left out."""
    hidden = None  # lines deeper than this indent are left out
    fenced = doctest = False
    for line, after in itertools.zip_longest(lines, lines[1:], fillvalue=""):
        indent, line = len(line) - len(line.lstrip()), line.strip()
        title = line.rstrip(":").lower() in UNREAD
        if line.startswith("```"):
            fenced, line = not fenced, ""
        if line and not RULE.fullmatch(line) and RULE.fullmatch(after.strip()):
            hidden, line = indent - 1 if title else None, ""
        elif line and hidden is not None and indent <= hidden:
            hidden = None
        doctest = bool(line) and (doctest or line.startswith(">>>"))
        if fenced or doctest or hidden is not None or RULE.fullmatch(line) or TABLE.fullmatch(line):
            line = ""
        directive = DIRECTIVE.fullmatch(line)
        if line.endswith("::") or (title and line) or (directive and directive[1] not in SPOKEN):
            hidden = indent
        yield indent, directive[2] * (directive[1] in SPOKEN) if directive else line


# From a file to documents.


def document(module: str, name: str, docstring: str) -> Document | None:
    """The prose of a docstring (as inspect.cleandoc leaves it), or None where there is too little.

    module, name: where it is from, both dotted.
    """
    # A docstring may spell out halves of characters, which no encoding can hold.
    found = paragraphs(docstring.encode("utf-8", "ignore").decode())
    kept = [text for text in found if is_prose(text)]
    if sum(len(text.split()) for text in kept) < DOCUMENT_WORDS:
        return None
    body, summary = _pair(kept) if kept[0] == found[0] else ("", "")
    return Document(module, name, body, summary, "\n\n".join(kept))


def _pair(kept: Sequence[str]) -> tuple[str, str]:
    """(body, summary) of paragraphs: the first sums up the others, or ("", "")."""
    summary, body = kept[0], "\n\n".join(kept[1:])
    good = (
        is_sentence(summary)
        and len(summary.split()) <= SUMMARY_WORDS
        and len(body.split()) >= BODY_WORDS
        and summary.casefold().rstrip(".") not in body.casefold()
    )
    return (body, summary) if good else ("", "")


def documents(module: str, source: bytes) -> tuple[int, list[Document]]:
    """(number of docstrings, their documents) of a file, in its order; (0, []) if unreadable."""
    if b'"""' not in source and b"'''" not in source:  # twice as fast as to parse them all
        return 0, []
    try:
        with warnings.catch_warnings(action="ignore"):  # of wrong escapes in others' code
            found = list(_docstrings(module, ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError):
        return 0, []
    made = [document(module, name, docstring) for name, docstring in found]
    return len(found), [each for each in made if each]


def _docstrings(name: str, node: ast.AST) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of a module, class or function and all within, in file order."""
    docstring = ast.get_docstring(node)
    if docstring:
        yield name, docstring
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(f"{name}.{child.name}", child)


def _read(file: tuple[str, str]) -> tuple[int, list[Document]]:
    """documents() of a (module, path); a file that has gone is an empty one."""
    module, path = file
    try:
        return documents(module, pathlib.Path(path).read_bytes())
    except OSError:
        return 0, []
