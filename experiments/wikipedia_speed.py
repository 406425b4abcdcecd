"""How long does all of Wikipedia take, from dump to corpus? Answer: wikipedia_speed.md.

python -m experiments.wikipedia_speed

Reads, cleans and builds a corpus of the tests' dump, scaled up, and cleans the same pages with
wikiextractor, in turns on one core, timed by processor time. wikiextractor is installed into its
own folder; the error for a missing folder has the command.
"""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from xml.etree import ElementTree

from experiments import records
from lm import sources, tokenizer
from lm.corpus import build, documents
from tests import dump

NAME = "wikipedia_speed"
STRANGER = pathlib.Path(sys.prefix) / "wikiextractor"
VERSION = "3.1.0"
COPIES = 60  # of the dump's pages
ARTICLES = 7_000_000
WORKERS = (1, 8, 64)
PIECES = 500  # the most that its texts allow
COMMON = re.compile(r"\b(the|a|of|is|and|in|to|it|has|on)\b")
READ, CLEAN, STRANGE = "reading the dump (bz2)", "page to prose", "wikiextractor's cleaning"
WHOLE, SERIAL = "dump to corpus", "dump to corpus: what one process does for all"


def stranger() -> Callable[[str], object]:
    """wikiextractor's cleaning of a wikitext, with --no-templates."""
    if not STRANGER.is_dir():
        raise ValueError(
            f"{STRANGER} does not exist; make it with `{sys.executable} -m pip install "
            f"--target {STRANGER} wikiextractor=={VERSION}`."
        )
    sys.path.append(str(STRANGER))
    from wikiextractor import extract

    def clean(text: str):
        return extract.Extractor(1, 1, "", "Title", []).clean_text(
            text, expand_templates=False, html_safe=False
        )

    return clean


def timed(run: Callable[[], object]) -> float:
    """Seconds of processor time."""
    start = time.process_time()
    run()
    return time.process_time() - start


def varied_pages() -> list[dump.Page]:
    """COPIES variants of the dump's pages with other words, so that few are near duplicates."""

    def other(page: dump.Page, copy: int) -> dump.Page:
        own = "".join("abcdefghij"[int(digit)] for digit in str(copy))
        return page._replace(text=COMMON.sub(rf"\1{own}", page.text))

    return [other(page, copy) for copy in range(COPIES) for page in dump.PAGES]


def jobs(path: pathlib.Path) -> tuple[dict[str, Callable[[], object]], int, int]:
    """({row of the table: function to time}, number of pages, bytes of their XML)."""
    (part,) = sources.list_files(str(path))
    raw = list(part.raw_records())
    # Both clean the same pages of a dump: all articles, no redirects.
    articles = [r for r in raw if part.document(r).drop_reason in ("", "empty")]
    texts = [ElementTree.fromstring(r["page"]).findtext("revision/text") for r in articles]
    clean = stranger()
    prose = [part.document(r).text for r in articles]
    tokens, out = path.with_name("tokenizer"), path.with_name("corpus")
    tokenizer.train(prose, tokens, vocab_size=PIECES)
    recipe = documents.CorpusConfig(source=str(path), tokenizer=str(tokens), rules="none", shards=2)

    def corpus(workers: int) -> None:
        manifest, _ = build.build(recipe, out, workers)
        shutil.rmtree(out)
        kept = sum(counts["text_bytes"] for counts in manifest["splits"].values())
        if kept < 0.95 * sum(len(text.encode()) for text in prose):
            raise ValueError("too many of the pages are duplicates; vary them more.")

    made = {
        READ: lambda: sum(1 for _ in part.raw_records()),
        CLEAN: lambda: [part.document(r) for r in articles],
        STRANGE: lambda: [clean(text) for text in texts],
        WHOLE: lambda: corpus(1),
        SERIAL: lambda: corpus(2),  # excludes the time of worker processes
    }
    return made, len(articles), sum(len(r["page"]) for r in articles)


def rows(repeats: int) -> list[dict]:
    """Pages and megabytes a second of every job, medians over the repeats."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "mini.xml.bz2"
        dump.write_dump(path, pages=varied_pages())
        made, pages, size = jobs(path)
        seconds = {name: [] for name in made}
        for repeat in range(repeats + 1):
            for name, run in made.items():
                spent = timed(run)
                if repeat:  # the first round only warms up
                    seconds[name].append(spent)
    return [
        dict(
            job=name,
            pages=pages,
            bytes=size,
            pages_per_second=pages / statistics.median(spent),
            megabytes_per_second=size / statistics.median(spent) / 1e6,
            seconds=spent,
        )
        for name, spent in seconds.items()
    ]


def table(found: list[dict]) -> list[str]:
    """The page's tables: speeds, and the estimated hours of a whole Wikipedia.

    The work is divided among the workers, but for that of the one process that feeds them.
    """
    lines = ["| on one core | pages/s | MB of XML/s |", "| --- | --- | --- |"]
    for row in found:
        cells = [f"{row['pages_per_second']:,.0f}", f"{row['megabytes_per_second']:.1f}"]
        lines.append(f"| {' | '.join([row['job'], *cells])} |")
    seconds = {row["job"]: row["bytes"] / row["megabytes_per_second"] / 1e6 for row in found}
    size, count = found[0]["bytes"], found[0]["pages"]
    mean = size / count / 1e3
    lines += [
        "",
        f"| workers | at least: hours for {ARTICLES:,} pages of {mean:.1f} kB | for S GB of XML |",
    ]
    lines += ["| --- | --- | --- |"]
    for workers in WORKERS:
        hours = max(seconds[SERIAL], seconds[WHOLE] / workers) / 3600
        lines.append(f"| {workers} | {hours * ARTICLES / count:.3g} | {hours * 1e9 / size:.2g} S |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Measures, and saves and prints the tables."""
    parser = records.parser(NAME, __doc__)
    parser.add_argument("--repeats", type=int, default=7)
    flags = parser.parse_args(arguments)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    stamp = records.stamp()
    stamp["versions"] |= {"wikiextractor": VERSION}
    stamp["versions"] |= {
        name: importlib.metadata.version(name) for name in ("mwparserfromhell", "pyarrow")
    }
    found = records.save(flags.out, NAME, [row | stamp for row in rows(flags.repeats)])
    lines = "\n".join(table(found))
    records.put_table(flags.out, NAME, lines)
    print(lines)


if __name__ == "__main__":
    main()
