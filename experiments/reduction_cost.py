"""What does parallel.deterministic_reduction=True cost an update? Answer: reduction_cost.md.

python -m experiments.reduction_cost [--rounds=10]

Times updates of the same model with both reductions in turns, in one process, on 1 and on 2 devices
that share the machine's cores. The table has medians; reduction_cost.jsonl has every time.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
os.environ.setdefault("NPROC", "32")  # fewer and XLA's collectives deadlock on two cores

import functools
import statistics
import time

import jax
import numpy as np

from experiments import records
from lm import batch, optimizers, parallel, steps, transformer

NAME = "reduction_cost"
ROWS, INPUTS, TARGETS = 16, 128, 32
MODEL = transformer.ModelConfig(
    vocab_size=4096,
    d_model=128,
    d_ff=512,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    num_encoder_layers=2,
    num_decoder_layers=2,
    dropout_rate=0.1,
)


def update(devices: int, reduction: str):
    """Returns a compiled function that takes one update and waits for it."""
    config = parallel.ParallelConfig(deterministic_reduction=reduction == "fixed")
    strategy = parallel.make_strategy(config, jax.devices()[:devices])
    shapes, model = transformer.param_shapes(MODEL), transformer.Transformer(MODEL)
    optimizer, _ = optimizers.make_optimizer(
        optimizers.OptimizerConfig(name="adamw", learning_rate=1e-3, warmup={"steps": 0}),
        1000,
        shapes,
        optimizers.RunLength(1.0, 1),
    )
    text_bytes = np.ones(MODEL.vocab_size, np.int32)
    loss = steps.make_language_loss(model, steps.LossConfig(), text_bytes)
    step_config = steps.StepConfig(reduction_shards=config.fixed_shards)
    step = functools.partial(steps.train_step, loss=loss, optimizer=optimizer, config=step_config)
    compiled = strategy.compile(step, donate=True)
    state = [strategy.init(lambda: steps.init_state(model, optimizer, step_config))]
    rng = np.random.default_rng(0)
    side = lambda columns: (
        rng.integers(3, MODEL.vocab_size, (ROWS, columns)).astype(np.int32),
        np.ones((ROWS, columns), np.int32),
    )
    placed = strategy.place_batch(batch.Batch(*side(INPUTS), *side(TARGETS)))

    def run_update() -> None:
        state[0], sums = compiled(state[0], placed)
        jax.block_until_ready(sums)

    run_update()
    return run_update


def measure(rounds: int) -> list[dict]:
    """A row for each number of devices and reduction: seconds of each update, in turns."""
    arms = [(devices, kind) for devices in (1, 2) for kind in ("fast", "fixed")]
    updates = {arm: update(*arm) for arm in arms}
    seconds: dict = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, run_update in updates.items():
            start = time.perf_counter()
            run_update()
            seconds[arm].append(time.perf_counter() - start)
    return [
        {"devices": devices, "reduction": kind, "seconds": seconds[devices, kind]}
        for devices, kind in arms
    ]


def table(rows: list[dict]) -> str:
    """A Markdown table of medians, with the ratio of deterministic to fast."""
    median = {(r["devices"], r["reduction"]): statistics.median(r["seconds"]) for r in rows}
    lines = ["| devices | fast, ms | fixed, ms | fixed / fast |", "|---|---|---|---|"]
    for devices in (1, 2):
        fast, fixed = median[devices, "fast"], median[devices, "fixed"]
        lines.append(f"| {devices} | {1e3 * fast:.0f} | {1e3 * fixed:.0f} | {fixed / fast:.2f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure, and save the record and the table."""
    parser = records.parser(NAME, __doc__)
    parser.add_argument("--rounds", type=int, default=10, help="updates of each kind")
    flags = parser.parse_args(arguments)
    stamp = records.stamp()
    rows = records.save(flags.out, NAME, [row | stamp for row in measure(flags.rounds)])
    records.put_table(flags.out, NAME, table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
