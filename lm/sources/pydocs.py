"""The embedded dataset: the English prose of the docstrings in the installed Python packages.

It is a normal TFDS dataset that needs no download. A document is the prose of a docstring. If its
first paragraph is one sentence and enough prose follows, that sentence is the summary of the rest.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
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
from importlib.metadata import Distribution, distributions
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
import tqdm

from lm import lookup

# This package, and packaging tools, which bundle copies of other packages.
EXCLUDED_PACKAGES = {"lm", "pip", "setuptools", "wheel"}
# Used by tests only: the dataset must not depend on whether they are installed.
EXCLUDED_PACKAGES |= {"torch", "transformers", "sympy", "mpmath", "networkx"}
EXCLUDED_FOLDERS = {"test", "tests", "_test", "_tests", "_vendor"}
TEST_FILE = re.compile(r"test_.*|.*_tests?|conftest")

SPLITS = {"train": 90, "validation": 5, "test": 5}  # percent of the modules
MIN_DOCUMENT_WORDS = 8
MIN_PARAGRAPH_WORDS = 4
MAX_SUMMARY_WORDS = 30
MIN_BODY_WORDS = 20  # after a summary
MIN_POOL_FILES = 300  # with fewer, starting processes costs more than it saves
MAX_PROCESSES = 8


class Document(NamedTuple):
    """The prose of a docstring: `text`, whose paragraphs are separated by empty lines.

    `summary` is the first paragraph and `body` the rest, or both are "" if they are no pair.
    """

    module: str
    name: str
    body: str
    summary: str
    text: str


# Which text is prose: one rule per function.

WORD = re.compile(r"""["'(]*[A-Za-z]+(?:['-][A-Za-z]+)*["')]*[.,;:!?]*["')]*""")
FUNCTION_WORD = re.compile(
    r"\b(?:a|an|the|th(?:is|at|ese|ose|en|an|ey|ere)|its?|is|are|was|were|be|been|ha[sd]|have|do|does"
    r"|can|may|will|would|should|must|not?|if|wh(?:en|ere|ich|o|at)|how|of|to|in|on|at|by|for|from"
    r"|with|without|as|into|and|or|but|all|any|each|only|your?|we)\b"
)


def is_long(text: str) -> bool:
    """Whether it has as many words as a sentence, more than a heading or a signature."""
    return len(text.split()) >= MIN_PARAGRAPH_WORDS


def is_wordy(text: str) -> bool:
    """Whether at least 3/4 of its space-separated tokens are plain words, not code or numbers."""
    tokens = text.split()
    return 4 * sum(WORD.fullmatch(token) is not None for token in tokens) >= 3 * len(tokens)


def is_english(text: str) -> bool:
    """Whether it ends with a full stop, or at least 1/6 of its words are function words."""
    words = len(re.findall(r"[a-z]+", text.lower()))
    return text.endswith(".") or 6 * len(FUNCTION_WORD.findall(text.lower())) >= max(1, words)


def is_complete(text: str) -> bool:
    """Whether it does not end in a colon, which introduces code that was left out."""
    return not text.endswith(":")


def is_prose(text: str) -> bool:
    """Whether a paragraph passes all the rules above."""
    return is_long(text) and is_wordy(text) and is_english(text) and is_complete(text)


def is_sentence(text: str) -> bool:
    """Whether nothing follows a full stop."""
    return not re.search(r"[a-z0-9)\]\"'][.!?][\"')]*\s+[A-Z]", text)


# A docstring to its paragraphs.

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

UNDERLINE = re.compile(r"[^\w\s][^\w]{2,}")  # of a heading; or a table's border
TABLE = re.compile(r"^\||\S\s{3,}\S")  # a row's border, or columns
DIRECTIVE = re.compile(r"\.\.\s+(?:([\w-]+)::)?\s*(.*)")
PROSE = {"note", "warning", "tip", "important", "hint", "caution", "attention", "admonition"}
SKIPPED = {"example", "examples", "usage", "references", "reference", "see also", "todo", "methods"}
BULLET = re.compile(r"()(?:[-*+•]|\(?\d+[.)]|:\w+:)\s+(?=\S)")
FIELD = re.compile(r":\w+ (?:[\w.,|\[\] ]+ )?(\**\w+):\s+(?=\S)")  # ":param x:", ":param int x:"
PARAMETER = re.compile(r"(\**[\w.]+)(?: ?\([^)]*\))?:\s+(?=\S)")  # "x:", "x (int):"
NUMPY_PARAMETER = re.compile(r"(\**\w+(?:, \**\w+)*) : .*")  # "x : int", described below it


def strip_markup(text: str) -> str:
    """Remove the marks of reStructuredText and Markdown, and collapse white space."""
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def split_paragraphs(docstring: str) -> list[str]:
    """The paragraphs of running text in a cleaned docstring, each on one line, prose or not.

    Leaves out doctests, literal blocks, tables, directives and the sections in SKIPPED. A list item
    is a paragraph, and so is a parameter, as "name: description".
    """
    paragraphs: list[list[str]] = []  # the lines of each
    current_indent, is_item = None, False  # of the paragraph being read
    for indent, line in _prose_lines(docstring.splitlines()):
        if not line:
            current_indent = None
            continue
        deeper = current_indent is not None and indent > current_indent
        joins = deeper and (is_item or _is_continued(paragraphs[-1][-1]))
        continues = indent == current_indent or joins
        head = BULLET.match(line) or FIELD.match(line)
        # Within running text, a line that begins with "word:" need not begin an item.
        if not head and (not continues or (is_item and not deeper)):
            head = PARAMETER.match(line) or NUMPY_PARAMETER.match(line)
        if head or not continues:
            paragraphs.append([])
            current_indent, is_item = indent, bool(head)
        label = f"{head[1]}:" if head and head[1] else ""
        paragraphs[-1] += [label, line[head.end() :]] if head else [line]
    return [strip_markup(" ".join(lines)) for lines in paragraphs]


def _is_continued(line: str) -> bool:
    """Whether the next line continues this one even if it is indented."""
    return is_long(line) and not line.endswith((".", ":"))


def _prose_lines(lines: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(indent, stripped line) of every line; "" for one that ends a paragraph or is left out."""
    hidden = None  # lines indented deeper than this are left out
    fenced = doctest = False
    for line, following in itertools.zip_longest(lines, lines[1:], fillvalue=""):
        indent, line = len(line) - len(line.lstrip()), line.strip()
        skipped = line.rstrip(":").lower() in SKIPPED
        if line.startswith("```"):
            fenced, line = not fenced, ""
        if line and not UNDERLINE.fullmatch(line) and UNDERLINE.fullmatch(following.strip()):
            hidden, line = indent - 1 if skipped else None, ""
        elif line and hidden is not None and indent <= hidden:
            hidden = None
        doctest = bool(line) and (doctest or line.startswith(">>>"))
        is_left_out = fenced or doctest or hidden is not None
        if is_left_out or UNDERLINE.fullmatch(line) or TABLE.search(line):
            line = ""
        directive = DIRECTIVE.fullmatch(line)
        is_code = directive and directive[1] not in PROSE
        if line.endswith("::") or (skipped and line) or is_code:
            hidden = indent
        yield indent, directive[2] * (not is_code) if directive else line


# A file to documents.


def make_document(module: str, name: str, docstring: str) -> Document | None:
    """The prose of a docstring (cleaned by inspect.cleandoc), or None if there is too little.

    module, name: dotted names of the module and of the definition.
    """
    # Ignores unpaired surrogates, which cannot be encoded.
    paragraphs = split_paragraphs(docstring.encode("utf-8", "ignore").decode())
    prose = [text for text in paragraphs if is_prose(text)]
    if sum(len(text.split()) for text in prose) < MIN_DOCUMENT_WORDS:
        return None
    body, summary = _body_and_summary(prose) if prose[0] == paragraphs[0] else ("", "")
    return Document(module, name, body, summary, "\n\n".join(prose))


def _body_and_summary(paragraphs: Sequence[str]) -> tuple[str, str]:
    """(body, summary) if the first paragraph sums up the others, else ("", "")."""
    summary, body = paragraphs[0], "\n\n".join(paragraphs[1:])
    short = is_sentence(summary) and len(summary.split()) <= MAX_SUMMARY_WORDS
    copied = summary.casefold().rstrip(".") in body.casefold()
    enough = len(body.split()) >= MIN_BODY_WORDS
    return (body, summary) if short and enough and not copied else ("", "")


def parse_documents(module: str, source: bytes) -> tuple[int, list[Document]]:
    """(number of docstrings, their documents in order); (0, []) if the file does not parse."""
    if b'"""' not in source and b"'''" not in source:  # twice as fast as parsing every file
        return 0, []
    try:
        with warnings.catch_warnings(action="ignore"):  # of invalid escapes in other code
            docstrings = list(_iter_docstrings(module, ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # MemoryError: nested too deep
        return 0, []
    documents = [make_document(module, name, docstring) for name, docstring in docstrings]
    return len(docstrings), [document for document in documents if document]


def _iter_docstrings(name: str, node: ast.AST) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of a definition and of all inside it, in file order."""
    docstring = ast.get_docstring(node)
    if docstring:
        yield name, docstring
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _iter_docstrings(f"{name}.{child.name}", child)


def _read_file(file: tuple[str, str]) -> tuple[int, list[Document]]:
    """parse_documents of a (module, path); a file that no longer exists is empty."""
    module, path = file
    return parse_documents(module, pathlib.Path(path).read_bytes() if os.path.isfile(path) else b"")


def _read_documents(files: Sequence[tuple[str, str]]) -> tuple[list[Document], dict[str, int]]:
    """The documents of files (module, path), deduplicated, sorted by module and name; and counts.

    The result does not depend on the number of processes.
    """
    documents, num_docstrings = [], 0
    processes = min(MAX_PROCESSES, os.cpu_count() or 1) if len(files) >= MIN_POOL_FILES else 1
    # Spawned, because a process that uses jax must not be forked.
    pool = multiprocessing.get_context("spawn").Pool(processes) if processes > 1 else None
    with pool or contextlib.nullcontext():
        results = pool.imap(_read_file, files, chunksize=32) if pool else map(_read_file, files)
        for count, in_file in tqdm.tqdm(results, "reading", len(files), unit="file", disable=None):
            num_docstrings += count
            documents += in_file
    unique = deduplicate(sorted(documents, key=lambda document: (document.module, document.name)))
    return unique, {
        "docstrings": num_docstrings,
        "too_short": num_docstrings - len(documents),
        "duplicates": len(documents) - len(unique),
        "documents": len(unique),
        "pairs": sum(bool(document.body) for document in unique),
    }


def deduplicate(documents: Iterable[Document]) -> list[Document]:
    """The documents whose text and body have not occurred before, as text or as body.

    Texts that differ only in case, digits and white space are equal.
    """
    normalize = lambda text: re.sub(r"\d+", "0", " ".join(text.casefold().split()))
    seen, unique = set(), []
    for document in documents:
        texts = {normalize(text) for text in (document.text, document.body) if text}
        if texts.isdisjoint(seen):
            unique.append(document)
            seen |= texts
    return unique


def split_of(module: str) -> str:
    """The split of a module's documents: a function of the hash of its name."""
    percentiles = [split for split, percent in SPLITS.items() for _ in range(percent)]
    return percentiles[int(hashlib.sha256(module.encode()).hexdigest(), 16) % len(percentiles)]


# The environment to a TFDS dataset.


def installed_distributions(packages: Sequence[str] | None = None) -> dict[str, Distribution]:
    """Name -> distribution, sorted: the named packages, or all except EXCLUDED_PACKAGES.

    Raises ValueError for a name that is not installed.
    """
    # The first distribution of a name is the one that is imported; a broken one has no name.
    installed = {d.name: d for d in reversed(list(distributions())) if d.name}
    if not packages:
        return {name: installed[name] for name in sorted(installed.keys() - EXCLUDED_PACKAGES)}
    if missing := set(packages) - installed.keys():
        name = min(missing)
        raise ValueError(
            f"the package {name!r} for pydocs is not installed; "
            f"install it or name another{lookup.nearest(name, installed)}."
        )
    return {name: installed[name] for name in sorted(set(packages))}


def python_files(packages: Iterable[Distribution]) -> list[tuple[str, str]]:
    """(dotted module, path) of the Python files, sorted, without tests and vendored copies."""
    files = {}
    for package in packages:
        for file in package.files or ():
            parts = file.with_suffix("").parts
            excluded = TEST_FILE.fullmatch(parts[-1]) or EXCLUDED_FOLDERS & set(parts)
            if file.suffix == ".py" and ".." not in parts and not excluded:
                module = ".".join(parts).removesuffix(".__init__")
                files.setdefault(module, str(package.locate_file(file)))
    return sorted(files.items())


class PyDocs(tfds.core.GeneratorBasedBuilder):
    """The TFDS builder of the dataset; call build() to prepare it.

    packages: names of distributions, or None for all.
    """

    name = "pydocs"
    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # nothing to download; TFDS's own search for it needs importlib_resources

    def __init__(self, *, packages: Sequence[str] | None = None, **kwargs: Any):
        self.packages = packages
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {field: tfds.features.Text() for field in Document._fields}
        return tfds.core.DatasetInfo(
            builder=self,
            description="The English of the docstrings in the installed Python packages.",
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        packages = installed_distributions(self.packages)
        documents, counts = _read_documents(python_files(packages.values()))
        splits = {split: [] for split in SPLITS}
        for document in documents:
            splits[split_of(document.module)].append(document)
        if not splits["train"]:
            raise ValueError(f"no prose for train in {list(packages)}; name more packages.")
        self.info.metadata.update(
            asked=sorted(set(self.packages or ())),
            packages={name: package.version for name, package in packages.items()},
            counts=counts,
        )
        return {split: self._generate_examples(rows) for split, rows in splits.items() if rows}

    def _generate_examples(self, documents) -> Iterator[tuple[int, dict[str, str]]]:
        yield from enumerate(document._asdict() for document in documents)


def build(data_dir: str, packages: Sequence[str] | None = None) -> pathlib.Path:
    """Prepare data_dir/pydocs/1.0.0 if it does not exist yet, and return that directory.

    TFDS renames the complete directory. Leftovers of a killed build are removed, so run one build
    at a time. metadata.json records the packages' versions and the counts.
    packages: names of distributions; None or empty for all that are installed.
    Raises ValueError if the directory was built for other packages.
    """
    root = pathlib.Path(data_dir).expanduser().resolve()
    directory = root / PyDocs.name / str(PyDocs.VERSION)
    if (directory / "metadata.json").exists():
        built = json.loads((directory / "metadata.json").read_text())["asked"]
        if built != (requested := sorted(set(packages or ()))):
            raise ValueError(
                f"{directory} was built for packages={built}, not {requested} ([] is all); "
                f"remove it, or choose another data_dir."
            )
        return directory
    for leftover in (directory, *directory.parent.glob("incomplete.*")):
        shutil.rmtree(leftover, ignore_errors=True)
    builder = PyDocs(packages=packages, data_dir=root, file_format="array_record")
    tfds.disable_progress_bar()  # the bar of _read_documents covers most of the time
    # TFDS prints about a download, and creates the directory for it.
    with tempfile.TemporaryDirectory() as unused, contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(download_dir=unused)
    return directory
