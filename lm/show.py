"""A batch as text, and a model as a table of its parameters or of where they lie."""

from __future__ import annotations

import math
import re

import jax

from lm import checkpoints, layers, lookup, optimizers, parallel, pipeline, runs, steps, transformer


def rows(run: runs.Run, split: str, count: int, step: int = 1) -> str:
    """The first rows of a split, at most `count` and one batch: what the encoder sees, what the
    decoder must say. Of a mixture's held-out split, the first of each task. step: of training, the
    update that takes the batch, in a run that passes over none.
    """
    if count < 1:
        raise ValueError(f"--rows={count} shows nothing; use 1 or more.")
    if step < 1 or (split != "train" and step > 1):
        raise ValueError(f"--step={step} is no update of --split=train; use 1 or more there.")
    tokens = runs.make_tokenizer(run)
    train, heldout = runs.make_examples(run, tokens)
    seed = run.seed
    lookup.lookup({"train": train, "heldout": heldout}, split, "--split")
    if split == "train":
        order, size = pipeline.row_order(train, seed), run.data.batch_size
        first = (step - 1) * size
        names = [train.locate(order[first + i])[0].name for i in range(min(count, size))]
        shown = [(names, next(iter(pipeline.train_batches(train, seed, start=step - 1))))]
    else:
        alone = [pipeline.Examples((split,)) for split in heldout.splits]
        firsts = [next(pipeline.heldout_batches(part, seed, count)) for part in alone]
        names = [[split.name] * min(count, run.data.batch_size) for split in heldout.splits]
        shown = zip(names, firsts, strict=True)
    said = []
    for names, batch in shown:
        for name, *row in zip(names, *batch[:4], strict=False):
            said += _row(row, f"{name}: " if len(run.data.names) > 1 else "", tokens)
    return "\n".join(said)


def _row(row: list, task: str, tokens) -> list[str]:
    """The lines of a row: of each of its segments, where pairs are packed in it."""
    inputs, inputs_segments, targets, targets_segments = row
    said, packed = [], targets_segments.max() > 1
    for segment in range(1, targets_segments.max() + 1):
        place = f"segment {segment}: " if packed else ""
        for name, ids, segments in (
            ("encoder sees", inputs, inputs_segments),
            ("decoder must say", targets, targets_segments),
        ):
            real = ids[segments == segment]
            ended = real[-1] == tokens.eos
            end = ", then eos" if ended else ", cut"
            said.append(f"--- {task}{place}{name} ({len(real) - ended} tokens{end})")
            said.append(tokens.decode(real))
    return said


# The standard deviation that a parameter starts with, by the end of its path; the first match wins.
# config: of the parameter's tower; shape: its own; fan_in: the product of the axes it sums over.
STARTS = (
    (r"norm/(scale|bias)$", lambda config, fan_in, shape: 0.0),
    (r"kernel/a$", lambda config, fan_in, shape: (3 * math.prod(shape[1:-1])) ** -0.5),
    (r"kernel/b$", lambda config, fan_in, shape: 0.0),
    (r"relative_bias$", lambda config, fan_in, shape: (2 / sum(shape[-2:])) ** 0.5),
    (r"embedding$", lambda config, fan_in, shape: _embedding_std(config)),
    (r"query/kernel$", lambda config, fan_in, shape: _query_start(config) * fan_in**-0.5),
    (r"head$", lambda config, fan_in, shape: (layers.head_variance(shape[1]) / fan_in) ** 0.5),
    (r"kernel$", lambda config, fan_in, shape: fan_in**-0.5),
)


def _embedding_std(config) -> float:
    small = config.embedding_scale == "sqrt_d_model" or config.lm_head == "tied_unscaled"
    return config.d_model**-0.5 if small else 1.0


def _query_start(config) -> float:
    normed = config.attention.query_key_norm != "none"
    return 1.0 if normed else config.head_dim**-0.5 / config.attention.scale


def initial_std(model: transformer.ModelConfig, path: str, shape: tuple[int, ...]) -> float:
    """The standard deviation of a parameter's initial values, 0 for constants.

    path: as encoder.layers.self_attention.query.kernel. Source: T5X's initialisers,
    t5x/examples/t5/layers.py.
    """
    *_, end = path = path.replace(".", "/").split("/")
    side = (
        "encoder" if path[0].startswith("encoder") and model.shared_params != "all" else "decoder"
    )
    inputs = shape[:1] if end == "head" else shape[1:3] if path[-2] == "out" else shape[1:2]
    for pattern, start in STARTS:
        if re.search(pattern, "/".join(path)):
            return start(model.tower(side), math.prod(inputs), shape)
    raise ValueError(f"no initial std is known for parameter {'/'.join(path)}.")


def parameters(run: runs.Run) -> str:
    """The table of parameters: path, shape, count, initial std, share; and FLOPs per token."""
    shapes = runs.trained_shapes(run)
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    row = "{:<48} {:>20} {:>15} {:>11} {:>8}".format
    said = [row("parameter", "shape", "count", "initial std", "share")]
    for path, leaf in checkpoints.flatten(shapes).items():
        shape, std = " ".join(map(str, leaf.shape)), initial_std(run.model, path, leaf.shape)
        said.append(row(path, shape, f"{leaf.size:,}", f"{std:.5f}", f"{leaf.size / total:.2%}"))
    said.append(row("total", "", f"{total:,}", "", "100.00%"))
    trained = optimizers.trained_count(run.trained, shapes)
    if trained < total:
        said.append(f"trained: {trained:,} ({trained / total:.2%}); frozen: {total - trained:,}")
    inputs, targets = run.lengths
    flops = transformer.forward_flops(run.model, inputs, targets)
    said.append(
        f"forward FLOPs: {flops / (inputs + targets):,.0f} per token, of a row of {inputs} input "
        f"and {targets} target tokens ({flops:,}); a training step takes 3 times that."
    )
    return "\n".join(said)


def sharding(run: runs.Run) -> str:
    """The table of what a device holds: of each parameter, and of what the optimizer keeps of it.

    For the config's own parallel.* sizes, of which data=-1 counts as 1; no device is needed.
    """
    shapes = runs.trained_shapes(run)
    endless = optimizers.RunLength(1.0, 2**31)  # no shape follows from a duration
    optimizer, _ = optimizers.make_optimizer(run.trained, 2**31 - 1, shapes, endless)
    config = steps.StepConfig(ema_decay=run.optimizer.ema_decay)
    model = transformer.Transformer(run.model)
    state = jax.eval_shape(lambda tree: steps.init_state(model, optimizer, config, tree), shapes)
    return parallel.sharding_table(run.parallel, state)
