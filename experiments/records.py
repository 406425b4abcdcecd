"""Shared by the benchmarks: flags, provenance, the record (.jsonl) and the page (.md)."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
from collections.abc import Callable, Sequence

from lm import logs

HERE = pathlib.Path(__file__).parent


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with the flag --out, the folder of record and page."""
    form = argparse.RawDescriptionHelpFormatter
    flags = argparse.ArgumentParser(
        prog=f"python -m experiments.{name}", description=description, formatter_class=form
    )
    flags.add_argument("--out", type=pathlib.Path, default=HERE, help="folder of record and page")
    return flags


def words(text: str) -> list[str]:
    """Splits a flag's value at commas."""
    return text.split(",")


def stamp() -> dict:
    """Date, commit, versions and machine of a measurement."""
    where = dict(machine=platform.machine(), cores=os.cpu_count(), load=os.getloadavg()[0])
    return (
        dict(date=str(datetime.date.today()), commit=logs.commit(), versions=logs.versions())
        | where
    )


def read(out: pathlib.Path, name: str) -> list[dict]:
    """The rows of a record; [] if it does not exist."""
    return logs.read(out / f"{name}.jsonl")


def save(out: pathlib.Path, name: str, rows: list[dict], group: Callable = lambda row: 0) -> list:
    """Replaces the recorded rows of the same groups by rows, sorts by group; returns all rows."""
    groups = {group(row) for row in rows}
    kept = [row for row in read(out, name) if group(row) not in groups]
    rows = sorted([*kept, *rows], key=group)
    out.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    logs.write_atomically(out / f"{name}.jsonl", lines)
    return rows


def put_table(out: pathlib.Path, name: str, table: str, mark: str = "table") -> None:
    """Replaces the page's text between <!-- mark --> and <!-- end of mark -->."""
    page, start, end = out / f"{name}.md", f"<!-- {mark} -->\n", f"<!-- end of {mark} -->\n"
    text = page.read_text() if page.exists() else start + end
    before, _, after = text.partition(start)
    logs.write_atomically(page, before + start + table + "\n" + end + after.partition(end)[2])


def markdown(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)
