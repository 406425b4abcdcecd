"""The only loop: pre-training, fine-tuning and distillation differ in loss and data alone."""

from __future__ import annotations

import functools
import math
import sys

import jax

from lm import (
    batch,
    checkpoints,
    choose,
    distill,
    evaluate,
    logs,
    optimizers,
    origin,
    parallel,
    pipeline,
    run,
    steps,
    transformer,
)


def language_loss(this: run.Run, text_bytes):
    """Cross-entropy; no teacher."""
    return steps.make_language_loss(transformer.Transformer(this.model), this.loss, text_bytes)


def distillation_loss(this: run.Run, text_bytes):
    """Cross-entropy mixed with the teacher's distributions."""
    teacher = transformer.Transformer(run.read_run(this.config["teacher"]["workdir"]).model)
    model = transformer.Transformer(this.model)
    return distill.make_distillation_loss(model, this.loss, text_bytes, teacher)


LOSSES = {"pretrain": language_loss, "finetune": language_loss, "distill": distillation_loss}


def first_params(this: run.Run, tokens, teacher: dict | None) -> dict | None:
    """The parameters to start from, None for random ones. teacher: the teacher's, if any.

    Of a run named by init_from all are taken, but where its vocabulary is another one, the rows of
    the same pieces; what was taken is printed.
    """
    config = this.config
    if teacher is not None:
        theirs = run.read_run(config["teacher"]["workdir"]).model
        return distill.init_student(config["teacher"]["init"], teacher, theirs, this.model)
    if not config["init_from"]:
        return None
    taken = run.read_run(config["init_from"])
    theirs = run.make_tokenizer(taken)
    params, step = evaluate.read_params(taken, theirs)
    same = theirs.fingerprint == tokens.fingerprint
    account = "all parameters whole"
    if not same or taken.model.vocab_size != this.model.vocab_size:
        model = transformer.Transformer(this.model)
        fresh = jax.jit(functools.partial(steps.first_params, model, config["seed"]))()
        rows = origin.rows_by_name(tokens.names(), theirs.names(), this.model.vocab_size)
        flat = [checkpoints.flatten(tree) for tree in (fresh, params)]
        carried, account = origin.carry_over(*flat, rows)
        params = jax.tree.unflatten(jax.tree.structure(fresh), list(carried.values()))
    print(f"init_from {config['init_from']}, update {step}: {account}", file=sys.stderr)
    return params


def check(this: run.Run, devices=None):
    """The run's strategy, if it can be trained here: devices, batch, data and workdir agree."""
    strategy = parallel.make_strategy(this.parallel, devices)
    parallel.check_batch(this.data.batch_size, strategy.shards, this.parallel.micro_batches)
    run.check_workdir(this)
    run.splits(this)
    return strategy


def train(this: run.Run, devices=None) -> dict[str, float]:
    """Train a run to its last update, from its newest checkpoint if it has one.

    devices: jax devices, all local ones by default. Returns the last held-out figures.
    Raises ValueError for what a user can cause, and when the loss is no longer finite.
    """
    strategy = check(this, devices)
    tokens = run.make_tokenizer(this)
    train_examples, heldout_examples = run.make_examples(this, tokens)
    text_bytes = tokens.piece_bytes(this.model.vocab_size)
    optimizer, rate = optimizers.make_optimizer(this.optimizer, this.config["steps"])
    loss = choose.choose(LOSSES, this.config["stage"], "stage")(this, text_bytes)
    plan = steps.Plan(this.config["seed"], this.parallel.micro_batches)
    step = functools.partial(
        steps.train_step,
        loss=loss,
        optimizer=optimizer,
        plan=plan,
    )
    model = transformer.Transformer(this.model)
    make_state = lambda params: steps.init_state(model, optimizer, plan, params)
    facts = {"config": run.settled(this.config), "tokenizer": tokens.fingerprint}
    facts["data"] = train_examples.files
    directory = this.workdir / "checkpoints"
    with checkpoints.Checkpoints(directory, keep=this.config["keep"]) as saved:
        shapes = jax.eval_shape(make_state, transformer.shapes(this.model))
        restored = saved.restore(strategy.abstract(shapes))
        if restored:
            _check_facts(facts, restored[1], directory)
            if int(restored[0].step) >= this.config["steps"]:
                return _last_heldout(this)
        taught_by = this.config["teacher"]["workdir"]
        teacher = evaluate.read_params(run.read_run(taught_by), tokens)[0] if taught_by else None
        if restored:
            state = restored[0]
        else:
            # Eagerly, this would compile each small operation by itself.
            state = jax.jit(make_state)(first_params(this, tokens, teacher))
            run.claim(this, tokens)
            logs.write_manifest(this.workdir, _facts_of(this, strategy, train_examples))
        start = restored[1]["position"]["next_index"] if restored else 0
        restored = None
        # The placed copies alone stay; the loop's first update uses up its own.
        state = strategy.place_state(state)
        teacher = None if teacher is None else strategy.place_state(teacher)
        heldout = evaluate.HeldOut(this, strategy, heldout_examples, tokens)
        compiled = strategy.compile(step, donate=True)
        loop = Loop(this, strategy, compiled, teacher, heldout, rate)
        return loop.run(state, start, train_examples, saved, facts)


def _check_facts(ours: dict, stored: dict, directory) -> None:
    for key in ("config", "tokenizer", "data"):
        if ours[key] != stored[key]:
            raise ValueError(
                f"the checkpoints in {directory} were made with another {key}; continue them with "
                f"the one they were made with, or use another --workdir."
            )


def _facts_of(this: run.Run, strategy, examples: pipeline.Examples) -> dict:
    return {
        "stage": this.config["stage"],
        "params": transformer.parameter_count(this.model),
        "devices": [str(device.device_kind) for device in strategy.devices],
        "data": examples.facts,
        "flops_per_step": step_flops(this),
    }


def step_flops(this: run.Run) -> int:
    """Model FLOPs of one update: forward and backward, and the teacher's forward pass."""
    inputs, targets = this.lengths
    flops = 3 * transformer.forward_flops(this.model, inputs, targets)
    if this.config["stage"] == "distill":
        teacher = run.read_run(this.config["teacher"]["workdir"]).model
        flops += transformer.forward_flops(teacher, inputs, targets)
    return flops * this.data.batch_size


def _last_heldout(this: run.Run) -> dict[str, float]:
    rows = logs.read(this.workdir / logs.METRICS)
    return next((row for row in reversed(rows) if row["split"] == "heldout"), {})


class Loop:
    """Updates from one step to the last, with logs, held-out losses and checkpoints on the way."""

    def __init__(self, this: run.Run, strategy, compiled, teacher, heldout, rate):
        self.this, self.strategy, self.compiled = this, strategy, compiled
        self.teacher, self.heldout, self.rate = teacher, heldout, rate
        self.every, self.steps = this.config["every"], this.config["steps"]

    def run(self, state, start: int, examples, saved, facts: dict) -> dict[str, float]:
        """Returns the last held-out figures; the last state is on disk."""
        batches = pipeline.train_batches(examples, self.this.config["seed"], start=start)
        meter = logs.Meter(
            flops_per_step=step_flops(self.this),
            peak_flops=logs.peak_flops(self.strategy.devices),
        )
        unread, figures = [], {}
        with logs.Logs(
            self.this.workdir, self.steps, name=self.this.name, resume_step=start
        ) as log:
            for number in range(start + 1, self.steps + 1):
                placed = self.strategy.place_batch(batch.Batch(*next(batches)))
                state, sums = self.compiled(state, placed, self.teacher)
                unread.append(sums)
                due = self._due(number)
                if due:
                    shown = self._read(unread, number)
                    unread = []
                if "log" in due:
                    tokens = shown.pop("tokens")
                    log.write(number, "train", shown | meter.rates(number, tokens))
                    log.advance(number, shown)
                elif not number % 10:
                    log.advance(number)
                if "evaluate" in due:
                    sums = self.heldout.sums(state.params)
                    figures = steps.ratios(sums)
                    log.write(number, "heldout", figures)
                if "checkpoint" in due:
                    position = {"next_index": number}
                    saved.save(self.strategy.fetch(state), facts | {"position": position})
                if due - {"log"}:
                    meter.start(number)
            saved.wait()
        return figures

    def _due(self, number: int) -> set[str]:
        """What follows this update: at its multiples, after the last, and a log after the first.

        The same whether the run was resumed or not, so that its rows are the unbroken run's.
        """
        due = {what for what, every in self.every.items() if number % every == 0}
        if number == self.steps:
            due = set(self.every)
        if number == 1 or due:
            due.add("log")
        return due

    def _read(self, unread: list[dict], number: int) -> dict[str, float]:
        """The figures of the updates since the last look; the only wait for the devices."""
        fetched = [jax.device_get(self.strategy.fetch(sums)) for sums in unread]
        added = {name: float(sum(sums[name] for sums in fetched)) for name in fetched[0]}
        norm = float(fetched[-1]["gradient_norm"])
        figures = steps.ratios(added) | {"gradient_norm": norm}
        if not (math.isfinite(figures["loss"]) and math.isfinite(norm)):
            raise ValueError(
                f"the loss is {figures['loss']} and the gradient's norm {norm} at update {number}; "
                f"in another --workdir, lower optimizer.peak={self.this.optimizer.peak} or raise "
                f"optimizer.warmup; what {self.this.workdir} has saved is from before."
            )
        figures["tokens"] = added["inputs"] + added["weight"]
        return figures | {"learning_rate": float(self.rate(number - 1))}
