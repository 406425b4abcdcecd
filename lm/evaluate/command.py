"""The evaluation of a run: losses, baselines and scores, written into its workdir."""

from __future__ import annotations

import json
import math

from lm import logs, pipeline, run, steps, tasks
from lm.evaluate import answers, heldout, reading, scores


def _losses(losses: heldout.HeldOut, params, train: pipeline.Examples, text_bytes, label) -> dict:
    sums = losses.sums(params, label)
    figures = steps.ratios(sums) | {"tokens": int(sums["weight"])}
    return figures | heldout.unigram_baselines(losses, train.frequencies, text_bytes)


def evaluate(workdir, which: str | int = "newest") -> dict:
    """Evaluate a checkpoint of a run on its held-out split; which: as in read_params.

    Writes evaluate.json and, for tasks of pairs, predictions.jsonl into the workdir. Of several
    tasks, the figures of each stand under its name, and those of all together above. What an
    earlier call wrote for the same checkpoint and limits is returned as it is.
    """
    this, strategy, tokens, params, step = reading.open_run(workdir, which)
    path = this.workdir / "evaluate.json"
    made_of = {"step": step, "limits": this.config["evaluate"]}
    if path.exists() and (done := json.loads(path.read_text())) | made_of == done:
        return done
    train, examples = run.make_examples(this, tokens)
    losses = heldout.HeldOut(this, strategy, examples, tokens)
    text_bytes = tokens.piece_bytes(this.model.vocab_size)
    label = f"held-out loss of {this.name}"
    figures = made_of | _losses(losses, params, train, text_bytes, label)
    several, lines = len(examples.parts) > 1, []
    answer = answers.Answers(this, strategy, params, tokens)
    for part, learnt in zip(examples.parts, train.parts, strict=True):
        found = {}
        if several:
            own, alone = pipeline.Examples((learnt,)), losses.of(part)
            found = _losses(alone, params, own, text_bytes, f"{label}: {part.name}")
        if tasks.task_named(part.name).pairs:
            judged, rows = scores.score(this, answer, part.name)
            found |= judged
            named = {"task": part.name} if several else {}
            lines += [json.dumps(named | row, ensure_ascii=False) + "\n" for row in rows]
        figures |= {"tasks": figures.get("tasks", {}) | {part.name: found}} if several else found
    if lines:
        logs.write_atomically(this.workdir / "predictions.jsonl", "".join(lines))
    chosen = "" if which == "newest" else f" --step={which}"
    figures["command"] = f"python -m lm evaluate --workdir={workdir}{chosen}"
    if not math.isfinite(figures["nats"]):
        raise ValueError(f"the held-out loss of {workdir} at update {step} is not finite.")
    logs.write_atomically(path, json.dumps(figures, indent=2) + "\n")
    return figures
