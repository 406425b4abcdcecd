"""Show batches as text, and tables of a model's parameters and their sharding."""

from __future__ import annotations

import jax

from lm import checkpoints, lookup, optimizers, parallel, pipeline, runs, steps, transformer


def rows(run: runs.Run, split: str, count: int, step: int = 1) -> str:
    """Return the first rows of a split as text: what the encoder reads, what the decoder predicts.

    Args:
      run: the run whose data to show.
      split: "train", or "heldout": the first rows of each task of a mixture.
      count: rows to show, at most a batch.
      step: the update whose batch to show, for split "train" (in a run without skipped batches).
    """
    if count < 1:
        raise ValueError(f"--rows={count} shows nothing; use 1 or more.")
    if step < 1 or (split != "train" and step > 1):
        raise ValueError(f"--step={step} is no update of --split=train; use 1 or more there.")
    tokens = runs.make_tokenizer(run)
    train, heldout = runs.make_examples(run, tokens)
    lookup.lookup({"train": train, "heldout": heldout}, split, "--split")
    if split == "train":
        order, size = pipeline.row_order(train, run.seed), run.data.batch_size
        start = (step - 1) * size
        names = [train.locate(order[start + i])[0].name for i in range(min(count, size))]
        batches = [(names, next(iter(pipeline.train_batches(train, run.seed, start=step - 1))))]
    else:
        batches = []
        for task in heldout.splits:
            batch = next(pipeline.heldout_batches(pipeline.Examples((task,)), run.seed, count))
            batches.append(([task.name] * min(count, run.data.batch_size), batch))
    lines = []
    for names, batch in batches:
        for name, *row in zip(names, *batch[:4], strict=False):
            lines += _row_lines(row, f"{name}: " if len(run.data.names) > 1 else "", tokens)
    return "\n".join(lines)


def _row_lines(row: list, task: str, tokens) -> list[str]:
    """The lines of a row, segment by segment if it is packed."""
    inputs, inputs_segments, targets, targets_segments = row
    lines, is_packed = [], targets_segments.max() > 1
    for segment in range(1, targets_segments.max() + 1):
        label = task + (f"segment {segment}: " if is_packed else "")
        for name, ids, segments in (
            ("encoder sees", inputs, inputs_segments),
            ("decoder must say", targets, targets_segments),
        ):
            ids = ids[segments == segment]
            has_eos = ids[-1] == tokens.eos
            end = ", then eos" if has_eos else ", cut"
            lines += [f"--- {label}{name} ({len(ids) - has_eos} tokens{end})", tokens.decode(ids)]
    return lines


def parameters(run: runs.Run) -> str:
    """Return the table of parameters (path, shape, count, share), and FLOPs per token."""
    shapes = runs.trained_shapes(run)
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    row = "{:<48} {:>20} {:>15} {:>8}".format
    lines = [row("parameter", "shape", "count", "share")]
    for path, leaf in checkpoints.flatten(shapes).items():
        shape = " ".join(map(str, leaf.shape))
        lines.append(row(path, shape, f"{leaf.size:,}", f"{leaf.size / total:.2%}"))
    lines.append(row("total", "", f"{total:,}", "100.00%"))
    trained = optimizers.trained_count(run.trained, shapes)
    if trained < total:
        lines.append(f"trained: {trained:,} ({trained / total:.2%}); frozen: {total - trained:,}")
    inputs, targets = run.lengths
    flops = transformer.forward_flops(run.model, inputs, targets)
    lines.append(
        f"forward FLOPs: {flops / (inputs + targets):,.0f} per token, of a row of {inputs} input "
        f"and {targets} target tokens ({flops:,}); a training step takes 3 times that."
    )
    return "\n".join(lines)


def sharding(run: runs.Run) -> str:
    """Return the table of what each device stores of every parameter and its optimizer state.

    It follows from the config's parallel sizes (data=-1 counts as 1); no device is needed.
    """
    shapes = runs.trained_shapes(run)
    length = optimizers.RunLength(1.0, 2**31)  # no shape depends on the run's length
    optimizer, _ = optimizers.make_optimizer(run.trained, 2**31 - 1, shapes, length)
    config = steps.StepConfig(ema_decay=run.optimizer.ema_decay)
    model = transformer.Transformer(run.model)
    state = jax.eval_shape(lambda tree: steps.init_state(model, optimizer, config, tree), shapes)
    return parallel.sharding_table(run.parallel, state)
