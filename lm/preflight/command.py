"""What `python -m lm preflight` does."""

from __future__ import annotations

import json
import os
from typing import Any

from lm import runs
from lm.preflight import compiler, report, search, slices


def preflight(given: dict[str, Any]) -> int:
    """Print the report of --config on --slice, or with --search the ranking; 1 if nothing fits.

    given: the flags' values by name. Raises ValueError for a user's mistake.
    """
    target = slices.target_named(given["slice"])
    if target:  # this process only asks; a device that is here stays free
        os.environ["JAX_PLATFORMS"] = "cpu"
    chips = target if target and target.chip.name in slices.CHIPS else None
    place = given["workdir"] or compiler.NOWHERE
    run = runs.make_run(given["config"].to_dict(), place)
    if given["search"]:
        return _search(run, chips, given)
    label = f"compiling {run.name} for {given['slice']}"
    label += ", layer by layer (--config.model.layers=scanned is quicker)" * search.slow(run)
    compiled = compiler.compile_for(run.config, target, place, label=label)
    facts, refused = report.facts(run, compiled, given["price"]), compiled.fits is False
    if not given["json"]:
        print(report.text(facts), flush=True)  # advice takes minutes
    if refused and chips:
        facts["advice"] = report.advised(search.advice(run, chips, compiled))
    if given["json"]:
        print(json.dumps(facts))
    elif facts["advice"]:
        print("\n" + report.advice_text(facts["advice"]))
    return int(refused)


def _search(run: runs.Run, chips: slices.Slice | None, given: dict) -> int:
    if chips is None:
        raise ValueError(f"--search ranks layouts of TPU slices; --slice={given['slice']} is none.")
    trials = search.search(run, chips)
    as_json = json.dumps(report.ranking(chips, trials))
    print(as_json if given["json"] else report.ranked(chips, trials))
    return int(not trials[0].fits)
