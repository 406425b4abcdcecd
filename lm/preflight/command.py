"""What `python -m lm preflight` does."""

from __future__ import annotations

import json
import os
from typing import Any

from lm import run
from lm.preflight import compiler, page, search, slices


def preflight(given: dict[str, Any]) -> int:
    """Print the report of --config on --slice, or with --search the ranking; 1 if nothing fits.

    given: the flags' values by name. Raises ValueError for a user's mistake.
    """
    target = slices.target_named(given["slice"])
    if target:  # this process only asks; a device that is here stays free
        os.environ["JAX_PLATFORMS"] = "cpu"
    chips = target if target and target.chip.name in slices.CHIPS else None
    place = given["workdir"] or compiler.NOWHERE
    this = run.make_run(given["config"].to_dict(), place)
    if given["search"]:
        return _search(this, chips, given)
    label = f"compiling {this.name} for {given['slice']}"
    label += ", layer by layer (--config.model.layers=scanned is quicker)" * search.slow(this)
    compiled = compiler.compile_for(this.config, target, place, label=label)
    facts, refused = page.facts(this, compiled, given["price"]), compiled.fits is False
    if not given["json"]:
        print(page.text(facts), flush=True)  # advice takes minutes
    if refused and chips:
        facts["advice"] = page.advised(search.advice(this, chips, compiled))
    if given["json"]:
        print(json.dumps(facts))
    elif facts["advice"]:
        print("\n" + page.advice_text(facts["advice"]))
    return int(refused)


def _search(this: run.Run, chips: slices.Slice | None, given: dict) -> int:
    if chips is None:
        raise ValueError(f"--search ranks layouts of TPU slices; --slice={given['slice']} is none.")
    trials = search.search(this, chips)
    as_json = json.dumps(page.ranking(chips, trials))
    print(as_json if given["json"] else page.ranked(chips, trials))
    return int(not trials[0].fits)
