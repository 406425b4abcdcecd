"""The embedded corpus: the English of the docstrings in the installed Python packages.

It is read from the machine itself, so it needs no download, and it is a TFDS dataset like any
other. A document is a docstring's prose, paragraph by paragraph; where its first paragraph is one
sentence and enough prose follows, that sentence is the summary of what follows.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import hashlib
import importlib.metadata
import io
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import tensorflow_datasets as tfds
import tqdm

from lm import lookup

# Left out: this package, and packaging tools, whose copies of other packages would come twice.
EXCLUDED_PACKAGES = {"lm", "pip", "setuptools", "wheel"}
EXCLUDED_PACKAGES |= {
    "torch",
    "transformers",
    "sympy",
    "mpmath",
    "networkx",
}  # of tests; they come and go
EXCLUDED_FOLDERS = {"test", "tests", "_test", "_tests", "_vendor"}
TEST_FILE = re.compile(r"test_.*|.*_tests?|conftest")

SPLITS = {"train": 90, "validation": 5, "test": 5}  # percent of the modules
MIN_DOCUMENT_WORDS = 8  # at least, in a document
MIN_PARAGRAPH_WORDS = 4  # at least, in a paragraph
MAX_SUMMARY_WORDS = 30  # at most, in a summary
MIN_BODY_WORDS = 20  # at least, in what a summary sums up
MIN_POOL_FILES = 300  # with fewer, starting processes costs more than it saves
MAX_PROCESSES = 8  # at most


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
FUNCTION_WORD = re.compile(
    r"\b(?:a|an|the|th(?:is|at|ese|ose|en|an|ey|ere)|its?|is|are|was|were|be|been|ha[sd]|have|do|does"
    r"|can|may|will|would|should|must|not?|if|wh(?:en|ere|ich|o|at)|how|of|to|in|on|at|by|for|from"
    r"|with|without|as|into|and|or|but|all|any|each|only|your?|we)\b"
)


def is_long(text: str) -> bool:
    """It has the words of a sentence, not of a heading or a signature."""
    return len(text.split()) >= MIN_PARAGRAPH_WORDS


def is_wordy(text: str) -> bool:
    """At least three of four of its space-parted pieces are plain words, not code or numbers."""
    pieces = text.split()
    return 4 * sum(WORD.fullmatch(piece) is not None for piece in pieces) >= 3 * len(pieces)


def is_english(text: str) -> bool:
    """It ends as a sentence does, or one of six of its words, at least, holds one together."""
    words = len(re.findall(r"[a-z]+", text.lower()))
    return text.endswith(".") or 6 * len(FUNCTION_WORD.findall(text.lower())) >= max(1, words)


def is_complete(text: str) -> bool:
    """It does not end by announcing what is left out, such as code."""
    return not text.endswith(":")


def is_prose(text: str) -> bool:
    """A paragraph on which all of the rules above hold."""
    return is_long(text) and is_wordy(text) and is_english(text) and is_complete(text)


def is_sentence(text: str) -> bool:
    """It does not go on after a full stop."""
    return not re.search(r"[a-z0-9)\]\"'][.!?][\"')]*\s+[A-Z]", text)


# From a docstring to its paragraphs.


MARKUP = [(re.compile(pattern), plain) for pattern, plain in (
    (r":[\w:+-]+:`[~!]?\.?", "`"),  # :role:`text`
    (r"`+([^`<]*?)\s*<[^`>]*>`+_*", r"\1"),  # `text <target>`_
    (r"`+([^`]*)`+_*", r"\1"),  # `text`, ``text``
    (r"!?\[([^]]+)\]\([^)\s]*\)", r"\1"),  # [text](target)
    (r"\s*\[#?\w*\]_", ""),  # [1]_
    (r"(?<!\w)(\*{1,2})(\S(?:[^*]*[^\s*])?)\1(?!\w)", r"\2"),  # *text*, **text**
    (r"</?[a-z]+>", ""),  # <b>
    (r"\\([*_`|])", r"\1"),  # \*
)]  # fmt: skip

UNDERLINE = re.compile(r"[^\w\s][^\w]{2,}")  # a heading's underline, a table's border
TABLE = re.compile(r"^\||\S\s{3,}\S")  # a row's border, or columns
DIRECTIVE = re.compile(r"\.\.\s+(?:([\w-]+)::)?\s*(.*)")
PROSE_DIRECTIVES = {
    "note",
    "warning",
    "tip",
    "important",
    "hint",
    "caution",
    "attention",
    "admonition",
}
SKIPPED_SECTIONS = {
    "example",
    "examples",
    "usage",
    "references",
    "reference",
    "see also",
    "todo",
    "methods",
}
BULLET = re.compile(r"()(?:[-*+•]|\(?\d+[.)]|:\w+:)\s+(?=\S)")
FIELD = re.compile(r":\w+ (?:[\w.,|\[\] ]+ )?(\**\w+):\s+(?=\S)")  # ":param x:", ":param int x:"
PARAMETER = re.compile(r"(\**[\w.]+)(?: ?\([^)]*\))?:\s+(?=\S)")  # "x:", "x (int):"
NUMPY_PARAMETER = re.compile(r"(\**\w+(?:, \**\w+)*) : .*")  # "x : int", its description below


def strip_markup(text: str) -> str:
    """The words without the marks of reStructuredText and Markdown, one space between two."""
    for pattern, plain in MARKUP:
        text = pattern.sub(plain, text)
    return " ".join(text.split())


def split_paragraphs(docstring: str) -> list[str]:
    """A cleaned docstring's paragraphs of running text, each on one line, prose or not.

    Doctests, literal blocks, tables, directives and the sections in UNREAD are left out. An item of
    a list is a paragraph; so is a parameter, as "name: description".
    """
    found: list[list[str]] = []
    opened, item = None, False  # the indent of what is being read, and whether it is an item
    for indent, line in _prose_lines(docstring.splitlines()):
        if not line:
            opened = None
            continue
        deeper = opened is not None and indent > opened
        goes_on = indent == opened or (deeper and (item or _is_continued(found[-1][-1])))
        head = BULLET.match(line) or FIELD.match(line)
        # Inside running text "word:" may well begin a line without beginning an item.
        if not head and (not goes_on or (item and not deeper)):
            head = PARAMETER.match(line) or NUMPY_PARAMETER.match(line)
        if head or not goes_on:
            found.append([])
            opened, item = indent, bool(head)
        found[-1] += [f"{head[1]}:" if head[1] else "", line[head.end() :]] if head else [line]
    return [strip_markup(" ".join(lines)) for lines in found]


def _is_continued(line: str) -> bool:
    """A line of text that the next one continues, even where that is indented."""
    return is_long(line) and not line.endswith((".", ":"))


def _prose_lines(lines: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(indent, stripped line) of every line; "" for what ends a paragraph or is left out."""
    hidden = None  # lines deeper than this indent are left out
    fenced = doctest = False
    for line, after in itertools.zip_longest(lines, lines[1:], fillvalue=""):
        indent, line = len(line) - len(line.lstrip()), line.strip()
        title = line.rstrip(":").lower() in SKIPPED_SECTIONS
        if line.startswith("```"):
            fenced, line = not fenced, ""
        if line and not UNDERLINE.fullmatch(line) and UNDERLINE.fullmatch(after.strip()):
            hidden, line = indent - 1 if title else None, ""
        elif line and hidden is not None and indent <= hidden:
            hidden = None
        doctest = bool(line) and (doctest or line.startswith(">>>"))
        if (
            fenced
            or doctest
            or hidden is not None
            or UNDERLINE.fullmatch(line)
            or TABLE.search(line)
        ):
            line = ""
        directive = DIRECTIVE.fullmatch(line)
        if (
            line.endswith("::")
            or (title and line)
            or (directive and directive[1] not in PROSE_DIRECTIVES)
        ):
            hidden = indent
        yield indent, directive[2] * (directive[1] in PROSE_DIRECTIVES) if directive else line


# From a file to documents.


def make_document(module: str, name: str, docstring: str) -> Document | None:
    """The prose of a docstring (as inspect.cleandoc leaves it), or None where there is too little.

    module, name: where it is from, both dotted.
    """
    # A docstring may spell out halves of characters, which no encoding can hold.
    found = split_paragraphs(docstring.encode("utf-8", "ignore").decode())
    kept = [text for text in found if is_prose(text)]
    if sum(len(text.split()) for text in kept) < MIN_DOCUMENT_WORDS:
        return None
    body, summary = _body_and_summary(kept) if kept[0] == found[0] else ("", "")
    return Document(module, name, body, summary, "\n\n".join(kept))


def _body_and_summary(kept: Sequence[str]) -> tuple[str, str]:
    """(body, summary) of paragraphs: the first sums up the others, or ("", "")."""
    summary, body = kept[0], "\n\n".join(kept[1:])
    short = is_sentence(summary) and len(summary.split()) <= MAX_SUMMARY_WORDS
    copied = summary.casefold().rstrip(".") in body.casefold()
    enough = len(body.split()) >= MIN_BODY_WORDS
    return (body, summary) if short and enough and not copied else ("", "")


def parse_documents(module: str, source: bytes) -> tuple[int, list[Document]]:
    """(number of docstrings, their documents) of a file, in its order; (0, []) if unreadable."""
    if b'"""' not in source and b"'''" not in source:  # twice as fast as to parse them all
        return 0, []
    try:
        with warnings.catch_warnings(action="ignore"):  # of wrong escapes in others' code
            found = list(_iter_docstrings(module, ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # as the parser says too deep
        return 0, []
    made = [make_document(module, name, docstring) for name, docstring in found]
    return len(found), [each for each in made if each]


def _iter_docstrings(name: str, node: ast.AST) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of a module, class or function and all within, in file order."""
    docstring = ast.get_docstring(node)
    if docstring:
        yield name, docstring
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _iter_docstrings(f"{name}.{child.name}", child)


def _read_file(file: tuple[str, str]) -> tuple[int, list[Document]]:
    """documents() of a (module, path); a file that has gone is an empty one."""
    module, path = file
    return parse_documents(module, pathlib.Path(path).read_bytes() if os.path.isfile(path) else b"")


def read_documents(
    files: Sequence[tuple[str, str]], counts: collections.Counter
) -> dict[str, list[Document]]:
    """Split -> the documents of files (module, path), each only once, sorted by module and name.

    counts: counts docstrings, those too short or duplicate, documents and pairs, in place.
    Whatever the number of processes, the result is the same.
    """
    found: list[Document] = []
    processes = min(MAX_PROCESSES, os.cpu_count() or 1) if len(files) >= MIN_POOL_FILES else 1
    # Spawned, since a process that uses jax must not be forked.
    pool = multiprocessing.get_context("spawn").Pool(processes) if processes > 1 else None
    with pool or contextlib.nullcontext():
        read = pool.imap(_read_file, files, chunksize=32) if pool else map(_read_file, files)
        for seen, made in tqdm.tqdm(read, "reading", len(files), unit="file", disable=None):
            counts["docstrings"] += seen
            counts["too_short"] += seen - len(made)
            found += made
    kept = deduplicate(sorted(found, key=lambda each: (each.module, each.name)))
    counts["duplicates"] += len(found) - len(kept)
    counts["documents"] += len(kept)
    counts["pairs"] += sum(bool(each.body) for each in kept)
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for each in kept:
        splits[split_of(each.module)].append(each)
    return {split: kept for split, kept in splits.items() if kept}


def deduplicate(found: Iterable[Document]) -> list[Document]:
    """The documents of which neither the text nor the body came before, in either role.

    Two texts that differ in case, digits and white space alone are one.
    """
    seen: set[str] = set()
    kept = []
    for each in found:
        texts = {
            re.sub(r"\d+", "0", " ".join(text.casefold().split()))
            for text in (each.text, each.body)
            if text
        }
        if texts.isdisjoint(seen):
            kept.append(each)
            seen |= texts
    return kept


def split_of(module: str) -> str:
    """The split of a module's documents, from the hash of its name alone."""
    lots = [split for split, percent in SPLITS.items() for _ in range(percent)]
    return lots[int(hashlib.sha256(module.encode()).hexdigest(), 16) % len(lots)]


# From the environment to a TFDS dataset.


def installed_distributions(
    packages: Sequence[str] | None = None,
) -> dict[str, importlib.metadata.Distribution]:
    """Name -> distribution, sorted: of the packages named, or of all but those in LEFT_OUT.

    Raises ValueError for a name that is not installed.
    """
    # The first of a name is the one that is imported; a broken one has no name.
    there = {d.name: d for d in reversed(list(importlib.metadata.distributions())) if d.name}
    if not packages:
        return {name: there[name] for name in sorted(there.keys() - EXCLUDED_PACKAGES)}
    if absent := set(packages) - there.keys():
        name = min(absent)
        raise ValueError(
            f"the package {name!r} for pydocs is not installed; "
            f"install it or name another{lookup.nearest(name, there)}."
        )
    return {name: there[name] for name in sorted(set(packages))}


def python_files(distributions: Iterable[importlib.metadata.Distribution]) -> list[tuple[str, str]]:
    """(dotted module, path) of the Python files, sorted, each once, without tests and copies."""
    files = {}
    for distribution in distributions:
        for file in distribution.files or ():
            parts = file.with_suffix("").parts
            tests = TEST_FILE.fullmatch(parts[-1]) or EXCLUDED_FOLDERS & set(parts)
            if file.suffix == ".py" and ".." not in parts and not tests:
                module = ".".join(parts).removesuffix(".__init__")
                files.setdefault(module, str(distribution.locate_file(file)))
    return sorted(files.items())


class PyDocs(tfds.core.GeneratorBasedBuilder):
    """The prose of the docstrings in the installed Python packages; build() prepares it.

    packages: the names of distributions, or None for all.
    """

    name = "pydocs"
    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing to download; TFDS's own search for it needs importlib_resources

    def __init__(self, *, packages: Sequence[str] | None = None, **kwargs):
        self.packages = packages
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The English of the docstrings in the installed Python packages.",
            features=tfds.features.FeaturesDict(
                {field: tfds.features.Text() for field in Document._fields}
            ),
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        distributions = installed_distributions(self.packages)
        counts = collections.Counter()
        splits = read_documents(python_files(distributions.values()), counts)
        if "train" not in splits:
            raise ValueError(f"no prose for train in {list(distributions)}; name more packages.")
        self.info.metadata.update(
            asked=sorted(set(self.packages or ())),
            packages={name: each.version for name, each in distributions.items()},
            counts=dict(counts),
        )
        return {split: self._generate_examples(kept, split) for split, kept in splits.items()}

    def _generate_examples(self, kept, split) -> Iterator[tuple[int, dict[str, str]]]:
        bar = tqdm.tqdm(kept, f"writing {split}", unit="document", disable=None)
        yield from enumerate(each._asdict() for each in bar)


def build(data_dir: str, packages: Sequence[str] | None = None) -> pathlib.Path:
    """Prepares root/pydocs/1.0.0 where it is not there yet, and returns that directory.

    It appears there whole, by renaming, and what a killed build left is removed: one build at a
    time. Beside the data, metadata.json holds the packages' versions and the counts.
    packages: the names of distributions; None, or none, for all that are installed.
    Raises ValueError where the directory was built for other packages than are asked for.
    """
    root = pathlib.Path(data_dir).expanduser().resolve()
    directory = root / PyDocs.name / str(PyDocs.VERSION)
    if (directory / "metadata.json").exists():
        built = json.loads((directory / "metadata.json").read_text())["asked"]
        asked = sorted(set(packages or ()))
        if built != asked:
            raise ValueError(
                f"{directory} was built for packages={built}, not {asked} ([] is all); "
                f"remove it, or choose another data_dir."
            )
        return directory
    for left in (directory, *directory.parent.glob("incomplete.*")):
        shutil.rmtree(left, ignore_errors=True)
    builder = PyDocs(packages=packages, data_dir=root, file_format="array_record")
    tfds.disable_progress_bar()  # ours say more
    with (
        tempfile.TemporaryDirectory() as downloads,  # there are none, but TFDS makes a folder
        contextlib.redirect_stdout(io.StringIO()),  # nor is there a download to speak of
    ):
        builder.download_and_prepare(download_dir=downloads)
    return directory
