"""Laws of the tables of parameters and sharding, and of batches as text."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import pytest

from configs import base, models
from lm import objectives, optimizers, parallel, pipeline, runs, show, steps, transformer

PRESETS = ("tiny", "t5_small", "umt5_small", "t5gemma_9b_2b")


def table_of(preset):
    """The run of a preset, and the lines of its table."""
    config = models.apply(base.get_config().unlock(), preset)
    run = runs.make_run(config.to_dict(), "nowhere")
    return run, show.parameters(run).splitlines()


def rows_of(lines):
    """[(path, shape, count, share in %), ...] as printed."""
    rows = []
    for line in lines[1:-2]:
        path, *shape, count, share = line.split()
        sizes = tuple(int(size) for size in shape)
        rows.append((path, sizes, int(count.replace(",", "")), float(share.removesuffix("%"))))
    return rows


@pytest.mark.parametrize("preset", PRESETS)
def test_the_table_has_every_parameter_and_adds_up(preset):
    run, lines = table_of(preset)
    rows, total = rows_of(lines), transformer.parameter_count(run.model)
    for _, shape, size, share in rows:
        assert size == math.prod(shape)
        assert share == pytest.approx(100 * size / total, abs=0.005001)
    assert sum(size for _, _, size, _ in rows) == total
    assert f"{total:,}" in lines[-2] and "100.00%" in lines[-2]
    assert sum(share for *_, share in rows) == pytest.approx(100, abs=0.005 * len(rows))
    assert lines[0].split() == ["parameter", "shape", "count", "share"]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_paths_are_those_of_the_parameter_tree(preset):
    run, lines = table_of(preset)
    listed = {path: shape for path, shape, *_ in rows_of(lines)}
    shapes = transformer.param_shapes(run.model)
    for path, shape in listed.items():
        leaf = shapes
        for part in re.split(r"[./]", path):
            leaf = leaf[part]
        assert leaf.shape == shape


@pytest.mark.parametrize("preset", ["tiny", "t5gemma_9b_2b"])
def test_flops_per_token_are_those_of_a_row_over_its_tokens(preset):
    run, lines = table_of(preset)
    inputs, targets = run.lengths
    flops = transformer.forward_flops(run.model, inputs, targets)
    per_token, num_inputs, num_targets, row_flops = re.search(
        r"([\d,]+) per token, of a row of (\d+) input and (\d+) target tokens \(([\d,]+)\)",
        lines[-1],
    ).groups()
    assert (int(num_inputs), int(num_targets)) == (inputs, targets)
    assert int(row_flops.replace(",", "")) == flops
    assert int(per_token.replace(",", "")) == round(flops / (inputs + targets))


LAYOUTS = {
    "adamw": {"data": 2, "fsdp": 2, "tensor": 2},
    "adafactor": {"fsdp": 4, "tensor": 2},
}


@pytest.mark.parametrize("optimizer", LAYOUTS)
def test_the_sharding_table_equals_what_a_device_stores(optimizer, tiny_config):
    """Compared with arrays on eight devices."""
    keys = {f"parallel.{axis}": size for axis, size in LAYOUTS[optimizer].items()}
    keys |= {"parallel.strategy": "mesh", "optimizer.name": optimizer, "optimizer.ema_decay": 0.9}
    run = runs.make_run(tiny_config(**keys), "nowhere")
    title, head, *lines, total = show.sharding(run).splitlines()
    strategy = parallel.make_strategy(run.parallel)
    length = optimizers.RunLength(1.0, 1)
    shapes = transformer.param_shapes(run.model)
    optimizer, _ = optimizers.make_optimizer(run.optimizer, 6, shapes, length)
    model, plan = transformer.Transformer(run.model), steps.StepConfig(ema_decay=0.9)
    make = lambda: steps.init_state(model, optimizer, plan, jax.tree.map(jnp.zeros_like, shapes))
    state = strategy.init(make)
    local = lambda x: x.addressable_shards[0].data
    placed = {
        parallel.path_of(path): (leaf.shape, local(leaf).shape, local(leaf).nbytes)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
    }
    assert len(lines) == len(placed) and "mesh" in title and head.startswith("parameter")
    for line in lines:
        path, *words, mebibytes, _ = line.split()
        numbers = [int(word) for word in words if word.isdecimal()]
        shape, local_shape, size = placed[path]
        assert numbers == [*shape, *local_shape] and mebibytes == f"{size / 2**20:.3f}"
    params_mebibytes, state_mebibytes = (float(word) for word in total.split()[1:])
    assert params_mebibytes == pytest.approx(
        sum(size for *_, size in placed.values()) / 2**20, abs=6e-4
    )
    leaves = jax.tree.leaves((state.opt_state, state.average))
    assert state_mebibytes == pytest.approx(sum(local(x).nbytes for x in leaves) / 2**20, abs=6e-4)


def test_the_sharding_table_needs_no_devices_and_refuses_sizes_that_do_not_divide(tiny_config):
    keys = {
        "parallel.strategy": "mesh",
        "parallel.fsdp": 16,
        "optimizer.ema_decay": 0.5,
    }
    text = show.sharding(runs.make_run(tiny_config(**keys), "nowhere"))
    assert text.startswith("mesh: data 1 x fsdp 16 x tensor 1 = 16 devices\n")
    with pytest.raises(ValueError, match="axis of 16 does not divide over fsdp=32"):
        show.sharding(runs.make_run(tiny_config(**keys | {"parallel.fsdp": 32}), "nowhere"))


def test_a_negative_number_of_rows_is_refused(tiny_config, tmp_path):
    with pytest.raises(ValueError, match="--rows=-1 shows nothing; use 1 or more"):
        show.rows(runs.make_run(tiny_config(), tmp_path), "heldout", -1)


@pytest.mark.parametrize("name", sorted(objectives.OBJECTIVES))
def test_a_batch_of_every_objective_is_shown_as_text(name, tiny_config, tiny_tokens, tmp_path):
    run = runs.make_run(tiny_config(**{"objective.name": name}), tmp_path)
    text = show.rows(run, "train", 3)
    train, _ = runs.make_examples(run, tiny_tokens)
    rows = next(iter(pipeline.train_batches(train, 0)))
    printed = re.split(r"^--- .* \((\d+) tokens, then eos\)\n", text, flags=re.M)[1:]
    halves = [x for i in range(3) for x in (rows[0][i][rows[1][i] > 0], rows[2][i][rows[3][i] > 0])]
    assert len(halves) == 6 == len(printed) / 2
    for ids, count, decoded in zip(halves, printed[::2], printed[1::2], strict=True):
        assert len(ids) - 1 == int(count)
        assert decoded.removesuffix("\n") == tiny_tokens.decode(ids)
    if name == "span_corruption":
        assert "<extra_id_0>" in text and "<extra_id_1>" in text
