"""The report of a preflight: numbers for programs, and the same as a page of text."""

from __future__ import annotations

import math
from typing import Any

from lm import runs
from lm.preflight import compiler, program, roofline, search, slices

MEMORY = {  # the rows of the page, by key of facts()["memory"]
    "params": "parameters",
    "optimizer": "optimizer state",
    "average": "running average",
    "teacher": "teacher",
    "batch": "batch",
    "gradients": "gradients",
    "activations": "activations and workspace",
    "code": "program",
    "padding": "padding of buffers",
}


def facts(run: runs.Run, compiled: compiler.Compiled, price: float | None = None) -> dict[str, Any]:
    """The report as JSON: bytes, seconds and FLOPs; those of memory and traffic are a chip's.

    price: of a chip for an hour. "step" and "run" are None where the program is not known, "run"
    also where only the data tell how many updates there are, and a time where the speed is not;
    "advice" until there is some.
    """
    made = {
        "target": compiled.target,
        "device": compiled.chip.device_kind,
        "chips": compiled.chips,
        "hosts": compiled.hosts,
        "parallel": run.config["parallel"],
        "fits": compiled.fits,
        "error": compiled.error,
        "memory": memory(compiled),
        "flops": {"model": compiled.model_flops, "executed": compiled.executed_flops},
        "traffic": {"memory": compiled.memory_bytes, **compiled.collectives},
        "compile_seconds": compiled.seconds,
        "step": None,
        "run": None,
        "hints": hints(run, compiled),
        "advice": None,
    }
    if compiled.memory_bytes:
        made |= _times(run, compiled, price)
    return made


def memory(compiled: compiler.Compiled) -> dict[str, int]:
    """Bytes of a chip by kind, of which all but the last two add up to "needed"; "chip" has them.

    What is not known from shapes is 0 where the program did not compile.
    """
    kinds = dict(compiled.sizes)
    if compiled.workspace or compiled.code:
        kinds["gradients"] = min(compiled.sizes["gradients"], compiled.workspace)
        kinds["activations"], kinds["code"] = compiled.activations, compiled.code
        kinds["padding"] = compiled.needed - sum(kinds.values())
    return kinds | {"needed": compiled.needed, "chip": compiled.chip.memory}


def _times(run: runs.Run, compiled: compiler.Compiled, price: float | None) -> dict[str, dict]:
    prediction, updates = compiled.prediction, program.total_updates(run)
    tokens, chip = runs.pace(run, 0).tokens, compiled.chip
    plan = roofline.plan(
        prediction,
        chip,
        chips=compiled.chips,
        model_flops=compiled.model_flops,
        tokens=tokens,
        updates=updates,
        price=price,
    )
    step = {
        "compute_seconds": prediction.compute_s,
        "memory_seconds": prediction.memory_s if math.isfinite(chip.bandwidth) else None,
        "network_seconds": prediction.network_s if math.isfinite(chip.network) else None,
        "seconds": plan.step_s,
        "bound": prediction.bound,
        "mfu": plan.mfu,
        "tokens": tokens,
        "tokens_per_day": plan.tokens_per_day,
    }
    whole = {
        "updates": updates,
        "tokens": tokens * updates,
        "days": plan.days,
        "chip_hours": plan.chip_hours,
        "price": price,
        "cost": plan.cost,
    }
    return {"step": step, "run": whole if updates else None}


def advised(advice: search.Advice) -> dict[str, Any]:
    """The changes that fit, as JSON; here: on the slice itself."""
    changes = [
        {"slice": one.slice, "flags": list(one.flags), "compiled": one.proven, "peak": one.peak}
        | {"step_seconds": one.step_s or None}
        for one in advice.trials
    ]
    return {"here": advice.here, "changes": changes}


def hints(run: runs.Run, compiled: compiler.Compiled) -> list[str]:
    """What of the config an accelerator would like otherwise, each a sentence with its flag."""
    said = []
    if search.slow(run):
        said.append(
            "the layers are compiled one by one; --config.model.layers=scanned compiles in "
            "constant time, and trains the same parameters."
        )
    if run.model.dtype == "float32" and compiled.chip.device_kind != "cpu":
        said.append("activations are float32; --config.model.dtype=bfloat16 halves them.")
    if compiled.unknown_loops:
        said.append(f"{compiled.unknown_loops} loops have no known length and were counted once.")
    return said


def text(found: dict[str, Any]) -> str:
    """The page of facts()."""
    shown = {True: "fits", False: "does not fit", None: "is not refused by what shapes tell"}
    head = f"{found['target']}: {found['chips']} x {found['device']}, {found['hosts']} host"
    said = [head + ("s" if found["hosts"] > 1 else "") + f"; the run {shown[found['fits']]}."]
    if found["error"]:
        said.append(found["error"])
    said += ["", *_memory_rows(found), "", *_work_rows(found)]
    if found["step"]:
        said += ["", *_time_rows(found["step"], found["run"])]
    said += [f"hint: {one}" for one in found["hints"]]
    return "\n".join(said)


def _row(name: str, value: str, note: str = "") -> str:
    return f"  {name:<26} {value:>14}  {note}".rstrip()


def _memory_rows(found: dict) -> list[str]:
    kinds, whole = found["memory"], found["fits"] is not None and not found["error"]
    rows = ["memory of a chip, GiB"]
    rows += [_row(MEMORY[key], _gib(kinds[key])) for key in MEMORY if kinds.get(key)]
    if "activations" not in kinds:
        unknown = (
            "unknown: only the compiler can tell" if found["error"] else "unknown: not compiled"
        )
        rows.append(_row(MEMORY["activations"], "?", unknown))
    at_most = "" if whole else "at least"
    share = f"{kinds['needed'] / kinds['chip']:.1%} of the chip's {_gib(kinds['chip'])}"
    return [*rows, _row("peak", _gib(kinds["needed"]), f"{at_most} {share}".strip())]


def _work_rows(found: dict) -> list[str]:
    flops, moved = found["flops"], found["traffic"]
    rows = ["an update", _row("model FLOPs", f"{flops['model']:.4g}", "of all chips")]
    if flops["executed"]:
        share = f"{flops['executed'] / flops['model']:.3f} times the model's"
        rows.append(_row("executed FLOPs", f"{flops['executed']:.4g}", share))
    if moved["memory"]:
        rows.append(_row("bytes to and from memory", f"{moved['memory']:.4g}", "of a chip"))
    for kind, sent in moved.items():
        if kind != "memory":
            rows.append(_row(kind, f"{sent:.4g}", "bytes that a chip sends"))
    return rows


def _time_rows(step: dict, whole: dict | None) -> list[str]:
    rows = ["at best, by roofline (a bound from below: a real step is slower)"]
    for key in ("compute", "memory", "network"):
        known = step[f"{key}_seconds"]
        cells = ("?", "no speed is known") if known is None else (f"{1e3 * known:.3f}",)
        rows.append(_row(f"{key}, ms", *cells))
    rows.append(_row("step, ms", f"{1e3 * step['seconds']:.3f}", f"bound by {step['bound']}"))
    rows.append(_row("MFU", f"{step['mfu']:.1%}", "model FLOPs over the chips' peak"))
    rows.append(_row("tokens a day", f"{step['tokens_per_day']:.4g}", "padding counted"))
    if whole is None:
        note = "its epochs are counted in the data; --config.steps=... says it without them"
        return [*rows, _row("the whole run", "?", note)]
    note = f"{whole['updates']:,} updates, {whole['tokens']:.4g} tokens"
    rows.append(_row("the whole run, days", f"{whole['days']:.3g}", note))
    rows.append(_row("chip-hours", f"{whole['chip_hours']:,.1f}"))
    if whole["cost"] is not None:
        note = f"at {whole['price']:g} a chip-hour; evaluation, saving and waiting are not in it"
        rows.append(_row("cost", f"{whole['cost']:,.2f}", note))
    return rows


def advice_text(advice: dict[str, Any]) -> str:
    """The page of facts()["advice"]."""
    if not advice["changes"]:
        return "no change of layout fits, on this slice or a larger one; use another chip or model."
    rows = ["the nearest changes that fit:"]
    if not advice["here"]:
        rows = ["no change of layout is enough on this slice; the smallest that does:"]
    for one in advice["changes"]:
        flags = [] if advice["here"] else [f"--slice={one['slice']}"]
        known = [f"peak {_gib(one['peak'])} GiB"]
        if one["step_seconds"]:
            known.append(f"step {1e3 * one['step_seconds']:.1f} ms at best")
        known += [] if one["compiled"] else ["from shapes, not compiled"]
        rows.append(f"  {' '.join([*flags, *one['flags']])}  ({', '.join(known)})")
    return "\n".join(rows)


def ranked(target: slices.Slice, trials: list[search.Trial]) -> str:
    """The page of `ranking`, with the flags of the best."""
    best = " ".join(trials[0].flags) or "those of the config as it is"
    last = f"the flags of the best: {best}" if trials[0].fits else "none of them fits."
    return "\n".join([search.table(trials, target), "", last])


def ranking(target: slices.Slice, trials: list[search.Trial]) -> dict[str, Any]:
    """What search.search found, as JSON: those that fit first, by the predicted step."""
    layouts = [
        {
            "layout": search.name_of(one.layout, target.chips),
            "num_microbatches": one.layout.num_microbatches,
            "remat": one.layout.remat,
            "flags": list(one.flags),
            "fits": one.fits,
            "peak": one.peak,
            "step_seconds": one.step_s or None,
            "mfu": one.mfu or None,
            "error": one.error,
        }
        for one in trials
    ]
    return {"target": target.name, "chips": target.chips, "layouts": layouts}


def _gib(size: int) -> str:
    return f"{size / slices.GIB:.3f}"
