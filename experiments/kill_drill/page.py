"""The page of a drill: verdict, table, controls and kinds."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

HEAD = ("kind", "trials", "faults", "ended right", "updates lost", "seconds to resume", "to stop")


def spread(values: list[float], digits: int = 0) -> str:
    """Median and 95th percentile, as "4 / 6"; empty for no values."""
    if not values:
        return ""
    ordered = sorted(values)
    at = lambda share: ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]
    return f"{at(0.5):.{digits}f} / {at(0.95):.{digits}f}"


def gathered(rows: list[dict], key: str) -> list[float]:
    """All values of a list-valued key, over all trials."""
    return [value for row in rows for value in row.get(key, [])]


def line(kind: str, rows: list[dict]) -> tuple[str, ...]:
    """The table's line for one kind."""
    right = sum(row["right"] for row in rows)
    lost, back = gathered(rows, "lost"), gathered(rows, "resume_seconds")
    stopped = spread(gathered(rows, "stop_seconds"), 1)
    counts = (len(rows), sum(row["faults"] for row in rows), f"{right} of {len(rows)}")
    return kind, *map(str, counts), spread(lost), spread(back, 1), stopped


def table(rows: list[dict]) -> str:
    """A line for each kind and one for all; lost, resumed, stopped as median / 95th percentile."""
    kinds = dict.fromkeys(row["kind"] for row in rows)
    lines = [line(kind, [row for row in rows if row["kind"] == kind]) for kind in kinds]
    cells = [HEAD, ("---",) * len(HEAD), *lines, line("**all**", rows)]
    return "\n".join(f"| {' | '.join(words)} |" for words in cells)


def sums(rows: list[dict]) -> dict[str, int]:
    """Counts over all trials; "silent" and "wrong" must be 0."""
    faults = lambda kinds: sum(row["faults"] for row in rows if row["kind"] in kinds)
    found = [one for row in rows for one in row.get("found", [])]
    compared = [row for row in rows if row.get("identical") is not None]
    return {
        "kills": faults(("kill", "point", "export")),
        "compared": len(compared),
        "identical": sum(row["identical"] for row in compared),
        "damaged": sum(one["fault"] != "" for one in found),
        "silent": sum(one["wrong"] == "silent" for one in found),
        "wrong": sum(not row["right"] for row in rows),
    }


def page(about: dict, rows: list[dict], controls: dict[str, bool], kinds: dict[str, Callable]):
    """Returns the page: command, verdict, table, controls, and a description of each kind."""
    told = sums(rows)
    verdict = (
        f"{told['kills']} SIGKILLs; {told['identical']} of {told['compared']} runs ended with the "
        f"bits, the log and the folder of the run that nothing happened to. {told['damaged']} "
        f"damaged checkpoints; {told['silent']} restored wrong without a word. {told['wrong']} "
        f"trials broke a law."
    )
    words = " ".join(f"{key} {value};" for key, value in about.items()).removesuffix(";")
    held = [f"- {what}: {'yes' if is_held else '**no**'}" for what, is_held in controls.items()]
    described = [
        f"- `{kind}`: {' '.join(inspect.getdoc(of).split())}" for kind, of in kinds.items()
    ]
    wrong = [f"- {row['kind']} {row['number']}: {row['wrong']}" for row in rows if not row["right"]]
    parts = [
        "# Is a run that was killed, signalled or damaged the run that never was?",
        f"`make drill`: {words}.",
        verdict,
        table(rows),
        "Lost, resumed and stopped: median / 95th percentile. A run is 30 updates with a "
        "checkpoint every 4; lost are updates that the log told of and that were taken again. To "
        "resume: from the start of the process to its first row; to stop: from the signal to the "
        "end, both in seconds.",
        "## Control arms\n\n" + "\n".join(held),
        "## Kinds\n\n" + "\n".join(described),
        *(["## Broken\n\n" + "\n".join(wrong)] if wrong else []),
    ]
    return "\n\n".join(parts) + "\n"
