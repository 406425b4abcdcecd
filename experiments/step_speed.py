"""How many sequences per second does a training step take, in lm and transformers? step_speed.md.

  python -m experiments.step_speed [--sizes=small,base,large] [--batch=8] [--repeats=3]
                                   [--arms=ours,eager,compiled] [--seconds=15]

T5 1.1 at 512 input and 114 target tokens, AdamW, the same precision: float32 on CPU, bfloat16
products and float32 parameters on a GPU. Each turn of an arm is a separate process; arms take
turns, so that a slower machine slows all of them, and ratios are those of a turn. The table has
medians; step_speed.jsonl has every turn. Other sizes keep their recorded rows.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import tqdm

from configs import models
from experiments import records
from lm import batch, logs, lookup, optimizers, steps, transformer

NAME = "step_speed"
INPUTS, TARGETS = 512, 114  # tokens of a row
BATCHES = {"small": 8, "base": 4, "large": 2, "toy": 2}  # rows of a step; toy is for tests
TOY = dict(d_model=16, d_ff=32, num_heads=2, num_kv_heads=2, head_dim=8)
TOY |= dict(num_encoder_layers=1, num_decoder_layers=1)
RATE, DECAY, CLIP, BETAS = 1e-3, 0.01, 1.0, (0.9, 0.98)  # of AdamW


def rows(count: int) -> batch.Batch:
    """A batch of random tokens without padding, as numpy arrays."""
    rng = np.random.default_rng(0)
    ids = lambda length: rng.integers(3, 32_000, (count, length), dtype=np.int32)
    ones = lambda length: np.ones((count, length), np.int32)
    return batch.Batch(ids(INPUTS), ones(INPUTS), ids(TARGETS), ones(TARGETS))


def paced(step: Callable[[], None], seconds: float) -> list[float]:
    """Seconds of each step, at least 2 steps and `seconds` in all, after one that is not timed."""
    step()
    durations = []
    while len(durations) < 2 or sum(durations) < seconds:
        start = time.perf_counter()
        step()
        durations.append(time.perf_counter() - start)
    return durations


# The arms. ---------------------------------------------------------------------------------------


def model_config(size: str, **words) -> transformer.ModelConfig:
    """The preset of T5 1.1 of a size, without dropout as in pre-training."""
    preset = f"t5_1_1_{'small' if size == 'toy' else size}"
    _, _, keys = lookup.lookup(models.PRESETS, preset, "the preset")
    return transformer.ModelConfig(**keys | words | (TOY if size == "toy" else {}))


def ours(size: str, count: int, seconds: float) -> dict:
    """Times lm's training step: steps.train_step with AdamW."""
    import jax

    on_cpu = jax.default_backend() == "cpu"
    config = model_config(size, dtype="float32" if on_cpu else "bfloat16")
    model, step_config = transformer.Transformer(config), steps.StepConfig()
    options = dict(
        name="adamw",
        learning_rate=RATE,
        schedule="constant",
        warmup={"steps": 0},
        grad_clip_norm=CLIP,
    )
    options |= dict(weight_decay=DECAY, beta1=BETAS[0], beta2=BETAS[1])
    run_length = optimizers.RunLength(1.0, count * (INPUTS + TARGETS))
    optimizer_config = optimizers.OptimizerConfig(**options)
    optimizer, _ = optimizers.make_optimizer(
        optimizer_config, 1000, transformer.param_shapes(config), run_length
    )
    state = jax.jit(lambda: steps.init_state(model, optimizer, step_config))()
    text_bytes = np.ones(config.vocab_size, np.int32)
    loss = steps.make_language_loss(model, steps.LossConfig(), text_bytes)
    take = functools.partial(steps.train_step, loss=loss, optimizer=optimizer, config=step_config)
    examples = jax.device_put(rows(count))

    start = time.perf_counter()
    take = jax.jit(take, donate_argnums=0).lower(state, examples).compile()
    compiling = time.perf_counter() - start

    def step():
        nonlocal state
        state, sums = take(state, examples)
        jax.block_until_ready((state, sums))

    durations = paced(step, seconds)
    (memory,) = logs.memory_peak(jax.devices()).values()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    measurements = dict(
        seconds=durations, compile_seconds=compiling, memory_gib=memory, parameters=parameters
    )
    return measurements | dict(device=jax.devices()[0].device_kind)


def theirs(size: str, count: int, seconds: float, compiled: bool) -> dict:
    """Times transformers' T5 of the same sizes in the usual PyTorch training step."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = their_model(size).to(device).train()
    adamw = dict(lr=RATE, betas=BETAS, weight_decay=DECAY, fused=True)
    optimizer = torch.optim.AdamW(model.parameters(), **adamw)
    forward = torch.compile(model) if compiled else model
    wide = device == "cpu"
    examples = rows(count)
    fields = (examples.inputs, examples.inputs_segment_ids, examples.targets)
    inputs, mask, labels = (torch.tensor(x, dtype=torch.int64, device=device) for x in fields)
    batch = dict(input_ids=inputs, attention_mask=mask, labels=labels)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=not wide):
            loss = forward(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if not wide:
            torch.cuda.synchronize()

    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    durations = paced(step, seconds)
    (memory,) = (
        logs.memory_peak([]).values() if wide else (torch.cuda.max_memory_allocated() / 2**30,)
    )
    parameters = sum(weight.numel() for weight in model.parameters())
    measurements = dict(seconds=durations, memory_gib=memory, parameters=parameters)
    measurements |= dict(compile_seconds=first - statistics.median(durations) if compiled else 0.0)
    return measurements | dict(torch=torch.__version__, transformers=transformers.__version__)


def their_model(size: str):
    """transformers' T5 with the same sizes and an untied head."""
    import transformers

    ours = model_config(size)
    sizes = dict(d_model=ours.d_model, d_ff=ours.d_ff, num_heads=ours.num_heads)
    sizes |= dict(d_kv=ours.head_dim, num_layers=ours.num_encoder_layers)
    sizes |= dict(num_decoder_layers=ours.num_decoder_layers, vocab_size=ours.vocab_size)
    words = dict(feed_forward_proj="gated-gelu", dropout_rate=0.0, decoder_start_token_id=0)
    words |= dict(tie_word_embeddings=False, use_cache=False)
    config = transformers.T5Config(**sizes, **words)
    config.tie_word_embeddings = False  # version 5 ties all or nothing, whatever it is told
    model = transformers.T5ForConditionalGeneration(config)
    model.set_input_embeddings(model.shared)  # one table for both towers, as in T5 1.1
    return model


def matmul(size: str, count: int, seconds: float) -> dict:
    """FLOP/s of matrix products on this machine, by XLA and by PyTorch in the same precision."""
    import jax
    import torch

    on_cpu = not torch.cuda.is_available()
    width, dtype = (1024, torch.float32) if on_cpu else (8192, torch.bfloat16)
    square = torch.ones((width, width), dtype=dtype, device="cpu" if on_cpu else "cuda")

    def step():
        square @ square
        if not on_cpu:
            torch.cuda.synchronize()

    fastest = 2 * width**3 / statistics.median(paced(step, 0.3))
    return dict(xla=logs.measured_flops(jax.devices()[0]), torch=fastest)


ARMS = {
    "ours": ours,
    "eager": functools.partial(theirs, compiled=False),
    "compiled": functools.partial(theirs, compiled=True),
}  # name -> a turn: (size, rows of a step, seconds to measure) -> its figures


# The program. ------------------------------------------------------------------------------------


def turn(arm: str, size: str, count: int, seconds: float, cache: str) -> dict:
    """Runs one turn in its own process and returns its measurements."""
    arguments = dict(arm=arm, size=size, count=count, seconds=seconds)
    caches = dict(
        JAX_COMPILATION_CACHE_DIR=f"{cache}/jax", TORCHINDUCTOR_CACHE_DIR=f"{cache}/torch"
    )
    command = [sys.executable, "-m", "experiments.step_speed", "--turn", json.dumps(arguments)]
    process = subprocess.run(command, env=os.environ | caches, capture_output=True, text=True)
    if process.returncode:
        raise RuntimeError(f"the turn {arguments} failed:\n{process.stderr}")
    return arguments | json.loads(process.stdout.splitlines()[-1])


def summary(size: str, count: int, turns: list[dict], peak: float) -> list[dict]:
    """A row for each arm of one size: medians over its turns, and the ratio of lm in each turn."""
    flops = 3 * count * transformer.forward_flops(model_config(size), INPUTS, TARGETS)
    turns_by_arm = {arm: [t for t in turns if t["arm"] == arm] for arm in ARMS}
    rate = lambda turn: count / statistics.median(turn["seconds"])
    summaries = []
    for arm, arm_turns in turns_by_arm.items():
        if not arm_turns:
            continue
        rates = [rate(turn) for turn in arm_turns]
        row = dict(size=size, arm=arm, batch=count, sequences_per_second=statistics.median(rates))
        row["mfu"] = row["sequences_per_second"] / count * flops / peak
        row["memory_gib"] = max(turn["memory_gib"] for turn in arm_turns)
        row["compile_seconds"] = arm_turns[0]["compile_seconds"]  # the later ones find it cached
        row["ratios"] = [
            rate(turn) / arm_rate
            for turn, arm_rate in zip(turns_by_arm["ours"], rates, strict=False)
        ]
        summaries.append(
            row | dict(peak_flops=peak, parameters=arm_turns[0]["parameters"], turns=arm_turns)
        )
    return summaries


def measure(size: str, count: int, names: list[str], repeats: int, seconds: float) -> list[dict]:
    """Measures one size: `repeats` turns of every arm, in turns."""
    turns, peaks = [], []
    with tempfile.TemporaryDirectory() as cache:
        order = [(repeat, arm) for repeat in range(repeats) for arm in ("matmul", *names)]
        for _, arm in tqdm.tqdm(order, desc=size, unit="turn", mininterval=0):
            measurement = turn(arm, size, count, seconds, cache)
            (peaks if arm == "matmul" else turns).append(measurement)
    peak = statistics.median([max(peak_turn["xla"], peak_turn["torch"]) for peak_turn in peaks])
    rows = summary(size, count, turns, peak)
    return [row | dict(matmul=peaks) for row in rows]


def table(rows: list[dict]) -> str:
    """The rows of all sizes as a Markdown table."""
    names = dict(ours="ours", eager="transformers, eager", compiled="transformers, torch.compile")
    header = ["T5 1.1", "batch", "arm", "sequences/s", "ours / it (lowest .. highest)"]
    header += ["best step, s", "ours / it by it", "MFU", "GiB", "compile, s"]
    lines = []
    best = lambda row: min(duration for turn in row["turns"] for duration in turn["seconds"])
    ours = {row["size"]: best(row) for row in rows if row["arm"] == "ours"}
    for row in rows:
        ratios, size = row["ratios"], f"{row['size']}, {row['parameters'] / 1e6:.0f} M"
        shown = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"
        cells = [size, row["batch"], names[row["arm"]], f"{row['sequences_per_second']:.3g}"]
        alone = row["arm"] == "ours" or not ratios
        cells += ["" if alone else shown, f"{best(row):.3g}"]
        cells += ["" if alone else f"{best(row) / ours[row['size']]:.2f}", f"{row['mfu']:.1%}"]
        cells += [f"{row['memory_gib']:.1f}", f"{row['compile_seconds']:.0f}"]
        lines.append(cells)
    return records.markdown(header, lines)


def main(arguments: list[str] | None = None) -> None:
    """Measures the sizes, and prints and saves their table."""
    parser = records.parser(NAME, __doc__)
    parser.add_argument("--sizes", type=records.words, default=["small", "base", "large"])
    parser.add_argument("--arms", type=records.words, default=list(ARMS))
    parser.add_argument("--batch", type=int, default=0, help="rows of a step; 0: by size")
    parser.add_argument("--repeats", type=int, default=3, help="turns of every arm")
    parser.add_argument("--seconds", type=float, default=15, help="least time of a turn")
    parser.add_argument("--turn", type=json.loads, help="internal: one turn, as JSON")
    flags = parser.parse_args(arguments)
    if flags.turn:
        arm = flags.turn.pop("arm")
        print(json.dumps((ARMS | {"matmul": matmul})[arm](**flags.turn)))
        return
    for size in flags.sizes:
        count = flags.batch or lookup.lookup(BATCHES, size, "--sizes")
        names = [arm for arm in flags.arms if lookup.lookup(ARMS, arm, "--arms")]
        stamp = records.stamp()
        rows = [row | stamp for row in measure(size, count, names, flags.repeats, flags.seconds)]
        order = lambda row: list(BATCHES).index(row["size"])
        records.put_table(flags.out, NAME, table(records.save(flags.out, NAME, rows, order)))
        print(table(rows))


if __name__ == "__main__":
    main()
