"""What a run begins with: checks, tokens, loss, optimizer, and the state to go on from."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Callable

import jax

from lm import (
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
from lm.distill import features, policy
from lm.train import loop, patience, signals, taught, teaching, watchdog
from lm.transformer import adapters


def language_loss(this: run.Run, text_bytes, place):
    """Cross-entropy; no teacher. place: as of transformer.Transformer."""
    model = transformer.Transformer(this.model, place)
    return steps.make_language_loss(model, this.loss, text_bytes)


def distillation_loss(this: run.Run, text_bytes, place):
    """Cross-entropy mixed with the teacher's distributions."""
    teacher = transformer.Transformer(teaching.model_of(this), place)
    model = transformer.Transformer(this.model, place)
    terms = distill.parse(this.config["teacher"]["loss"])
    return distill.make_distillation_loss(model, this.loss, text_bytes, teacher, terms)


LOSSES = {"pretrain": language_loss, "finetune": language_loss, "distill": distillation_loss}


def first_params(this: run.Run, tokens, teacher: dict | None) -> dict | None:
    """The parameters to start from, None for random ones. teacher: the teacher's, if any.

    Of a run named by init_from all are taken, but where its vocabulary is another one, the rows of
    the same pieces; what was taken is printed. Beside them are LoRA's fresh factors, or fresh
    projections, where the run has such.
    """
    params, seed = _taken(this, tokens, teacher), this.config["seed"]
    params = run.begun(
        this, params, lambda: _random(this), steps.key_for(seed, 0, features.PROJECTIONS)
    )
    if not this.lora.rank:
        return params
    return adapters.added(this.lora, params, steps.key_for(this.config["seed"], 0, "adapters"))


def _taken(this: run.Run, tokens, teacher: dict | None) -> dict | None:
    config = this.config
    if teacher is not None:
        theirs = run.read_run(run.teacher_of(this)[0]).model
        init, seed = config["teacher"]["init"], config["seed"]
        if distill.parse_start(init) and distill.leaves_head(theirs, this.model):
            print(
                f"teacher.init {init}: model.head={this.model.head!r} starts as the teacher's "
                f"embedding, which was never a head; the first updates go into learning one.",
                file=sys.stderr,
            )
        return distill.init_student(init, teacher, theirs, this.model, seed)
    if not config["init_from"]:
        return None
    named, which = run.origin_of(this)
    taken = run.read_run(named)
    theirs = run.make_tokenizer(taken)
    params, step = evaluate.read_params(taken, theirs, which)
    same = theirs.fingerprint == tokens.fingerprint
    account = "all parameters whole"
    if not same or taken.model.vocab_size != this.model.vocab_size:
        fresh = _random(this)
        rows = origin.rows_by_name(tokens.names(), theirs.names(), this.model.vocab_size)
        flat = [checkpoints.flatten(tree) for tree in (fresh, params)]
        carried, account = origin.carry_over(*flat, rows)
        params = jax.tree.unflatten(jax.tree.structure(fresh), list(carried.values()))
    print(f"init_from {named}, update {step}: {account}", file=sys.stderr)
    return params


def _random(this: run.Run) -> dict:
    model = transformer.Transformer(this.model)
    return jax.jit(functools.partial(steps.first_params, model, this.config["seed"]))()


def check(this: run.Run, allow: tuple[str, ...] = ()) -> None:
    """Raise ValueError unless data, workdir and origin are there for this config.

    No device is needed, and nothing is written.
    """
    run.check_workdir(this, allow)
    run.check_columns(this)
    optimizers.check_groups(this.trained, run.held(this))
    named, which = run.origin_of(this) if this.config["init_from"] else run.teacher_of(this)
    if named and not run.is_claimed(this.workdir):
        with evaluate.open_checkpoints(run.read_run(named), read_only=True) as saved:
            saved.named(which)
    if this.config["teacher"]["cache"]:
        pipeline.read_taught(this.config["teacher"]["cache"])


def layout(this: run.Run, devices=None, hosts=None):
    """The strategy of the run, if its batch divides over these devices (all by default).

    hosts: as of parallel.make_strategy.
    """
    strategy = parallel.make_strategy(this.parallel, devices, hosts)
    shards = max(strategy.shards, this.parallel.fixed_shards)
    parallel.check_batch(this.data.batch_size, shards, this.parallel.micro_batches)
    return strategy


def train(this: run.Run, devices=None, *, allow=(), profile=None) -> dict[str, float]:
    """Train a run to its last update, from its newest checkpoint if it has one.

    devices: jax devices, all by default. allow: keys of the config, dotted, that may differ from
    those the run was made with. profile: the first and last update of a trace, or None.
    Returns the last held-out figures. Raises ValueError and OSError for what a user can cause,
    Unfinished and Diverged as Loop.run.
    """
    with watchdog.company(_lost):
        return _train(this, devices, allow, profile)


def traced(text: str) -> tuple[int, int] | None:
    """The first and last update of --profile=first:last; None where it is empty.

    Raises ValueError where it says neither.
    """
    if not text:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(f"--profile={text} are no updates; write the first and last, as 10:15.")
    return first, last


def _lost(said: str) -> None:
    watchdog.leave(
        f"another host was lost before the first update{said and f' ({said})'}; see to what it "
        f"said, and start them all again."
    )


def _train(this: run.Run, devices, allow, profile) -> dict[str, float]:
    check(this, allow)
    strategy, first = layout(this, devices), parallel.hosts()[0] == 0
    tokens, examples, heldout = _prepared(this)
    if this.config["teacher"]["cache"]:
        told = taught.find_taught(this, tokens, examples)
        examples = dataclasses.replace(examples, taught=told)
    work = make_work(this, strategy, tokens, examples, heldout)
    ledger = logs.Ledger(this.workdir) if first else logs.Silent()
    with signals.Signals() as stop, ledger, evaluate.open_checkpoints(this) as saved:
        ledger.turn("restore")
        found = saved.restore(strategy.abstract(work.shapes))
        state, past = found or (None, {"step": 0, "position": {"next_index": 0}})
        if found:
            _check_facts(this, work.facts, past, allow)
        waited = patience.Patience.of(this.config, past)
        if past["step"] >= work.total:
            return _last_heldout(this)
        if waited.over:
            print(f"{this.workdir}: {waited.ended(past['step'])}", file=sys.stderr)
            return _last_heldout(this)
        ledger.turn("start")
        teacher = teaching.read(this, tokens, strategy, fresh=not found)
        if found:
            state = strategy.place_state(state)
        else:
            state = strategy.init(work.make, first_params(this, tokens, teacher))
        found = None
        # The placed copies alone stay; the loop's first update uses up its own.
        teacher = teaching.placed(this, strategy, teacher)
        work = dataclasses.replace(work, cost=teaching.cost(this, strategy, teacher))
        with _log(this, work.total, past["step"]) as log:
            if first:
                _claim(this, tokens, work, strategy, log, past["step"])
            updates = loop.Loop(this, strategy, work, saved, log, ledger, stop, profile)
            return updates.run(state, past, teacher)


def _prepared(this: run.Run):
    # (tokens, training examples, held-out examples), made by the first host while others wait.
    def prepare():
        tokens = run.make_tokenizer(this)
        return tokens, *run.make_examples(this, tokens)

    first = parallel.hosts()[0] == 0
    made = prepare() if first else None
    parallel.meet("tokenizer and examples")
    return made or prepare()


@dataclasses.dataclass(frozen=True)
class Update:
    """An update of a run, whatever its data hold: what every strategy compiles."""

    make: Callable  # parameters, or None for random ones -> a fresh state
    step: Callable  # steps.train_step of (state, batch, teacher)
    rate: Callable  # updates before -> the learning rate
    shapes: steps.State


def make_update(
    this: run.Run, text_bytes, total: int, pace: optimizers.Pace, place=transformer.anywhere
) -> Update:
    """The update of a run of so many. text_bytes: int [V], as Tokenizer.piece_bytes gives them;
    place: as of transformer.Transformer.
    """
    model, shapes = transformer.Transformer(this.model), run.held(this)
    optimizer, rate = optimizers.make_optimizer(this.trained, total, shapes, pace)
    plan = steps.Plan(
        this.config["seed"],
        this.parallel.micro_batches,
        this.parallel.fixed_shards,
        this.optimizer.average,
        total,
    )
    loss = choose.choose(LOSSES, this.config["stage"], "stage")(this, text_bytes, place)
    loss = adapters.adapted(this.lora, loss)
    step = functools.partial(steps.train_step, loss=loss, optimizer=optimizer, plan=plan)
    make = functools.partial(steps.init_state, model, optimizer, plan)
    return Update(make, step, rate, jax.eval_shape(make, shapes))


def make_work(this: run.Run, strategy, tokens, examples, heldout) -> loop.Work:
    """What the updates of a run are made of. examples, heldout: pipeline.Examples of the splits."""
    total, pace = run.total_updates(this, len(examples)), run.pace(this, len(examples))
    text_bytes = tokens.piece_bytes(this.model.vocab_size)
    update = make_update(this, text_bytes, total, pace, strategy.place_rows)
    times = {"": 1.0} | optimizers.multipliers(this.optimizer)

    def rates(done: int) -> dict[str, float]:
        now = float(update.rate(done))
        return {f"learning_rate{name and '/'}{name}": now * part for name, part in times.items()}

    facts = {"config": run.settled(this.config), "tokenizer": tokens.fingerprint}
    scored = this.config["keep_best"] not in ("", *run.FIGURES)
    return loop.Work(
        make=update.make,
        update=strategy.compile(update.step, donate=True),
        rates=rates,
        plain=_plain(this, strategy),
        heldout=evaluate.HeldOut(this, strategy, heldout, tokens),
        judge=evaluate.Judge(this, strategy, tokens) if scored else None,
        examples=examples,
        shapes=update.shapes,
        total=total,
        flops=step_flops(this),
        facts=facts | {"data": examples.files},
        answers=_answers(this, strategy, tokens),
    )


def _plain(this: run.Run, strategy) -> Callable:
    # Placed parameters as training holds them -> the model's own.
    if not this.lora.rank:
        return features.plain
    return strategy.compile(lambda params, axis=None: adapters.merged(this.lora, params))


def _answers(this: run.Run, strategy, tokens) -> teaching.Answers | None:
    asked = this.config["teacher"]["on_policy"]
    return teaching.Answers(this, strategy, tokens.eos) if policy.parse(asked) else None


def _check_facts(this: run.Run, ours: dict, stored: dict, allow) -> None:
    odd = [key for key in ("tokenizer", "data") if ours[key] != stored[key]]
    odd += run.differences(ours["config"], run.settled(stored["config"]))
    odd = [word for word in odd if not run.is_allowed(word.split()[0], allow)]
    if odd:
        keys = ",".join(word.split()[0] for word in odd)
        raise ValueError(
            f"the checkpoints in {this.workdir} were made with another {', '.join(odd)}; continue "
            f"them with the one they were made with, use another --workdir, or, to change it "
            f"midway, --allow_change={keys}."
        )


def _log(this: run.Run, total: int, step: int):
    if parallel.hosts()[0]:
        return logs.Silent()
    return logs.Logs(this.workdir, total, name=this.name, resume_step=step)


def _claim(this: run.Run, tokens, work: loop.Work, strategy, log, step: int) -> None:
    """Make the workdir this config's, or say what of its config has changed."""
    fresh = not run.is_claimed(this.workdir)
    changed = [] if fresh else run.differences(this.config, run.read_config(this.workdir))
    if fresh or changed:
        run.claim(this, tokens)
    if changed:
        log.event("changed", step, keys=changed)
    if fresh:
        logs.write_manifest(this.workdir, _facts_of(this, tokens, work, strategy))


def _facts_of(this: run.Run, tokens, work: loop.Work, strategy) -> dict:
    return (
        {
            "stage": this.config["stage"],
            "config": this.config,
            "params": transformer.parameter_count(this.model),
            "trained": optimizers.trained_count(this.trained, work.shapes.params),
            "devices": [str(device.device_kind) for device in strategy.devices],
            "data": work.examples.facts,
            "files": work.examples.files,
            "tokenizer": tokens.fingerprint,
            "flops_per_step": work.flops,
        }
        | planned(this, work.total)
        | work.cost
    )


def planned(this: run.Run, total: int) -> dict[str, int]:
    """What a run of so many updates takes: updates, tokens (padding counted), model FLOPs."""
    tokens = total * run.pace(this, 0).tokens
    flops = total * step_flops(this)
    return {"planned_updates": total, "planned_tokens": tokens, "planned_flops": flops}


def step_flops(this: run.Run) -> int:
    """Model FLOPs of one update: forward and backward; a teacher's forward pass, if it runs."""
    inputs, targets = this.lengths
    flops = 3 * transformer.forward_flops(this.model, inputs, targets)
    if this.config["stage"] == "distill" and not this.config["teacher"]["cache"]:
        teacher = run.read_run(run.teacher_of(this)[0]).model
        flops += transformer.forward_flops(teacher, inputs, targets)
    return flops * this.data.batch_size


def _last_heldout(this: run.Run) -> dict[str, float]:
    rows = logs.read(this.workdir / logs.METRICS)
    return next((row for row in reversed(rows) if row["split"] == "heldout"), {})
