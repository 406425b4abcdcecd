"""The start of a run: checks, data, loss, optimizer, and the state to resume from."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import numpy as np

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
    tokenizer,
    transformer,
)
from lm.distill import features
from lm.train import data, early_stopping, live_teacher, loop, signals, watchdog
from lm.transformer import lora


def _language_loss(run, model, text_bytes) -> steps.Loss:
    return steps.make_language_loss(model, run.loss, text_bytes)


def _distillation_loss(run, model, text_bytes) -> steps.Loss:
    teacher = transformer.Transformer(live_teacher.teacher_config(run), model.shard_activations)
    return distill.make_distillation_loss(model, run.loss, text_bytes, teacher, run.teacher.terms)


LOSSES = {"pretrain": _language_loss, "finetune": _language_loss, "distill": _distillation_loss}


def initial_params(run: runs.Run, tokens: tokenizer.Tokenizer, teacher: dict | None) -> dict | None:
    """The parameters to start from, None for random ones, with LoRA's factors and projections.

    teacher: its parameters, if any; a distilled student starts from them. With init_from they are
    those of a run; if its vocabulary differs, the embedding rows of equal pieces are copied. Prints
    what was copied.
    """
    params = None
    if teacher is not None:
        params = _params_from_teacher(run, teacher)
    elif run.init_from:
        params = _params_from_run(run, tokens)
    key = steps.key_for(run.seed, 0, features.PROJECTIONS)
    params = runs.with_projections(run, params, lambda: _random_params(run), key)
    if not run.lora.rank:
        return params
    return lora.init_lora(run.lora, params, steps.key_for(run.seed, 0, "adapters"))


def _params_from_teacher(run: runs.Run, teacher: dict) -> dict | None:
    teacher_model = runs.read_run(runs.teacher_source(run)[0]).model
    init = run.teacher.student_init
    if distill.parse_start(init) and distill.leaves_head(teacher_model, run.model):
        print(
            f"teacher.student_init {init}: model.lm_head={run.model.lm_head!r} starts as the "
            f"teacher's embedding, which was never a head; the first updates have to learn one.",
            file=sys.stderr,
        )
    return distill.init_student(init, teacher, teacher_model, run.model, run.seed)


def _params_from_run(run: runs.Run, tokens: tokenizer.Tokenizer) -> dict:
    workdir, which = runs.init_source(run)
    source = runs.read_run(workdir)
    source_tokens = runs.make_tokenizer(source)
    params, step = inference.read_params(source, source_tokens, which)
    summary, vocab_size = "all parameters whole", run.model.vocab_size
    if source_tokens.fingerprint != tokens.fingerprint or source.model.vocab_size != vocab_size:
        random = _random_params(run)
        rows = initialization.rows_by_name(tokens.names(), source_tokens.names(), vocab_size)
        flat = [checkpoints.flatten(tree) for tree in (random, params)]
        leaves, summary = initialization.carry_over(*flat, rows)
        params = jax.tree.unflatten(jax.tree.structure(random), list(leaves.values()))
    print(f"init_from {workdir}, update {step}: {summary}", file=sys.stderr)
    return params


def _random_params(run: runs.Run) -> dict:
    model = transformer.Transformer(run.model)
    return jax.jit(functools.partial(steps.init_params, model, run.seed))()


def check(run: runs.Run, allow: tuple[str, ...] = ()) -> None:
    """Raise ValueError unless data, workdir and initial checkpoint exist for this config.

    Needs no device, and writes nothing. allow: see `train`.
    """
    runs.check_workdir(run, allow)
    runs.check_columns(run)
    optimizers.check_groups(run.trained, runs.trained_shapes(run))
    workdir, which = runs.init_source(run) if run.init_from else runs.teacher_source(run)
    if workdir and not runs.is_claimed(run.workdir):
        with inference.open_checkpoints(runs.read_run(workdir), read_only=True) as saved:
            saved.find_steps(which)
    if run.teacher.cache:
        pipeline.open_teacher_cache(run.teacher.cache)


def make_strategy(
    run: runs.Run, devices: Sequence | None = None, hosts: parallel.Hosts | None = None
) -> parallel.Strategy:
    """The strategy of parallel.make_strategy; raises ValueError if it cannot divide the batch."""
    strategy = parallel.make_strategy(run.parallel, devices, hosts)
    shards = max(strategy.shards, run.parallel.fixed_shards)
    parallel.check_batch_size(run.data.batch_size, shards, run.parallel.num_microbatches)
    return strategy


def train(
    run: runs.Run,
    devices: Sequence | None = None,
    *,
    allow: tuple[str, ...] = (),
    profile: tuple[int, int] | None = None,
) -> dict[str, float]:
    """Train a run to its last update, from its newest checkpoint if it has one.

    devices: of jax, all by default. allow: dotted config keys that may differ from those of the
    checkpoints. profile: the first and last update to trace. Returns the last held-out metrics.
    Raises ValueError and OSError for what a user can cause; Unfinished and Diverged as Loop does.
    """
    with watchdog.detect_lost_host(_exit_lost_host):
        check(run, allow)
        strategy = make_strategy(run, devices)
        tokens, examples, heldout = data.prepare_data(run)
        if run.teacher.cache:
            cache = data.find_teacher_cache(run, tokens, examples)
            examples = dataclasses.replace(examples, teacher_cache=cache)
        setup = make_setup(run, strategy, tokens, examples, heldout)
        is_first_host = jax.process_index() == 0
        ledger = logs.TimeLedger(run.workdir) if is_first_host else logs.NullLog()
        with signals.Signals() as stop, ledger, inference.open_checkpoints(run) as saved:
            ledger.switch("restore")
            state, facts = _restore(setup, saved, allow)
            if _is_finished(setup, facts):
                rows = logs.read(run.workdir / logs.METRICS)
                return next((row for row in reversed(rows) if row["split"] == "heldout"), {})
            ledger.switch("start")
            state, teacher = _place_start(setup, state)
            cost = live_teacher.measure_cost(run, strategy, teacher)
            setup = dataclasses.replace(setup, teacher_cost=cost)
            with _open_log(setup, facts["step"]) if is_first_host else logs.NullLog() as log:
                updates = loop.Loop(setup, saved, log, ledger, stop, profile)
                return updates.train_from(state, facts, teacher)


def _exit_lost_host(message: str) -> NoReturn:
    watchdog.exit_now(
        f"another host was lost before the first update{message and f' ({message})'}; see its own "
        f"message, and start them all again."
    )


def _restore(
    setup: loop.TrainSetup, saved: checkpoints.Checkpoints, allow: tuple[str, ...]
) -> tuple[Any, dict]:
    """(state, facts) of the newest checkpoint; (None, facts of step 0) if there is none.

    Raises ValueError if it was made with another config, tokenizer or data, except for `allow`.
    """
    checkpoint = saved.restore(setup.strategy.abstract_state(setup.state_shapes))
    if checkpoint is None:
        return None, {"step": 0, "position": {"next_index": 0}}
    expected, stored = setup.facts, checkpoint[1]
    changes = [key for key in ("tokenizer", "data") if expected[key] != stored[key]]
    changes += runs.differences(expected["config"], runs.without_operational(stored["config"]))
    changes = [change for change in changes if not runs.is_allowed(change.split()[0], allow)]
    if changes:
        keys = ",".join(change.split()[0] for change in changes)
        raise ValueError(
            f"the checkpoints in {setup.run.workdir} were made with another {', '.join(changes)}; "
            f"continue them with the one they were made with, use another --workdir, or, to change "
            f"it midway, --allow_change={keys}."
        )
    return checkpoint


def _is_finished(setup: loop.TrainSetup, facts: dict) -> bool:
    if facts["step"] >= setup.total_steps:
        return True
    stopping = early_stopping.EarlyStopping.from_facts(setup.run, facts)
    if stopping.is_over:
        print(
            f"{setup.run.workdir}: training ended early after update {facts['step']}, for "
            f"{stopping.reason}; raise early_stopping_patience (or set it to 0) to go on.",
            file=sys.stderr,
        )
    return stopping.is_over


def _place_start(setup: loop.TrainSetup, state: Any) -> tuple[Any, Any]:
    """(placed state, placed live teacher or None); only the placed copies stay in memory."""
    run, tokens, strategy = setup.run, setup.tokens, setup.strategy
    teacher = live_teacher.load_params(run, tokens, strategy, is_fresh=state is None)
    if state is not None:
        state = strategy.place_state(state)
    else:
        state = strategy.init(setup.init_state, initial_params(run, tokens, teacher))
    return state, live_teacher.place_params(run, strategy, teacher)


@dataclasses.dataclass(frozen=True)
class Update:
    """One update of a run, independent of its data: what a strategy compiles."""

    init_state: Callable  # parameters, or None for random ones -> a fresh state
    train_step: Callable  # steps.train_step of (state, batch, teacher)
    learning_rate: Callable  # updates done -> the learning rate
    state_shapes: steps.State


def make_update(
    run: runs.Run,
    text_bytes: np.ndarray,
    total_steps: int,
    run_length: optimizers.RunLength,
    shard_activations: Callable = transformer.no_constraint,
) -> Update:
    """The update of a run of `total_steps` updates. text_bytes: int [V], of piece_bytes."""
    model, shapes = transformer.Transformer(run.model), runs.trained_shapes(run)
    optimizer, learning_rate = optimizers.make_optimizer(
        run.trained, total_steps, shapes, run_length
    )
    config = steps.StepConfig(
        seed=run.seed,
        num_microbatches=run.parallel.num_microbatches,
        reduction_shards=run.parallel.fixed_shards,
        ema_decay=run.optimizer.ema_decay,
        total_steps=total_steps,
    )
    make_loss = lookup.lookup(LOSSES, run.stage, "stage")
    loss_model = transformer.Transformer(run.model, shard_activations)
    loss = lora.with_lora(run.lora, make_loss(run, loss_model, text_bytes))
    step = functools.partial(steps.train_step, loss=loss, optimizer=optimizer, config=config)
    init_state = functools.partial(steps.init_state, model, optimizer, config)
    return Update(init_state, step, learning_rate, jax.eval_shape(init_state, shapes))


def make_setup(
    run: runs.Run,
    strategy: parallel.Strategy,
    tokens: tokenizer.Tokenizer,
    examples: pipeline.Examples,
    heldout: pipeline.Examples,
) -> loop.TrainSetup:
    """The fixed parts of a run. examples, heldout: of the training and the held-out split."""
    total_steps = runs.total_updates(run, len(examples))
    text_bytes = tokens.piece_bytes(run.model.vocab_size)
    run_length = runs.run_length(run, len(examples))
    update = make_update(run, text_bytes, total_steps, run_length, strategy.shard_activations)
    factors = {"": 1.0} | optimizers.multipliers(run.optimizer)

    def learning_rates(updates_done: int) -> dict[str, float]:
        base = float(update.learning_rate(updates_done))
        return {f"learning_rate{k and '/'}{k}": base * factor for k, factor in factors.items()}

    merge = lambda params, axis=None: lora.merge_lora(run.lora, params)
    config = runs.without_operational(run.config_dict)
    needs_scores = run.checkpoint.best_metric not in ("", *runs.HELDOUT_METRICS)
    answers = None
    if run.teacher.on_policy:
        answers = live_teacher.StudentAnswers(run, strategy, tokens.eos)
    return loop.TrainSetup(
        run=run,
        strategy=strategy,
        tokens=tokens,
        init_state=update.init_state,
        train_step=strategy.compile(update.train_step, donate=True),
        learning_rates=learning_rates,
        model_params=strategy.compile(merge) if run.lora.rank else features.model_params,
        heldout=evaluate.HeldOut(run, strategy, heldout, tokens),
        task_scorer=evaluate.TaskScorer(run, strategy, tokens) if needs_scores else None,
        examples=examples,
        state_shapes=update.state_shapes,
        total_steps=total_steps,
        flops_per_step=step_flops(run),
        facts={"config": config, "tokenizer": tokens.fingerprint, "data": examples.files},
        student_answers=answers,
    )


def _open_log(setup: loop.TrainSetup, step: int) -> logs.RunLog:
    """Claim the workdir for this config, or log the changes of its config."""
    run = setup.run
    is_fresh = not runs.is_claimed(run.workdir)
    changes = [] if is_fresh else runs.differences(run.config_dict, runs.read_config(run.workdir))
    if is_fresh or changes:
        runs.claim(run, setup.tokens)
    if is_fresh:
        facts = {
            "stage": run.stage,
            "config": run.config_dict,
            "params": transformer.parameter_count(run.model),
            "trained": optimizers.trained_count(run.trained, setup.state_shapes.params),
            "devices": [str(device.device_kind) for device in setup.strategy.devices],
            "data": setup.examples.facts,
            "files": setup.examples.files,
            "tokenizer": setup.tokens.fingerprint,
            "flops_per_step": setup.flops_per_step,
        }
        facts |= planned_cost(run, setup.total_steps) | setup.teacher_cost
        logs.write_manifest(run.workdir, facts)
    log = logs.RunLog(run.workdir, setup.total_steps, name=run.name, resume_step=step)
    if changes:
        log.event("changed", step, keys=changes)
    return log


def planned_cost(run: runs.Run, total_steps: int) -> dict[str, int]:
    """The updates, tokens (padding counted) and model FLOPs of a whole run."""
    tokens = total_steps * runs.run_length(run, 0).tokens
    flops = total_steps * step_flops(run)
    return {"planned_updates": total_steps, "planned_tokens": tokens, "planned_flops": flops}


def step_flops(run: runs.Run) -> int:
    """Model FLOPs of one update: forward and backward, and a live teacher's forward pass."""
    inputs, targets = run.lengths
    flops = 3 * transformer.forward_flops(run.model, inputs, targets)
    if run.stage == "distill" and not run.teacher.cache:
        flops += transformer.forward_flops(live_teacher.teacher_config(run), inputs, targets)
    return flops * run.data.batch_size
