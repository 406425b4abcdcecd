"""Tests of the embedded dataset."""

from __future__ import annotations

import collections
import hashlib
import json
import pathlib
import signal
import subprocess
import sys

import pytest

from lm import sources
from lm.sources import pydocs

SUMMARY = "Return the nearest of the points that were given."
BODY = (
    "The points are searched one after the other, so that the cost of a call grows with their "
    "number; a tree would be faster where there are more than a few thousand of them."
)
GOOGLE = (
    SUMMARY
    + """

Works for any metric; see :class:`~geometry.Metric` and `the book <https://x.org>`_ [1]_.

Args:
  points (list of Point): The points to search, which
    may be empty.
  metric: How far two points are, as a function
    of both of them.

Returns:
  The nearest point, or ``None`` if there is no point at all.

Example:
  This sentence belongs to an example and is not to be read.

>>> nearest([1, 2], 3)
This line is what the doctest prints, and not prose.

Ties go to the *first* of the points.
""",
    """Works for any metric; see geometry.Metric and the book.
points: The points to search, which may be empty.
metric: How far two points are, as a function of both of them.
The nearest point, or None if there is no point at all.
Ties go to the first of the points.""",
)
NUMPY = (
    SUMMARY
    + """

Parameters
----------
points : array_like, of shape (n, 2)
    The points to search, which may be empty.
metric, scale : callable
    How far two points are, as a function of both of them.

Returns
-------
int
    The index of the nearest of the points.

See Also
--------
farthest : The opposite of what this function does.

Notes
-----
.. math::

    this is a formula in the words of mathematics

.. note:: Ties go to the first of the points.

References
----------
.. [1] A book that is not to be read here.
""",
    """points: The points to search, which may be empty.
metric, scale: How far two points are, as a function of both of them.
The index of the nearest of the points.
Ties go to the first of the points.""",
)
SPHINX = (
    SUMMARY
    + """

- The points may be
  in any order at all.
- Ties go to the first of the points.

:param points: The points to search, which
    may be empty.
:param int count: How many of the points to return.
:returns: The nearest of the points.
:rtype: int
""",
    """The points may be in any order at all.
Ties go to the first of the points.
points: The points to search, which may be empty.
count: How many of the points to return.
The nearest of the points.""",
)


def module(*docstrings: str) -> str:
    """The source of a module of functions with these docstrings."""
    return "".join(f'def f{i}():\n    """{text}"""\n' for i, text in enumerate(docstrings))


def install(site: pathlib.Path, name: str, files: dict[str, str | bytes]) -> None:
    """Install a package with these files (path -> source) where importlib.metadata finds it."""
    for path, source in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_bytes(source if isinstance(source, bytes) else source.encode())
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in files))


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Two packages of 40 modules with duplicate docstrings, and one without docstrings."""
    folder = tmp_path / "site"
    for name in ("alpha", "beta"):
        files = {
            f"{name}/m{i}.py": module(
                f"Explain what only the module {'x' * (i + 1)} of {name} has to say here.",
                f"{SUMMARY}\n\n{BODY} The word of module {'y' * (i % 20 + 1)}.",
                f"{SUMMARY} It is the same in module {i}, and in all other modules too.",
            )
            for i in range(40)
        }
        install(folder, name, files)
    install(folder, "hollow", {"hollow.py": "x = 1\n"})
    monkeypatch.syspath_prepend(folder)
    return folder


def records(directory: pathlib.Path) -> dict[str, list[dict[str, str]]]:
    root = directory.parents[1]
    splits = {split: sources.tfds_records("pydocs", split, root) for split in pydocs.SPLITS}
    return {split: [rows[i] for i in range(len(rows))] for split, rows in splits.items()}


def digest(directory: pathlib.Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}


@pytest.mark.parametrize(
    "text",
    [
        SUMMARY,
        BODY,
        "Cross-correlate two N-dimensional arrays.",
        'the axis along which the "mean" is taken (by default the last)',
    ],
)
def test_prose_passes_every_rule(text):
    assert pydocs.is_prose(text)


@pytest.mark.parametrize(
    "text, rule",
    [
        ("Returns the shape.", pydocs.is_long),
        ("x[i] = y[i] * 2 + self.scale(z) for the i.", pydocs.is_wordy),
        ("array-like, optional, shape parameter", pydocs.is_english),
        ("Berechnet den Mittelwert entlang einer Achse", pydocs.is_english),
        ("This is how it is called from the shell:", pydocs.is_complete),
    ],
)
def test_each_rule_rejects_its_own_example_alone(text, rule):
    rules = (pydocs.is_long, pydocs.is_wordy, pydocs.is_english, pydocs.is_complete)
    assert [broken for broken in rules if not broken(text)] == [rule]
    assert not pydocs.is_prose(text)


@pytest.mark.parametrize("docstring, prose", [GOOGLE, NUMPY, SPHINX])
def test_every_docstring_style_gives_its_prose(docstring, prose):
    actual = [text for text in pydocs.split_paragraphs(docstring) if pydocs.is_prose(text)]
    assert actual == [SUMMARY, *prose.splitlines()]


HIDDEN = "What is here reads like a sentence of prose."


@pytest.mark.parametrize(
    "hiding",
    [
        f"```\n{HIDDEN}\n\n{HIDDEN}\n```",
        f">>> nearest()\n{HIDDEN}",
        f"::\n\n  {HIDDEN}\n\n    {HIDDEN}",
        f".. code-block:: python\n\n  {HIDDEN}",
        f".. {HIDDEN}\n   {HIDDEN}",
        f"Examples\n--------\n{HIDDEN}\n\n  {HIDDEN}\n\nNotes\n-----",
        f"Usage:\n  {HIDDEN}\n\n  {HIDDEN}",
        f"+-----+\n| {HIDDEN} |\n+-----+",
        f"axis   {HIDDEN}",
    ],
)
def test_other_blocks_are_left_out_and_the_text_after_them_is_read(hiding):
    paragraphs = pydocs.split_paragraphs(f"{SUMMARY}\n\n{hiding}\n\n{BODY}")
    assert [text for text in paragraphs if pydocs.is_prose(text)] == [SUMMARY, BODY]


def test_an_indented_line_continues_a_sentence_until_its_full_stop():
    docstring = f"The order of the lines is that of\n  the points.\n\n{SUMMARY}\n  {BODY}"
    first = "The order of the lines is that of the points."
    assert pydocs.split_paragraphs(docstring) == [first, SUMMARY, BODY]


@pytest.mark.parametrize(
    "marked, plain",
    [
        ("see :func:`numpy.mean` and :meth:`.close`", "see numpy.mean and close"),
        ("``x`` is **not** `y`_, *but* z", "x is not y, but z"),
        ("the [guide](https://x.org/a) of <b>all</b>", "the guide of all"),
        ("takes *args and **kwargs", "takes *args and **kwargs"),
        (r"two  spaces and \*args", "two spaces and *args"),
    ],
)
def test_markup_is_removed_and_words_are_kept(marked, plain):
    assert pydocs.strip_markup(marked) == plain


def test_a_line_of_running_text_that_looks_like_an_item_does_not_split_it():
    text = "The order of the lines is this\none: it follows from the name, and only from it."
    assert pydocs.split_paragraphs(text) == [text.replace("\n", " ")]


def test_a_pair_is_a_summary_sentence_and_the_body_after_it():
    document = pydocs.make_document("m", "m.f", f"{SUMMARY}\n\n{BODY}\n\n    x = f(1)\n\n{BODY}")
    assert document == ("m", "m.f", f"{BODY}\n\n{BODY}", SUMMARY, f"{SUMMARY}\n\n{BODY}\n\n{BODY}")


@pytest.mark.parametrize(
    "docstring",
    [
        f"{SUMMARY} It has more.\n\n{BODY}",  # two sentences
        f"{SUMMARY[:-1]}{' and so on' * 8}.\n\n{BODY}",  # more than thirty words
        f"{SUMMARY}\n\nThe points are searched one after the other.",  # too little to sum up
        f"{SUMMARY}\n\n{BODY} {SUMMARY.lower()}",  # the body contains the summary
        f"nearest(points)\n\n{SUMMARY}\n\n{BODY}",  # not what the docstring begins with
    ],
)
def test_prose_without_a_summary_is_a_document_without_a_pair(docstring):
    document = pydocs.make_document("m", "m.f", docstring)
    assert (document.body, document.summary) == ("", "")
    assert SUMMARY[:-1] in document.text


def test_every_definition_has_its_dotted_name():
    source = f'"""{SUMMARY}"""\nclass A:\n "{SUMMARY}"\n async def f(): "{SUMMARY}"\n'
    count, documents = pydocs.parse_documents("p.m", source.encode())
    assert (count, [document.name for document in documents]) == (3, ["p.m", "p.m.A", "p.m.A.f"])
    assert {document.module for document in documents} == {"p.m"}


@pytest.mark.parametrize(
    "source",
    [
        b'"""unclosed',
        b'# coding: no-such-code\n"""text"""',
        b'"""\xff\xfe"""',
        b'"""nul \x00"""',
        b'"""' + b"-" * 9 + b'"""\nx = ' + b"-" * 100_000 + b"1",
        b"",
    ],
    ids=["syntax", "coding", "bytes", "nul", "depth", "empty"],
)
def test_a_file_that_does_not_parse_is_skipped(source):
    assert pydocs.parse_documents("m", source) == (0, [])


def test_unpaired_surrogates_are_removed():
    (document,) = pydocs.parse_documents(
        "m", rf'"""{SUMMARY[:-1]} \ud800 in the plane."""'.encode()
    )[1]
    assert document.text.encode() and document.text.endswith("given in the plane.")


def test_the_first_of_texts_equal_up_to_case_and_digits_is_kept():
    def document(name, text, body=""):
        return pydocs.Document("m", name, body, "", text)

    first = document("a", "Point 1 of the\nplane.", "the body of it")
    equal_text = document("b", "point 22 of  the plane.", "another body")
    equal_body = document("c", "Another text.", "The BODY of it")
    text_equals_body = document("d", "The body of it")
    distinct = document("e", "A third text.", "another body")
    documents = [first, equal_text, equal_body, text_equals_body, distinct]
    assert pydocs.deduplicate(documents) == [first, distinct]


def test_modules_are_split_in_the_stated_shares():
    counts = collections.Counter(pydocs.split_of(f"package.module{i}") for i in range(20_000))
    for split, percent in pydocs.SPLITS.items():
        assert abs(counts[split] / 200 - percent) < 1
    assert sum(pydocs.SPLITS.values()) == 100


def test_no_text_and_no_body_is_in_two_splits(site, tmp_path):
    splits = records(pydocs.build(tmp_path / "data", ["alpha", "beta"]))
    texts = [record["text"] for records in splits.values() for record in records]
    bodies = [r["body"] for records in splits.values() for r in records if r["body"]]
    assert len(texts) == len(set(texts)) == 80 + 20 + 1
    assert len(bodies) == len(set(bodies)) == 20
    for split, rows in splits.items():
        assert rows and {pydocs.split_of(record["module"]) for record in rows} == {split}


def test_the_number_of_processes_does_not_change_the_bytes(site, tmp_path, monkeypatch):
    serial = pydocs.build(tmp_path / "one", ["alpha", "beta"])
    monkeypatch.setattr(pydocs, "MIN_POOL_FILES", 1)
    monkeypatch.setattr(pydocs, "MAX_PROCESSES", 2)
    parallel = pydocs.build(tmp_path / "two", ["beta", "alpha", "beta"])
    assert digest(serial) == digest(parallel)
    assert len(digest(serial)) == 3 + len(pydocs.SPLITS)


def test_the_metadata_counts_records_read_and_dropped(site, tmp_path):
    directory = pydocs.build(tmp_path / "data", ["beta", "alpha"])
    metadata = json.loads((directory / "metadata.json").read_text())
    assert metadata["packages"] == {"alpha": "1.0", "beta": "1.0"}
    counts = metadata["counts"]
    assert counts["docstrings"] == 240
    assert counts["docstrings"] - counts["too_short"] - counts["duplicates"] == counts["documents"]
    assert counts["documents"] == sum(map(len, records(directory).values()))
    assert counts["pairs"] == 20


def test_a_finished_build_is_reused_and_other_packages_are_refused(site, tmp_path, capsys):
    directory = pydocs.build(tmp_path, ["alpha"])
    assert capsys.readouterr().out == ""
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert pydocs.build(tmp_path, ["alpha"]) == directory
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    with pytest.raises(ValueError, match=r"built for packages=\['alpha'\], not \[\] .*remove it"):
        pydocs.build(tmp_path)


def test_a_killed_build_reads_as_missing_and_the_next_build_cleans_up(site, tmp_path):
    code = (
        "import os, signal\nfrom lm.sources import pydocs\n"
        "def die(self, documents):\n"
        "    yield 0, documents[0]._asdict()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "pydocs.PyDocs._generate_examples = die\n"
        f"pydocs.build({str(tmp_path)!r}, ['alpha'])\n"
    )
    root = pathlib.Path(__file__).parents[1]
    path = {"PYTHONPATH": f"{root}:{site}", "HOME": str(tmp_path)}
    process = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True)
    assert process.returncode == -signal.SIGKILL
    (leftover,) = (tmp_path / "pydocs").iterdir()
    assert leftover.name.startswith("incomplete.")
    with pytest.raises(ValueError, match="pydocs is not in"):
        sources.tfds_splits("pydocs", tmp_path)
    directory = pydocs.build(tmp_path, ["alpha"])
    assert list((tmp_path / "pydocs").iterdir()) == [directory]
    assert sources.tfds_splits("pydocs", tmp_path)["train"] > 0


def test_unusable_packages_are_named(site, tmp_path):
    with pytest.raises(ValueError, match="'alpa' for pydocs is not installed.*mean 'alpha'"):
        pydocs.build(tmp_path, ["alpa"])
    with pytest.raises(ValueError, match=r"no prose for train in \['hollow'\]"):
        pydocs.build(tmp_path, ["hollow"])
    assert not list(tmp_path.glob("pydocs/*"))


def test_tests_vendored_copies_and_this_package_are_excluded(site):
    included = ["gamma/__init__.py", "gamma/testing.py", "gamma_top.py"]
    excluded = [
        "gamma/tests/a.py",
        "gamma/_vendor/b.py",
        "gamma/test_c.py",
        "gamma/d_test.py",
        "gamma/conftest.py",
        "gamma/data.txt",
        "../bin/tool.py",
    ]
    install(site, "gamma", dict.fromkeys(included + excluded, ""))
    install(site, "setuptools", {"setuptools_copy.py": ""})
    files = pydocs.python_files(pydocs.installed_distributions(["gamma"]).values())
    assert [name for name, _ in files] == ["gamma", "gamma.testing", "gamma_top"]
    assert all(pathlib.Path(path).is_file() for _, path in files)
    distributions = pydocs.installed_distributions()
    assert {"alpha", "gamma", "numpy"} <= distributions.keys()
    assert not {"lm", "setuptools", "torch"} & distributions.keys()


def test_real_packages_give_prose_and_pairs(tmp_path):
    directory = pydocs.build(tmp_path, ["optax"])
    counts = json.loads((directory / "metadata.json").read_text())["counts"]
    assert counts["documents"] > 300 and counts["pairs"] > 100
