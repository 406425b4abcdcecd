"""The report of a preflight, as JSON and as text."""

from __future__ import annotations

import math
from typing import Any

from lm import runs
from lm.preflight import advice, compiler, program, roofline, slices

MEMORY = {  # key of summary["memory"] -> name of its row
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


def summarize(
    run: runs.Run, compiled: compiler.Compiled, price: float | None = None
) -> dict[str, Any]:
    """Returns the report as JSON: bytes per chip, seconds and FLOPs.

    "step" and "run" are None unless the program compiled; "run" also if its length is in epochs.
    The command fills "advice". price: of a chip for an hour.
    """
    step, whole = _times(run, compiled, price) if compiled.has_program else (None, None)
    return {
        "target": compiled.target,
        "device": compiled.chip.device_kind,
        "chips": compiled.chips,
        "hosts": compiled.hosts,
        "parallel": run.config_dict["parallel"],
        "fits": compiled.fits,
        "error": compiled.error,
        "memory": _memory(compiled),
        "flops": {"model": compiled.model_flops, "executed": compiled.executed_flops},
        "collectives": compiled.collectives,
        "compile_seconds": compiled.seconds,
        "step": step,
        "run": whole,
        "hints": _hints(run, compiled),
        "advice": None,
    }


def _memory(compiled: compiler.Compiled) -> dict[str, int]:
    """Bytes of a chip by kind, whose sum is "needed"; "chip" is the size of its memory.

    Without a compiled program the kinds that require one are missing.
    """
    kinds = dict(compiled.sizes)
    if compiled.has_program:
        kinds["gradients"] = min(compiled.sizes["gradients"], compiled.workspace)
        kinds["activations"] = max(0, compiled.workspace - compiled.sizes["gradients"])
        kinds["code"] = compiled.code
        kinds["padding"] = compiled.peak - sum(kinds.values())
    return kinds | {"needed": compiled.peak, "chip": compiled.chip.memory}


def _times(run: runs.Run, compiled: compiler.Compiled, price: float | None) -> tuple:
    """The entries "step" and "run"."""
    tokens, updates = runs.run_length(run, 0).tokens, program.total_updates(run)
    estimate = roofline.estimate(compiled, tokens=tokens, updates=updates, price=price)
    names = ("compute_seconds", "network_seconds", "mfu", "tokens_per_day", "seconds", "bound")
    step = {name: getattr(estimate, name) for name in names} | {"tokens": tokens}
    if not math.isfinite(compiled.chip.network):
        step["network_seconds"] = None
    whole = {name: getattr(estimate, name) for name in ("days", "chip_hours", "cost")}
    whole |= {"updates": updates, "tokens": tokens * updates, "price": price}
    return step, whole if updates else None


def advice_row(trial: advice.Trial) -> dict[str, Any]:
    """Returns a change that fits, as JSON."""
    return {
        "slice": trial.slice.name,
        "flags": trial.flags,
        "peak": trial.compiled.peak,
        "step_seconds": trial.step_seconds,
    }


def _hints(run: runs.Run, compiled: compiler.Compiled) -> list[str]:
    """Sentences about settings that suit an accelerator better, each with its flag."""
    sentences = []
    if advice.is_slow(run):
        sentences.append(
            "layers are compiled one by one; --config.model.scan_layers=True compiles them once."
        )
    if run.model.dtype == "float32" and compiled.chip.device_kind != "cpu":
        sentences.append("activations are float32; --config.model.dtype=bfloat16 halves them.")
    if compiled.unknown_loops:
        sentences.append(f"{compiled.unknown_loops} loops of unknown trip count were counted once.")
    return sentences


def text(summary: dict[str, Any]) -> str:
    """Formats the report as text."""
    verdict = {True: "fits", False: "does not fit", None: "may fit: its activations are unknown"}
    head = f"{summary['target']}: {summary['chips']} x {summary['device']}, {summary['hosts']} host"
    head += "s" * (summary["hosts"] > 1) + f"; the run {verdict[summary['fits']]}."
    lines = [head, *filter(None, [summary["error"]]), "", *_memory_rows(summary)]
    lines += ["", *_work_rows(summary)]
    if summary["step"]:
        lines += ["", *_time_rows(summary["step"], summary["run"])]
    return "\n".join([*lines, *(f"hint: {hint}" for hint in summary["hints"])])


def _row(name: str, value: str, note: str = "") -> str:
    return f"  {name:<26} {value:>14}  {note}".rstrip()


def _memory_rows(summary: dict) -> list[str]:
    kinds = summary["memory"]
    rows = ["memory of a chip, GiB"]
    rows += [_row(MEMORY[key], _gib(kinds[key])) for key in MEMORY if kinds.get(key)]
    if "activations" not in kinds:
        reason = "only the compiler can tell" if summary["error"] else "not compiled"
        rows.append(_row(MEMORY["activations"], "?", f"unknown: {reason}"))
    note = f"{kinds['needed'] / kinds['chip']:.1%} of the chip's {_gib(kinds['chip'])}"
    if summary["fits"] is None or summary["error"]:
        note = f"at least {note}"
    return [*rows, _row("peak", _gib(kinds["needed"]), note)]


def _work_rows(summary: dict) -> list[str]:
    flops = summary["flops"]
    rows = ["an update", _row("model FLOPs", f"{flops['model']:.4g}", "of all chips")]
    if flops["executed"]:
        note = f"{flops['executed'] / flops['model']:.3f} times the model's"
        rows.append(_row("executed FLOPs", f"{flops['executed']:.4g}", note))
    for kind, sent in summary["collectives"].items():
        rows.append(_row(kind, f"{sent:.4g}", "bytes that a chip sends"))
    return rows


def _time_rows(step: dict, whole: dict | None) -> list[str]:
    rows = ["lower bounds from compute and network (a real step is slower)"]
    for key in ("compute", "network"):
        seconds = step[f"{key}_seconds"]
        cells = ("?", "its speed is unknown") if seconds is None else (f"{1e3 * seconds:.3f}",)
        rows.append(_row(f"{key}, ms", *cells))
    rows.append(_row("step, ms", f"{1e3 * step['seconds']:.3f}", f"bound by {step['bound']}"))
    rows.append(_row("MFU", f"{step['mfu']:.1%}", "model FLOPs over the chips' peak"))
    rows.append(_row("tokens a day", f"{step['tokens_per_day']:.4g}", "with padding"))
    if whole is None:
        note = "its length is in epochs; set --config.steps to estimate it"
        return [*rows, _row("the whole run", "?", note)]
    note = f"{whole['updates']:,} updates, {whole['tokens']:.4g} tokens"
    rows.append(_row("the whole run, days", f"{whole['days']:.3g}", note))
    rows.append(_row("chip-hours", f"{whole['chip_hours']:,.1f}"))
    if whole["cost"] is not None:
        note = f"at {whole['price']:g} a chip-hour, without evaluation, checkpoints and idle time"
        rows.append(_row("cost", f"{whole['cost']:,.2f}", note))
    return rows


def advice_text(target: str, changes: list[dict[str, Any]]) -> str:
    """Formats the rows of advice for a target as text."""
    if not changes:
        return "no change of layout fits on this or a larger slice; use another chip or model."
    is_larger = changes[0]["slice"] != target
    rows = ["the nearest changes that fit:"]
    if is_larger:
        rows = ["no change of layout fits on this slice; the smallest slice that fits:"]
    for change in changes:
        flags = " ".join([f"--slice={change['slice']}"] * is_larger + change["flags"])
        step = f"step {1e3 * change['step_seconds']:.1f} ms at best"
        rows.append(f"  {flags}  (peak {_gib(change['peak'])} GiB, {step})")
    return "\n".join(rows)


def _gib(size: int) -> str:
    return f"{size / slices.GIB:.3f}"
