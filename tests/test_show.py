"""Laws of the parameter table: it adds up, and says what the model is."""

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
    made = runs.make_run(config.to_dict(), "nowhere")
    return made, show.parameters(made).splitlines()


def rows_of(lines):
    """[(path, shape, count, std, share in %), ...] as they are printed."""
    found = []
    for line in lines[1:-2]:
        path, *shape, count, std, share = line.split()
        sizes = tuple(int(size) for size in shape)
        found.append(
            (path, sizes, int(count.replace(",", "")), float(std), float(share.removesuffix("%")))
        )
    return found


@pytest.mark.parametrize("preset", PRESETS)
def test_the_table_has_every_parameter_and_adds_up(preset):
    made, lines = table_of(preset)
    rows, total = rows_of(lines), transformer.parameter_count(made.model)
    for _, shape, size, _, share in rows:
        assert size == math.prod(shape)
        assert share == pytest.approx(100 * size / total, abs=0.005001)
    assert sum(size for _, _, size, _, _ in rows) == total
    assert f"{total:,}" in lines[-2] and "100.00%" in lines[-2]
    assert sum(share for *_, share in rows) == pytest.approx(100, abs=0.005 * len(rows))
    assert lines[0].split() == ["parameter", "shape", "count", "initial", "std", "share"]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_paths_are_those_of_the_parameter_tree(preset):
    made, lines = table_of(preset)
    listed = {path: shape for path, shape, *_ in rows_of(lines)}
    shapes = transformer.param_shapes(made.model)
    for path, shape in listed.items():
        leaf = shapes
        for part in re.split(r"[./]", path):
            leaf = leaf[part]
        assert leaf.shape == shape


def test_the_stds_are_t5s():
    rows = {path: std for path, _, _, std, _ in rows_of(table_of("t5_small")[1])}
    expected = {
        "embed.embedding": 1.0,
        "encoder.layers.self_attention.query.kernel": (512 * 64) ** -0.5,
        "decoder.layers.cross_attention.key.kernel": 512**-0.5,
        "decoder.layers.feed_forward.down.kernel": 2048**-0.5,
        "decoder.layers.self_attention.out.kernel": 512**-0.5,
        "encoder.relative.relative_bias": (2 / (32 + 8)) ** 0.5,
        "decoder.layers.ff_norm.scale": 0.0,
    }
    for path, std in expected.items():
        assert rows[path] == pytest.approx(std, abs=5.1e-6), path


@pytest.mark.parametrize("preset", ["tiny", "t5gemma_9b_2b"])
def test_flops_per_token_are_those_of_a_row_over_its_tokens(preset):
    made, lines = table_of(preset)
    inputs, targets = made.lengths
    flops = transformer.forward_flops(made.model, inputs, targets)
    per_token, read, write, whole = re.search(
        r"([\d,]+) per token, of a row of (\d+) input and (\d+) target tokens \(([\d,]+)\)",
        lines[-1],
    ).groups()
    assert (int(read), int(write)) == (inputs, targets)
    assert int(whole.replace(",", "")) == flops
    assert int(per_token.replace(",", "")) == round(flops / (inputs + targets))


def test_a_parameter_of_unknown_start_is_an_error_that_names_it():
    with pytest.raises(ValueError, match="no initial std is known for parameter decoder/odd"):
        show.initial_std(transformer.ModelConfig(), "decoder.odd", (3,))


LAYOUTS = {
    "adamw": {"data": 2, "fsdp": 2, "tensor": 2},
    "adafactor": {"fsdp": 4, "tensor": 2},
}


@pytest.mark.parametrize("optimizer", LAYOUTS)
def test_the_sharding_table_is_what_a_device_then_holds(optimizer, tiny_config):
    """Against the arrays themselves, laid out on eight devices."""
    keys = {f"parallel.{axis}": size for axis, size in LAYOUTS[optimizer].items()}
    keys |= {"parallel.strategy": "mesh", "optimizer.name": optimizer, "optimizer.ema_decay": 0.9}
    made = runs.make_run(tiny_config(**keys), "nowhere")
    title, head, *lines, total = show.sharding(made).splitlines()
    strategy = parallel.make_strategy(made.parallel)
    pace = optimizers.RunLength(1.0, 1)
    shapes = transformer.param_shapes(made.model)
    optimizer, _ = optimizers.make_optimizer(made.optimizer, 6, shapes, pace)
    model, step_config = transformer.Transformer(made.model), steps.StepConfig(ema_decay=0.9)
    make = lambda: steps.init_state(
        model, optimizer, step_config, jax.tree.map(jnp.zeros_like, shapes)
    )
    state = strategy.init(make)
    held = lambda x: x.addressable_shards[0].data
    placed = {
        parallel.path_of(path): (leaf.shape, held(leaf).shape, held(leaf).nbytes)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
    }
    assert len(lines) == len(placed) and "mesh" in title and head.startswith("parameter")
    for line in lines:
        path, *words, own, _ = line.split()
        numbers = [int(word) for word in words if word.isdecimal()]
        whole, part, size = placed[path]
        assert numbers == [*whole, *part] and own == f"{size / 2**20:.3f}"
    own, kept = (float(word) for word in total.split()[1:])
    assert own == pytest.approx(sum(size for *_, size in placed.values()) / 2**20, abs=6e-4)
    both = jax.tree.leaves((state.opt_state, state.average))
    assert kept == pytest.approx(sum(held(x).nbytes for x in both) / 2**20, abs=6e-4)


def test_the_sharding_table_needs_no_device_but_sizes_that_divide(tiny_config):
    keys = {
        "parallel.strategy": "mesh",
        "parallel.fsdp": 16,
        "optimizer.ema_decay": 0.5,
    }
    said = show.sharding(runs.make_run(tiny_config(**keys), "nowhere"))
    assert said.startswith("mesh: data 1 x fsdp 16 x tensor 1 = 16 devices\n")
    with pytest.raises(ValueError, match="axis of 16 does not divide over fsdp=32"):
        show.sharding(runs.make_run(tiny_config(**keys | {"parallel.fsdp": 32}), "nowhere"))


def test_no_rows_are_a_sentence(tiny_config, tmp_path):
    with pytest.raises(ValueError, match="--rows=-1 shows nothing; use 1 or more"):
        show.rows(runs.make_run(tiny_config(), tmp_path), "heldout", -1)


@pytest.mark.parametrize("name", sorted(objectives.OBJECTIVES))
def test_a_batch_of_every_objective_is_shown_as_text(name, tiny_config, tiny_tokens, tmp_path):
    run = runs.make_run(tiny_config(**{"objective.name": name}), tmp_path)
    said = show.rows(run, "train", 3)
    train, _ = runs.make_examples(run, tiny_tokens)
    rows = next(iter(pipeline.train_batches(train, 0)))
    shown = re.split(r"^--- .* \((\d+) tokens, then eos\)\n", said, flags=re.M)[1:]
    halves = [x for i in range(3) for x in (rows[0][i][rows[1][i] > 0], rows[2][i][rows[3][i] > 0])]
    assert len(halves) == 6 == len(shown) / 2
    for ids, count, text in zip(halves, shown[::2], shown[1::2], strict=True):
        assert len(ids) - 1 == int(count)
        assert text.removesuffix("\n") == tiny_tokens.decode(ids)
    if name == "span_corruption":
        assert "<extra_id_0>" in said and "<extra_id_1>" in said
