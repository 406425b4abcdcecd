"""The command `python -m lm preflight`."""

from __future__ import annotations

import json
import os
from typing import Any

from lm import runs
from lm.preflight import advice, compiler, report, slices


def preflight(flags: dict[str, Any]) -> int:
    """Prints the report of --config on --slice; returns 1 if the run does not fit, else 0.

    flags: values by name. Raises: ValueError for a user error.
    """
    target = slices.parse_target(flags["slice"])
    if target:  # use no device of this machine
        os.environ["JAX_PLATFORMS"] = "cpu"
    workdir = flags["workdir"] or compiler.NO_WORKDIR
    run = runs.make_run(flags["config"].to_dict(), workdir)
    label = f"compiling {run.name} for {flags['slice']}"
    label += ", layer by layer (--config.model.scan_layers=True is faster)" * advice.is_slow(run)
    compiled = compiler.compile_for(run.config_dict, target, workdir, label=label)
    summary = report.summarize(run, compiled, flags["price"])
    if not flags["json"]:
        print(report.text(summary), flush=True)  # advice takes minutes
    if compiled.fits is False and target and target.chip.name in slices.CHIPS:
        trials = advice.advise(run, target)
        summary["advice"] = [report.advice_row(trial) for trial in trials]
        if not flags["json"]:
            print("\n" + report.advice_text(target.name, summary["advice"]))
    if flags["json"]:
        print(json.dumps(summary))
    return int(compiled.fits is False)
