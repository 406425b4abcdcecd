"""How long does saving a checkpoint delay training? Answer: save_cost.md.

python -m experiments.save_cost

A state of about 10 million parameters with AdamW's two moments, on one CPU device; saves and
updates in turns in one run. The table has medians; save_cost.jsonl has every repeat.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import numpy as np

from experiments import records
from lm import batch, checkpoints, optimizers, steps, transformer

NAME = "save_cost"
ROWS, INPUTS, TARGETS = 8, 256, 64
MODEL = transformer.ModelConfig(
    vocab_size=8192,
    d_model=256,
    d_ff=1024,
    num_heads=4,
    num_kv_heads=4,
    head_dim=64,
    num_encoder_layers=3,
    num_decoder_layers=3,
)


def seconds(work: Callable, *arguments) -> float:
    """The wall time of a call."""
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def make_update():
    """Returns the initial state and a compiled update, state -> state, on random tokens."""
    config = optimizers.OptimizerConfig(name="adamw")
    pace = optimizers.RunLength(100.0, ROWS * (INPUTS + TARGETS))
    optimizer, _ = optimizers.make_optimizer(config, 100, transformer.param_shapes(MODEL), pace)
    model, step_config = transformer.Transformer(MODEL), steps.StepConfig()
    text_bytes = np.ones(MODEL.vocab_size, np.float32)
    loss = steps.make_language_loss(model, steps.LossConfig(), text_bytes)
    rng = np.random.default_rng(0)
    rows = lambda length: rng.integers(3, MODEL.vocab_size, (ROWS, length)).astype(np.int32)
    ones = lambda length: np.ones((ROWS, length), np.int32)
    examples = batch.Batch(rows(INPUTS), ones(INPUTS), rows(TARGETS), ones(TARGETS))
    step = functools.partial(steps.train_step, loss=loss, optimizer=optimizer, config=step_config)
    update = jax.jit(lambda state: step(state, examples)[0], donate_argnums=0)
    return jax.jit(lambda: steps.init_state(model, optimizer, step_config))(), update


def measure(repeats: int) -> list[dict]:
    """Rows of the record: what was timed, and the seconds of every repeat."""
    state, update = make_update()
    state = update(state)
    seconds_by_name: dict[str, list[float]] = {}
    summed = lambda trees: jax.device_get(checkpoints.tree_checksums(trees))
    summed({"params": state.params, "opt_state": state.opt_state})
    for _ in range(repeats):
        for background in (True, False):
            name = "in the background" if background else "not in the background"
            with (
                tempfile.TemporaryDirectory() as folder,
                checkpoints.Checkpoints(folder, background=background) as saved,
            ):
                saved.save(state, {})  # compiles the checksums, makes the threads
                saved.wait()
                state = jax.block_until_ready(update(state))
                times = {f"save, {name}: the loop waits": seconds(saved.save, state, {})}
                times[f"save, {name}: then until it is on disk"] = seconds(saved.wait)
            for name, value in times.items():
                seconds_by_name.setdefault(name, []).append(value)
        trees = {"params": state.params, "opt_state": state.opt_state}
        times = {"of it the checksums on the device": seconds(summed, trees)}
        start = time.perf_counter()
        state = jax.block_until_ready(update(state))
        times["an update"] = time.perf_counter() - start
        for name, value in times.items():
            seconds_by_name.setdefault(name, []).append(value)
    return [{"what": name, "seconds": values} for name, values in seconds_by_name.items()]


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    update = statistics.median(next(r for r in rows if r["what"] == "an update")["seconds"])
    lines = []
    for row in rows:
        middle, ends = statistics.median(row["seconds"]), sorted(row["seconds"])
        spread = f"{ends[0]:.3f} .. {ends[-1]:.3f}"
        lines.append([row["what"], f"{middle:.3f}", spread, f"{middle / update:.2f}"])
    return records.markdown(("what", "seconds", "lowest .. highest", "updates"), lines)


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints the table and saves it."""
    parser = records.parser(NAME, __doc__)
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args(arguments)
    stamp = records.stamp() | dict(parameters=transformer.parameter_count(MODEL))
    rows = records.save(flags.out, NAME, [row | stamp for row in measure(flags.repeats)])
    records.put_table(flags.out, NAME, table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
