"""Laws of LoRA: which parameters change, and that separate and merged factors are one model."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import (
    batch,
    checkpoints,
    cli,
    evaluate,
    inference,
    optimizers,
    parallel,
    runs,
    show,
    steps,
    train,
    transformer,
)
from lm.interop import peft, transformers
from lm.transformer import lora
from tests.tiny_runs import (  # noqa: F401
    PAIRS,
    T5,
    assert_same_bits,
    go,
    last,
    pretrained,
)

SIZES = dict(vocab_size=64, d_model=16, d_ff=24, num_heads=4, num_kv_heads=2, head_dim=4)
MODEL = transformer.ModelConfig(
    **SIZES, num_encoder_layers=2, num_decoder_layers=3, scan_layers=True
)
EVERY = "layers/.*/kernel$"  # of attention and feed-forward alike
LORA = transformer.LoraConfig(rank=3, alpha=6.0, target_pattern=EVERY)
TUNED = PAIRS | {"stage": "finetune", "lora.rank": 2, "lora.alpha": 4.0}


def random_tree(tree, seed: int):
    """Random numbers of these shapes."""
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.2, leaf.dtype)
    return jax.tree.map(draw, tree)


@pytest.fixture(scope="module")
def examples():
    rng, shapes = np.random.default_rng(0), transformer.dummy_batch(9, 6, 8)
    ids = [jnp.asarray(rng.integers(2, 60, leaf.shape), jnp.int32) for leaf in shapes[:4]]
    return shapes._replace(inputs=ids[0], targets=ids[2])


@pytest.fixture(scope="module")
def base():
    return random_tree(transformer.param_shapes(MODEL), 1)


def logits(params, examples, config=MODEL):
    return transformer.Transformer(config).apply({"params": params}, examples)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_initial_factors_leave_the_logits_unchanged_to_the_bit(base, examples, dtype):
    config = dataclasses.replace(MODEL, dtype=dtype)
    params = lora.init_lora(LORA, base, jax.random.key(0))
    merged = jax.jit(lambda tree: logits(lora.merge_lora(LORA, tree), examples, config))
    plain = jax.jit(lambda tree: logits(tree, examples, config))
    assert_same_bits(merged(params), plain(base))
    a = np.asarray(params["adapters"]["encoder"]["layers"]["self_attention"]["out"]["kernel"]["a"])
    assert a.shape == (2, 4, 4, 3) and a.std() == pytest.approx((3 * 16) ** -0.5, rel=0.2)
    assert np.abs(a).max() <= 16**-0.5


def test_merging_adds_the_scaled_product_to_kernels_and_changes_nothing_else(base):
    params = random_tree(lora.shapes(LORA, base), 2) | base
    merged = jax.jit(lambda tree: lora.merge_lora(LORA, tree))(params)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    flat = checkpoints.flatten(params)
    for path, leaf in checkpoints.flatten(merged).items():
        expected = np.float64(flat[path])
        if path.endswith("kernel"):
            a, b = (np.float64(flat[f"adapters.{path}.{name}"]) for name in "ab")
            for layer in range(len(a)):  # 6 / 3 is the scale
                expected[layer] += 2.0 * np.tensordot(a[layer], b[layer], 1)
        np.testing.assert_allclose(leaf, expected, atol=1e-6)


def test_factors_of_full_rank_can_represent_any_kernel(base):
    config = transformer.LoraConfig(rank=16, alpha=4.0, target_pattern="decoder/.*/query/kernel$")
    target = random_tree(base, 3)
    params = lora.init_lora(config, base, jax.random.key(0))
    for name in ("self_attention", "cross_attention"):
        pair = params["adapters"]["decoder"]["layers"][name]["query"]["kernel"]
        old, new = (tree["decoder"]["layers"][name]["query"]["kernel"] for tree in (base, target))
        flat = (new - old).reshape(3, 16, 16)
        solved = np.linalg.solve(np.float64(pair["a"]), np.float64(flat) * 16 / 4)
        pair["b"] = jnp.asarray(solved, jnp.float32).reshape(pair["b"].shape)
        merged = lora.merge_lora(config, params)["decoder"]["layers"][name]["query"]["kernel"]
        np.testing.assert_allclose(merged, new, atol=1e-3)


def test_only_factors_have_gradients_and_these_are_those_of_the_product(base, examples):
    params = random_tree(lora.shapes(LORA, base), 4) | base
    loss = lambda tree: jnp.sum(jnp.square(logits(tree, examples)))
    actual = checkpoints.flatten(jax.jit(jax.grad(lora.with_lora(LORA, loss)))(params))
    whole = checkpoints.flatten(jax.jit(jax.grad(loss))(lora.merge_lora(LORA, params)))
    flat = checkpoints.flatten(params)
    for path, leaf in actual.items():
        if not path.startswith("adapters"):
            assert not np.any(leaf), path
            continue
        kernel, name = path.removeprefix("adapters.")[:-2], path[-1]
        slope = np.float64(whole[kernel])
        pair = (np.float64(flat[f"adapters.{kernel}.{one}"]) for one in "ab")
        for layer, (a, b) in enumerate(zip(*pair, strict=True)):
            into, out = a.reshape(-1, 3), b.reshape(3, -1)
            matrix = slope[layer].reshape(len(into), -1)
            expected = 2.0 * (matrix @ out.T if name == "a" else into.T @ matrix)
            made = np.asarray(leaf[layer]).reshape(expected.shape)
            np.testing.assert_allclose(made, expected, atol=1e-3 * np.abs(expected).max())


def update(params, examples, strategy=None, num_microbatches=1, name="adamw"):
    """(state, sums) after one update."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    words = optimizers.OptimizerConfig(
        name=name,
        learning_rate=0.1,
        schedule="constant",
        warmup={"steps": 0},
        learning_rate_multipliers=((lora.OTHERS, None),),
    )
    optimizer, _ = optimizers.make_optimizer(words, 10, shapes, optimizers.RunLength(1.0, 1))
    step_config = steps.StepConfig(num_microbatches=num_microbatches)
    path = strategy.shard_activations if strategy else transformer.no_constraint
    model = transformer.Transformer(MODEL, path)
    loss = steps.make_language_loss(model, steps.LossConfig(), np.ones(64, np.int32))

    def make(params):
        return steps.init_state(model, optimizer, step_config, params)

    def step(state, rows, axis=None):
        whole = lora.with_lora(LORA, loss)
        return steps.train_step(
            state, rows, loss=whole, optimizer=optimizer, config=step_config, axis=axis
        )

    if strategy is None:
        return jax.jit(step)(make(params), examples)
    state = strategy.init(make, params)
    state, sums = strategy.compile(step)(state, strategy.place_batch(examples))
    return strategy.fetch(state), strategy.fetch_numbers(sums)


@pytest.fixture(scope="module")
def alone(base, examples):
    params = {**base, "adapters": random_tree(lora.shapes(LORA, base)["adapters"], 5)}
    return params, update(params, examples)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        {"strategy": "pmap", "data": 4, "num_microbatches": 2},
        {"strategy": "mesh", "data": 2, "fsdp": 2, "tensor": 2},
    ],
    ids=["pmap and num_microbatches", "mesh"],
)
def test_an_update_is_the_same_for_every_parallel_strategy(alone, examples, words):
    params, (expected, summed) = alone
    config = parallel.ParallelConfig(**words)
    strategy = parallel.make_strategy(config)
    state, sums = update(params, examples, strategy, config.num_microbatches)
    np.testing.assert_allclose(sums["loss"], summed["loss"], rtol=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4)
    jax.tree.map(close, jax.device_get(state.params), jax.device_get(expected.params))


def test_a_mesh_shards_factors_like_their_kernels():
    shapes = lora.shapes(LORA, transformer.param_shapes(MODEL))["adapters"]["decoder"]["layers"]
    actual = parallel.sharding.partition_specs(
        {"decoder": {"layers": shapes}}, dict(data=1, fsdp=2, tensor=2)
    )
    actual = {path: tuple(spec) for path, spec in checkpoints.flatten(actual).items()}
    axes = {
        "self_attention.value.kernel.a": (None, "fsdp", None),
        "self_attention.value.kernel.b": (None, None, "tensor", None),
        "cross_attention.out.kernel.a": (None, "tensor", None, None),
        "cross_attention.out.kernel.b": (None, None, "fsdp"),
        "feed_forward.up.kernel.a": (None, "fsdp", None),
        "feed_forward.gate.kernel.b": (None, None, "tensor"),
        "feed_forward.down.kernel.a": (None, "tensor", None),
        "feed_forward.down.kernel.b": (None, None, "fsdp"),
    }
    for path, spec in axes.items():
        assert actual[f"decoder.layers.{path}"] == spec, path
    with pytest.raises(ValueError, match="adapters/norm/a is covered by no sharding rule"):
        parallel.sharding.spec_for_path("adapters/norm/a")


def test_factors_are_matrices_for_adafactor():
    shapes = lora.shapes(LORA, transformer.param_shapes(MODEL))["adapters"]
    axes = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        axes[path.partition("attention/")[2]] = optimizers.param_groups.matrix_axes(path, leaf.ndim)
    assert axes["out/kernel/a"] == ((1, 2), (3,)) and axes["out/kernel/b"] == ((1,), (2,))
    assert axes["query/kernel/a"] == ((1,), (2,)) and axes["query/kernel/b"] == ((1,), (2, 3))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_only_the_factors_have_moments_and_only_they_change(alone, examples, name):
    params, (state, _) = alone
    if name != "adamw":
        state, _ = update(params, examples, name=name)
    assert_same_bits({**state.params, "adapters": 0}, {**params, "adapters": 0})
    for one, other in zip(
        *map(jax.tree.leaves, (state.params["adapters"], params["adapters"])), strict=True
    ):
        assert np.any(one != other)
    stored = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert stored < 3 * sum(leaf.size for leaf in jax.tree.leaves(params["adapters"]))
    assert not any(
        "embed" in path or path.endswith("scale") for path in checkpoints.flatten(state.opt_state)
    )


def test_an_update_costs_less_than_one_of_all_parameters(base, examples):
    def flops(config, params):
        loss = lambda tree: jnp.sum(logits(tree, examples))
        grad = lambda tree: jax.grad(lora.with_lora(config, loss))(tree).get("adapters", tree)
        whole = jax.grad(loss) if not config.rank else grad
        return jax.jit(whole).lower(params).compile().cost_analysis()["flops"]

    none = transformer.LoraConfig()
    few = transformer.LoraConfig(rank=2)
    forward = jax.jit(lambda tree: logits(tree, examples)).lower(base).compile()
    full, once = flops(none, base), forward.cost_analysis()["flops"]
    least = flops(few, lora.init_lora(few, base, jax.random.key(0)))
    assert least < full - 0.5 * once, "the gradient of a kernel that is not adapted is not computed"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rank": -1}, "lora.rank=-1 is too small; use 0"),
        ({"rank": 2, "alpha": 0.0}, "lora.alpha=0.0 is out of bounds"),
        ({"rank": 2, "alpha": float("nan")}, "lora.alpha=nan is out of bounds"),
        ({"rank": 2, "target_pattern": "("}, r"lora.target_pattern='\(' is no regular expression"),
        ({"alpha": 2.0}, "lora.alpha=2.0 and .* no effect with lora.rank=0; set a rank"),
        (
            {"rank": 2, "target_pattern": "querry"},
            "'querry' matches no parameter; match a path like dec",
        ),
        (
            {"rank": 2, "target_pattern": "embed"},
            "matches embed/embedding, which is no kernel of a layer",
        ),
        ({"rank": 17}, "lora.rank=17 is more than .* can have, 16; use at most that"),
    ],
)
def test_an_impossible_lora_config_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        lora.shapes(transformer.LoraConfig(**keys), transformer.param_shapes(MODEL))


def test_lora_of_random_parameters_is_refused(tiny_config, tmp_path):
    with pytest.raises(ValueError, match="lora.rank=2 needs a pre-trained model.* set init_from"):
        runs.make_run(tiny_config(**{"lora.rank": 2}), tmp_path)
    with pytest.raises(ValueError, match="lora.target_pattern='nothing' matches no parameter"):
        words = {"lora.rank": 2, "lora.target_pattern": "nothing", "init_from": "somewhere"}
        runs.make_run(tiny_config(**words), tmp_path)


@pytest.fixture(scope="module")
def tuned(go, pretrained):  # noqa: F811
    return go(**TUNED, init_from=str(pretrained), **{"optimizer.ema_decay": 0.5})


def test_a_run_keeps_its_base_and_readers_get_the_merged_model(tuned, pretrained):  # noqa: F811
    run, (state, _) = runs.read_run(tuned), last(tuned)
    before = last(pretrained)[0].params
    assert_same_bits({n: x for n, x in state.params.items() if n != "adapters"}, before)
    params, _ = inference.read_params(run, runs.make_tokenizer(run))
    assert_same_bits(params, jax.jit(lambda x: lora.merge_lora(run.lora, x))(state.average))
    factors = jax.tree.leaves(state.params["adapters"])
    assert len(factors) == 12 and all(np.any(np.asarray(leaf)) for leaf in factors)
    logged = [json.loads(line) for line in (tuned / "metrics.jsonl").open()]
    actual = evaluate.evaluate(tuned)["nats"]
    heldout = [row["nats"] for row in logged if row["split"] == "heldout"]
    assert actual == pytest.approx(heldout[-1], rel=1e-6) and len(set(heldout)) > 1
    report = json.loads((tuned / "run.json").read_text())
    assert report["trained"] == sum(leaf.size for leaf in factors) < report["params"]
    assert f"trained: {report['trained']:,} (" in show.parameters(run)
    assert "adapters/decoder/layers/cross_attention/query/kernel/b" in show.sharding(run)


def test_a_resumed_run_ends_with_the_same_bits(go, pretrained, tuned, tmp_path):  # noqa: F811
    workdir = tmp_path / "run"
    words = {**TUNED, "init_from": str(pretrained), "optimizer.ema_decay": 0.5}
    shutil.copytree(tuned, workdir)
    shutil.rmtree(workdir / "checkpoints" / "6")
    assert last(workdir)[1]["step"] == 4
    go(workdir, **words)
    assert_same_bits(last(workdir)[0], last(tuned)[0])


def test_a_run_can_start_from_the_merged_model_of_another(first_of, tuned):
    run = runs.read_run(tuned)
    params, _ = inference.read_params(run, runs.make_tokenizer(run))
    assert_same_bits(first_of(tuned, **PAIRS, stage="finetune"), params)
    older = first_of(f"{tuned}@4", **PAIRS, stage="finetune")
    with pytest.raises(AssertionError):
        assert_same_bits(older, params)


@pytest.fixture
def first_of(tiny_config, tmp_path):
    """(init_from, **changes) -> the parameters that a run starts from."""

    def first_of(taken, **changes):
        run = runs.make_run(tiny_config(init_from=str(taken), **T5, **changes), tmp_path / "new")
        return train.initial_params(run, runs.make_tokenizer(run), None)

    return first_of


REFERENCE = """
import pathlib, sys
import numpy as np, peft, torch, transformers

root = pathlib.Path(sys.argv[1])
data = {name: torch.tensor(x) for name, x in np.load(root / "inputs.npz").items()}
model = transformers.AutoModelForSeq2SeqLM.from_pretrained(root / "base")
model = peft.PeftModel.from_pretrained(model, root / "adapters", is_trainable=True).eval()
weights = data.pop("weights")
logits = model(**data).logits
(logits * weights).sum().backward()
slopes = {name: x.grad.numpy() for name, x in model.named_parameters() if x.requires_grad}
merged = model.merge_and_unload()(**data).logits
found = {"logits": logits.detach().numpy(), "merged": merged.detach().numpy()}
np.savez(root / "found.npz", **found, **slopes)
"""


def test_peft_computes_our_logits_and_gradients_from_exported_factors(base, examples, tmp_path):
    for name in ("torch", "transformers", "peft"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    from safetensors.numpy import load_file

    model = dataclasses.replace(MODEL, num_kv_heads=4, lm_head="untied")
    base = random_tree(transformer.param_shapes(model), 1)
    params = {**base, "adapters": random_tree(lora.shapes(LORA, base)["adapters"], 6)}
    transformers.write(base, model, tmp_path / "base")
    peft.write(params, model, LORA, tmp_path / "adapters")
    ids = batch.shift_right(
        examples.targets, examples.targets_segment_ids, model.decoder_start_token_id
    )
    weights = np.random.default_rng(7).normal(size=(8, 6, 64)).astype(np.float32)
    theirs = {"input_ids": examples.inputs, "decoder_input_ids": ids, "weights": weights}
    theirs = {name: np.asarray(x) for name, x in theirs.items()}
    np.savez(tmp_path / "inputs.npz", **theirs)
    subprocess.run([sys.executable, "-c", REFERENCE, str(tmp_path)], check=True, timeout=300)
    found = dict(np.load(tmp_path / "found.npz"))
    stored = lambda tree: logits(lora.merge_lora(LORA, tree), examples, model)
    for name in ("logits", "merged"):
        np.testing.assert_allclose(found.pop(name), stored(params), atol=1e-3, rtol=1e-4)
    slopes = jax.jit(jax.grad(lambda tree: jnp.sum(stored(tree) * weights)))(params)
    peft.write(slopes, model, LORA, tmp_path / "slopes")  # in their names
    actual = load_file(tmp_path / "slopes" / peft.WEIGHTS)
    assert len(actual) == len(found) == 2 * (2 * 7 + 3 * 11)
    for name, slope in actual.items():
        expected = found[name.replace(".weight", ".default.weight")]
        np.testing.assert_allclose(slope, expected, atol=1e-3 * np.abs(expected).max())


def test_a_merged_model_or_adapters_alone_are_exported(tuned, pretrained, tmp_path, capsys):  # noqa: F811
    run = runs.read_run(tuned)
    params, _ = inference.read_params(run, runs.make_tokenizer(run))
    assert cli.main(["export", f"--workdir={tuned}", str(tmp_path / "merged")]) == 0
    actual = transformers.read_params(tmp_path / "merged", run.model)
    assert_same_bits(actual, jax.device_get(params))
    assert cli.main(["export", f"--workdir={tuned}", str(tmp_path / "alone"), "--adapters"]) == 0
    assert str(pretrained) in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {peft.CONFIG, peft.WEIGHTS}
    report = json.loads((tmp_path / "alone" / peft.CONFIG).read_text())
    assert (report["r"], report["lora_alpha"], len(report["target_modules"])) == (2, 4.0, 12)
    assert cli.main(["export", f"--workdir={pretrained}", str(tmp_path / "no"), "--adapters"]) == 2
    assert "has no adapters (lora.rank=0)" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
