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
    distill,
    evaluate,
    inference,
    initialization,
    logs,
    lookup,
    optimizers,
    parallel,
    pipeline,
    runs,
    steps,
    transformer,
)
from lm.distill import features
from lm.train import early_stopping, live_teacher, loop, signals, teacher_cache_writer, watchdog
from lm.transformer import lora


def language_loss(run: runs.Run, text_bytes, place):
    """Cross-entropy; no teacher. place: as of transformer.Transformer."""
    model = transformer.Transformer(run.model, place)
    return steps.make_language_loss(model, run.loss, text_bytes)


def distillation_loss(run: runs.Run, text_bytes, place):
    """Cross-entropy mixed with the teacher's distributions."""
    teacher = transformer.Transformer(live_teacher.model_of(run), place)
    model = transformer.Transformer(run.model, place)
    return distill.make_distillation_loss(model, run.loss, text_bytes, teacher, run.teacher.terms)


LOSSES = {"pretrain": language_loss, "finetune": language_loss, "distill": distillation_loss}


def initial_params(run: runs.Run, tokens, teacher: dict | None) -> dict | None:
    """The parameters to start from, None for random ones. teacher: the teacher's, if any.

    Of a run named by init_from all are taken, but where its vocabulary is another one, the rows of
    the same pieces; what was taken is printed. Beside them are LoRA's fresh factors, or fresh
    projections, where the run has such.
    """
    params, seed = _taken(run, tokens, teacher), run.seed
    params = runs.with_projections(
        run, params, lambda: _random(run), steps.key_for(seed, 0, features.PROJECTIONS)
    )
    if not run.lora.rank:
        return params
    return lora.init_lora(run.lora, params, steps.key_for(run.seed, 0, "adapters"))


def _taken(run: runs.Run, tokens, teacher: dict | None) -> dict | None:
    if teacher is not None:
        theirs = runs.read_run(runs.teacher_source(run)[0]).model
        init, seed = run.teacher.student_init, run.seed
        if distill.parse_start(init) and distill.leaves_head(theirs, run.model):
            print(
                f"teacher.student_init {init}: model.lm_head={run.model.lm_head!r} starts "
                f"as the teacher's "
                f"embedding, which was never a head; the first updates go into learning one.",
                file=sys.stderr,
            )
        return distill.init_student(init, teacher, theirs, run.model, seed)
    if not run.init_from:
        return None
    named, which = runs.init_source(run)
    taken = runs.read_run(named)
    theirs = runs.make_tokenizer(taken)
    params, step = inference.read_params(taken, theirs, which)
    same = theirs.fingerprint == tokens.fingerprint
    account = "all parameters whole"
    if not same or taken.model.vocab_size != run.model.vocab_size:
        fresh = _random(run)
        rows = initialization.rows_by_name(tokens.names(), theirs.names(), run.model.vocab_size)
        flat = [checkpoints.flatten(tree) for tree in (fresh, params)]
        carried, account = initialization.carry_over(*flat, rows)
        params = jax.tree.unflatten(jax.tree.structure(fresh), list(carried.values()))
    print(f"init_from {named}, update {step}: {account}", file=sys.stderr)
    return params


def _random(run: runs.Run) -> dict:
    model = transformer.Transformer(run.model)
    return jax.jit(functools.partial(steps.init_params, model, run.seed))()


def check(run: runs.Run, allow: tuple[str, ...] = ()) -> None:
    """Raise ValueError unless data, workdir and origin are there for this config.

    No device is needed, and nothing is written.
    """
    runs.check_workdir(run, allow)
    runs.check_columns(run)
    optimizers.check_groups(run.trained, runs.trained_shapes(run))
    named, which = runs.init_source(run) if run.init_from else runs.teacher_source(run)
    if named and not runs.is_claimed(run.workdir):
        with inference.open_checkpoints(runs.read_run(named), read_only=True) as saved:
            saved.find_steps(which)
    if run.teacher.cache:
        pipeline.open_teacher_cache(run.teacher.cache)


def make_strategy(run: runs.Run, devices=None, hosts=None):
    """The strategy of the run, if its batch divides over these devices (all by default).

    hosts: as of parallel.make_strategy.
    """
    strategy = parallel.make_strategy(run.parallel, devices, hosts)
    shards = max(strategy.shards, run.parallel.fixed_shards)
    parallel.check_batch_size(run.data.batch_size, shards, run.parallel.num_microbatches)
    return strategy


def train(run: runs.Run, devices=None, *, allow=(), profile=None) -> dict[str, float]:
    """Train a run to its last update, from its newest checkpoint if it has one.

    devices: jax devices, all by default. allow: keys of the config, dotted, that may differ from
    those the run was made with. profile: the first and last update of a trace, or None.
    Returns the last held-out figures. Raises ValueError and OSError for what a user can cause,
    Unfinished and Diverged as Loop.run.
    """
    with watchdog.detect_lost_host(_lost):
        return _train(run, devices, allow, profile)


def parse_profile(text: str) -> tuple[int, int] | None:
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
    watchdog.exit_now(
        f"another host was lost before the first update{said and f' ({said})'}; see to what it "
        f"said, and start them all again."
    )


def _train(run: runs.Run, devices, allow, profile) -> dict[str, float]:
    check(run, allow)
    strategy, first = make_strategy(run, devices), parallel.host_index_and_count()[0] == 0
    tokens, examples, heldout = _prepared(run)
    if run.teacher.cache:
        told = teacher_cache_writer.find_teacher_cache(run, tokens, examples)
        examples = dataclasses.replace(examples, teacher_cache=told)
    work = make_setup(run, strategy, tokens, examples, heldout)
    ledger = logs.TimeLedger(run.workdir) if first else logs.NullLog()
    with signals.Signals() as stop, ledger, inference.open_checkpoints(run) as saved:
        ledger.switch("restore")
        found = saved.restore(strategy.abstract_state(work.shapes))
        state, past = found or (None, {"step": 0, "position": {"next_index": 0}})
        if found:
            _check_facts(run, work.facts, past, allow)
        waited = early_stopping.EarlyStopping.of(run, past)
        if past["step"] >= work.total:
            return _last_heldout(run)
        if waited.over:
            print(f"{run.workdir}: {waited.ended(past['step'])}", file=sys.stderr)
            return _last_heldout(run)
        ledger.switch("start")
        teacher = live_teacher.read(run, tokens, strategy, fresh=not found)
        if found:
            state = strategy.place_state(state)
        else:
            state = strategy.init(work.make, initial_params(run, tokens, teacher))
        found = None
        # The placed copies alone stay; the loop's first update uses up its own.
        teacher = live_teacher.placed(run, strategy, teacher)
        work = dataclasses.replace(work, cost=live_teacher.cost(run, strategy, teacher))
        with _log(run, work.total, past["step"]) as log:
            if first:
                _claim(run, tokens, work, strategy, log, past["step"])
            updates = loop.Loop(run, strategy, work, saved, log, ledger, stop, profile)
            return updates.train_from(state, past, teacher)


def _prepared(run: runs.Run):
    # (tokens, training examples, held-out examples), made by the first host while others wait.
    def prepare():
        tokens = runs.make_tokenizer(run)
        return tokens, *runs.make_examples(run, tokens)

    first = parallel.host_index_and_count()[0] == 0
    made = prepare() if first else None
    parallel.barrier("tokenizer and examples")
    return made or prepare()


@dataclasses.dataclass(frozen=True)
class Update:
    """An update of a run, whatever its data hold: what every strategy compiles."""

    make: Callable  # parameters, or None for random ones -> a fresh state
    step: Callable  # steps.train_step of (state, batch, teacher)
    rate: Callable  # updates before -> the learning rate
    shapes: steps.State


def make_update(
    run: runs.Run,
    text_bytes,
    total: int,
    pace: optimizers.RunLength,
    place=transformer.no_constraint,
) -> Update:
    """The update of a run of so many. text_bytes: int [V], as Tokenizer.piece_bytes gives them;
    place: as of transformer.Transformer.
    """
    model, shapes = transformer.Transformer(run.model), runs.trained_shapes(run)
    optimizer, rate = optimizers.make_optimizer(run.trained, total, shapes, pace)
    plan = steps.StepConfig(
        run.seed,
        run.parallel.num_microbatches,
        run.parallel.fixed_shards,
        run.optimizer.ema_decay,
        total,
    )
    loss = lookup.lookup(LOSSES, run.stage, "stage")(run, text_bytes, place)
    loss = lora.with_lora(run.lora, loss)
    step = functools.partial(steps.train_step, loss=loss, optimizer=optimizer, plan=plan)
    make = functools.partial(steps.init_state, model, optimizer, plan)
    return Update(make, step, rate, jax.eval_shape(make, shapes))


def make_setup(run: runs.Run, strategy, tokens, examples, heldout) -> loop.TrainSetup:
    """What the updates of a run are made of. examples, heldout: pipeline.Examples of the splits."""
    total, pace = runs.total_updates(run, len(examples)), runs.run_length(run, len(examples))
    text_bytes = tokens.piece_bytes(run.model.vocab_size)
    update = make_update(run, text_bytes, total, pace, strategy.shard_activations)
    times = {"": 1.0} | optimizers.multipliers(run.optimizer)

    def rates(done: int) -> dict[str, float]:
        now = float(update.rate(done))
        return {f"learning_rate{name and '/'}{name}": now * part for name, part in times.items()}

    facts = {"config": runs.without_operational(run.config_dict), "tokenizer": tokens.fingerprint}
    scored = run.checkpoint.best_metric not in ("", *runs.HELDOUT_METRICS)
    return loop.TrainSetup(
        make=update.make,
        update=strategy.compile(update.step, donate=True),
        rates=rates,
        plain=_plain(run, strategy),
        heldout=evaluate.HeldOut(run, strategy, heldout, tokens),
        judge=evaluate.TaskScorer(run, strategy, tokens) if scored else None,
        examples=examples,
        shapes=update.shapes,
        total=total,
        flops=step_flops(run),
        facts=facts | {"data": examples.files},
        answers=_answers(run, strategy, tokens),
    )


def _plain(run: runs.Run, strategy) -> Callable:
    # Placed parameters as training holds them -> the model's own.
    if not run.lora.rank:
        return features.plain
    return strategy.compile(lambda params, axis=None: lora.merge_lora(run.lora, params))


def _answers(run: runs.Run, strategy, tokens) -> live_teacher.Answers | None:
    return live_teacher.Answers(run, strategy, tokens.eos) if run.teacher.on_policy else None


def _check_facts(run: runs.Run, ours: dict, stored: dict, allow) -> None:
    odd = [key for key in ("tokenizer", "data") if ours[key] != stored[key]]
    odd += runs.differences(ours["config"], runs.without_operational(stored["config"]))
    odd = [word for word in odd if not runs.is_allowed(word.split()[0], allow)]
    if odd:
        keys = ",".join(word.split()[0] for word in odd)
        raise ValueError(
            f"the checkpoints in {run.workdir} were made with another {', '.join(odd)}; continue "
            f"them with the one they were made with, use another --workdir, or, to change it "
            f"midway, --allow_change={keys}."
        )


def _log(run: runs.Run, total: int, step: int):
    if parallel.host_index_and_count()[0]:
        return logs.NullLog()
    return logs.RunLog(run.workdir, total, name=run.name, resume_step=step)


def _claim(run: runs.Run, tokens, work: loop.TrainSetup, strategy, log, step: int) -> None:
    """Make the workdir this config's, or say what of its config has changed."""
    fresh = not runs.is_claimed(run.workdir)
    changed = [] if fresh else runs.differences(run.config_dict, runs.read_config(run.workdir))
    if fresh or changed:
        runs.claim(run, tokens)
    if changed:
        log.event("changed", step, keys=changed)
    if fresh:
        logs.write_manifest(run.workdir, _facts_of(run, tokens, work, strategy))


def _facts_of(run: runs.Run, tokens, work: loop.TrainSetup, strategy) -> dict:
    return (
        {
            "stage": run.stage,
            "config": run.config_dict,
            "params": transformer.parameter_count(run.model),
            "trained": optimizers.trained_count(run.trained, work.shapes.params),
            "devices": [str(device.device_kind) for device in strategy.devices],
            "data": work.examples.facts,
            "files": work.examples.files,
            "tokenizer": tokens.fingerprint,
            "flops_per_step": work.flops,
        }
        | planned_cost(run, work.total)
        | work.cost
    )


def planned_cost(run: runs.Run, total: int) -> dict[str, int]:
    """What a run of so many updates takes: updates, tokens (padding counted), model FLOPs."""
    tokens = total * runs.run_length(run, 0).tokens
    flops = total * step_flops(run)
    return {"planned_updates": total, "planned_tokens": tokens, "planned_flops": flops}


def step_flops(run: runs.Run) -> int:
    """Model FLOPs of one update: forward and backward; a teacher's forward pass, if it runs."""
    inputs, targets = run.lengths
    flops = 3 * transformer.forward_flops(run.model, inputs, targets)
    if run.stage == "distill" and not run.teacher.cache:
        teacher = runs.read_run(runs.teacher_source(run)[0]).model
        flops += transformer.forward_flops(teacher, inputs, targets)
    return flops * run.data.batch_size


def _last_heldout(run: runs.Run) -> dict[str, float]:
    rows = logs.read(run.workdir / logs.METRICS)
    return next((row for row in reversed(rows) if row["split"] == "heldout"), {})
