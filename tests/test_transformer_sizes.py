"""Laws of the model's numbers: parameters, FLOPs, initial variances and the first loss."""

from __future__ import annotations

import functools
import tracemalloc

import jax
import numpy as np
import pytest

from configs import base, models
from lm import transformer
from tests import models as words

# Derived from T5X's configs; Flan-T5 has the shapes of T5 1.1.
T5_1_1 = dict(
    small=76_961_152, base=247_577_856, large=783_150_080, xl=2_849_757_184, xxl=11_135_332_352
)
COUNTS = {
    "t5": dict(
        small=60_506_624,
        base=222_903_552,
        large=737_668_096,
        **{"3b": 2_851_598_336, "11b": 11_307_321_344},
    ),
    "t5_1_1": T5_1_1,
    "flan_t5": T5_1_1,
    "mt5": dict(
        small=300_176_768,
        base=582_401_280,
        large=1_229_581_312,
        xl=3_742_619_648,
        xxl=12_921_057_280,
    ),
    "byt5": dict(
        small=299_637_760,
        base=581_653_248,
        large=1_228_183_552,
        xl=3_737_801_728,
        xxl=12_906_899_328,
    ),
}
COUNTS = {f"{name}_{size}": n for name, sizes in COUNTS.items() for size, n in sizes.items()}
# layers, d_model, d_ff, heads, head_dim, key/value heads of T5Gemma's towers.
GEMMA = {
    "s": (8, 512, 1024, 8, 64, 8),
    "b": (12, 768, 2048, 12, 64, 12),
    "l": (24, 1024, 2816, 16, 64, 16),
    "ml": (26, 1152, 6912, 4, 256, 4),
    "xl": (24, 2048, 5120, 32, 64, 32),
    "2b": (26, 2304, 9216, 8, 256, 4),
    "9b": (42, 3584, 14336, 16, 256, 8),
}


def preset(name, **fields):
    """The model of a preset, as a run would build it."""
    config = models.apply(base.get_config().unlock(), name)
    model = transformer.ModelConfig(**config.model.to_dict())
    return model.replace(fields)


# Parameters. ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COUNTS)
def test_a_preset_has_as_many_parameters_as_the_published_model(name):
    assert transformer.parameter_count(preset(name)) == COUNTS[name]


@pytest.mark.parametrize("size", T5_1_1)
def test_umt5_is_t5_1_1_with_a_larger_vocabulary_and_a_relative_bias_per_layer(size):
    config, rows = preset(f"umt5_{size}"), 256_384 - 32_128
    tables = config.num_encoder_layers + config.num_decoder_layers - 2
    difference = 2 * rows * config.d_model + 32 * config.num_heads * tables
    assert transformer.parameter_count(config) == T5_1_1[size] + difference


def test_ul2_has_twenty_billion_parameters():
    d, f, width, depth = 4096, 16_384, 16 * 256, 32
    towers = depth * (12 * d * width + 6 * d * f + 5 * d) + 2 * d + 2 * 32 * 16
    count = transformer.parameter_count(preset("ul2_20b"))
    assert count == towers + 2 * 32_128 * d
    assert round(count / 1e9, 2) == 19.59


@pytest.mark.parametrize("pair", models.PAIRS)
def test_t5gemma_has_two_towers_each_with_an_embedding_of_256_000_rows(pair):
    total, (encoder, decoder) = 0, (GEMMA[name] for name in pair.split("_"))
    for layers, d, f, heads, width, kv_heads in (encoder, decoder):
        attention = 2 * d * heads * width + 2 * d * kv_heads * width
        total += 256_000 * d + layers * (attention + 3 * d * f + 4 * d) + d
    layers, d, _, heads, width, kv_heads = decoder
    cross = 2 * d * heads * width + 2 * encoder[1] * kv_heads * width + 2 * d
    assert transformer.parameter_count(preset(f"t5gemma_{pair}")) == total + layers * cross


def test_every_preset_is_counted_and_counting_takes_no_memory():
    counted = {*COUNTS, "ul2_20b", *(f"umt5_{size}" for size in T5_1_1)}
    counted |= {f"t5gemma_{pair}" for pair in models.PAIRS}
    assert set(models.PRESETS) == counted | {"tiny"}
    before = len(jax.live_arrays())
    tracemalloc.start()
    transformer.parameter_count(preset("t5_11b"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**26 and len(jax.live_arrays()) <= before + 8  # of 42 GiB


def test_the_default_model_is_the_smallest_t5_preset():
    assert transformer.ModelConfig() == preset("t5_1_1_small")


# Initial values. ----------------------------------------------------------------------

WIDE = {
    "vocab_size": 256,
    "d_model": 64,
    "d_ff": 160,
    "num_heads": 8,
    "head_dim": 16,
    "position.relative_attention_num_buckets": 32,
}
WIDE |= {"num_kv_heads": 8, "position.relative_attention_max_distance": 128}
STARTED = {
    "t5_1_1": words.model_of("t5_1_1", **WIDE),
    "t5_1_1_of_32128_rows": words.model_of("t5_1_1", **WIDE | dict(vocab_size=32_128)),
    "t5_1_0": words.model_of("t5_1_0", **WIDE),
    "umt5": words.model_of("umt5", **WIDE | dict(num_kv_heads=2)),
    "t5gemma_unequal": words.model_of("t5gemma_unequal", **WIDE | dict(num_kv_heads=4)),
    "2017": words.model_of("2017", **WIDE),
    "normed": words.model_of("normed", **WIDE),
    "shared": words.model_of("shared", **WIDE),
}
# T5X's variances, by the end of the path, and the largest draw in standard deviations; but the head
# has a quarter of T5X's below e^10 rows, so that the first loss is near ln V.
TRUNCATED, UNIFORM, NORMAL = 2 / 0.87962566, 3**0.5, np.inf
T5X_INITIAL = {
    "embed/embedding": (1.0, NORMAL),
    "query/kernel": (1 / 64 / 16, NORMAL),
    "key/kernel": (1 / 64, NORMAL),
    "value/kernel": (1 / 64, NORMAL),
    "out/kernel": (1 / 128, NORMAL),
    "up/kernel": (1 / 64, TRUNCATED),
    "gate/kernel": (1 / 64, TRUNCATED),
    "down/kernel": (1 / 160, TRUNCATED),
    "relative/relative_bias": (1 / ((32 + 8) / 2), UNIFORM),
    "head": (0.25 / 64, TRUNCATED),
}


@functools.cache
def initial_params(name):
    """The initial parameters of a model by path."""
    init = jax.jit(transformer.Transformer(STARTED[name]).init, compiler_options=words.QUICK)
    params = init(jax.random.key(0, impl="rbg"), transformer.dummy_batch())["params"]
    named = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(entry.key for entry in path): np.asarray(x) for path, x in named}


def check_moments(path, x, std):
    """Mean 0 and this standard deviation, within five standard errors."""
    assert abs(x.std() / std - 1) < 5 / np.sqrt(2 * x.size), f"{path}: {x.std()}, meant {std}"
    assert abs(x.mean() / std) < 5 / np.sqrt(x.size), path


@pytest.mark.parametrize("name", ["t5_1_1", "t5_1_1_of_32128_rows", "t5_1_0", "umt5"])
def test_every_tensor_of_a_t5_is_initialized_as_in_t5x(name):
    for path, x in initial_params(name).items():
        if path.endswith("/scale"):
            assert (x == 1).all(), path
            continue
        end = path if path in T5X_INITIAL else "/".join(path.split("/")[-2:])
        variance, widest = T5X_INITIAL[end]
        variance *= 4 if end == "head" and STARTED[name].vocab_size > 22_026 else 1
        std = variance**0.5
        check_moments(path, x, std)
        assert np.abs(x).max() <= widest * std * 1.0001, path
        assert widest < np.inf or np.abs(x).max() > TRUNCATED * std, path


def initial_std(config, path, shape):
    """The standard deviation of a parameter's initial values; 0 for constants."""
    *_, module, name = f"/{path}".split("/")
    if module.endswith("norm"):
        return 0.0
    if name == "relative_bias":
        return (2 / sum(shape)) ** 0.5
    if name == "embedding":
        is_small = config.embedding_scale == "sqrt_d_model" or config.lm_head == "tied_unscaled"
        return config.d_model**-0.5 if is_small else 1.0
    if name == "head":
        return ((1.0 if shape[1] > 22_026 else 0.25) / shape[0]) ** 0.5
    fan_in = np.prod(shape[1:3] if module == "out" else shape[1:2])
    has_norm = config.attention.query_key_norm != "none"
    query_scale = 1.0 if has_norm else config.head_dim**-0.5 / config.attention.scale
    return (query_scale if module == "query" else 1.0) * fan_in**-0.5


@pytest.mark.parametrize("name", STARTED)
def test_every_tensor_of_every_architecture_starts_with_its_std(name):
    for path, x in initial_params(name).items():
        is_encoder = path.startswith("encoder") and STARTED[name].shared_params != "all"
        config = STARTED[name].tower("encoder" if is_encoder else "decoder")
        std = initial_std(config, path, x.shape)
        if std:
            check_moments(path, x, std)
            continue
        starts = {"scale": 1.0, "bias": 0.0}
        if STARTED[name].norm.kind == "rms_offset":
            starts["scale"] = 0.0  # times 1 + scale
        elif path.endswith("query_norm/scale"):
            starts["scale"] = 16**-0.5  # scores start with variance 1
        assert (x == np.float32(starts[path.split("/")[-1]])).all(), path


def test_no_two_layers_start_with_the_same_values():
    for path, x in initial_params("t5_1_1").items():
        if path.endswith("kernel"):
            assert len({layer.tobytes() for layer in x}) == len(x) == 2, path


def narrow(name):
    """A preset's architecture and vocabulary with small sizes and 1 + 1 layers."""
    config = preset(name)
    groups = config.num_heads // config.num_kv_heads
    sizes = dict(d_model=64, d_ff=128, num_heads=4, num_kv_heads=4 // groups, head_dim=16)
    encoder = sizes | dict(d_model=96) if config.encoder != transformer.EncoderConfig() else {}
    small = dict(
        encoder=transformer.EncoderConfig(**encoder), num_encoder_layers=1, num_decoder_layers=1
    )
    # Scores keep their start's variance: scaled by 1, or by the root of the preset's head_dim.
    if config.attention.scale != 1:
        assert config.attention.scale == config.head_dim**-0.5
        small["attention.scale"] = 16**-0.5
    return config.replace({"scan_layers": False} | sizes | small)


@functools.cache
def first_loss(config):
    """Nats per target of a fresh model, in expectation over targets that are any of V alike.

    That is log(Z) less the mean logit: the same number, without the noise of drawn targets.
    """
    rng = np.random.default_rng(0)
    tokens = lambda: rng.integers(2, config.vocab_size, (2, 16), dtype=np.int32)
    ones = np.ones((2, 16), np.int32)
    model = transformer.Transformer(config)

    def loss(key):
        examples = (tokens(), ones, tokens(), ones)
        params = model.init(key, transformer.dummy_batch())
        logits = model.apply(params, type(transformer.dummy_batch())(*examples))
        return (jax.nn.logsumexp(logits, axis=-1) - logits.mean(-1)).mean()

    return float(jax.jit(loss)(jax.random.key(0, impl="rbg")))


FAMILIES = {"tiny", "t5_small", "t5gemma_s_s"}  # others are slow
EVERY_PRESET = [
    pytest.param(name, marks=[] if name in FAMILIES else pytest.mark.slow)
    for name in models.PRESETS
]


@pytest.mark.parametrize("name", EVERY_PRESET)
def test_the_first_loss_is_within_5_percent_of_ln_v(name):
    config = narrow(name)
    assert config.vocab_size == preset(name).vocab_size
    assert np.log(config.vocab_size) <= first_loss(config) < 1.05 * np.log(config.vocab_size)


# FLOPs. --------------------------------------------------------------------------------------

OTHER_SHAPE = transformer.EncoderConfig(
    d_model=640, d_ff=768, num_heads=4, num_kv_heads=2, head_dim=256
)


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(num_kv_heads=1, activation="relu", lm_head="tied"),
        dict(num_encoder_layers=3, num_decoder_layers=1, d_ff=640),
        dict(encoder=OTHER_SHAPE, shared_params="none"),
        dict(shared_params="all", num_encoder_layers=2),
        dict(architecture="prefix_lm", num_encoder_layers=0),
        dict(architecture="language_model", num_encoder_layers=0, num_kv_heads=1),
    ],
)
def test_flops_are_those_of_the_compiled_model(fields):
    sizes = dict(vocab_size=2048, d_model=512, d_ff=1024, num_heads=2, num_kv_heads=2, head_dim=512)
    depth = dict(num_encoder_layers=1, num_decoder_layers=2)
    config = transformer.ModelConfig.from_flat(sizes | depth | fields)
    rows, inputs, targets = 2, 96, 64
    compiled = (
        jax.jit(transformer.Transformer(config).apply, compiler_options=words.QUICK)
        .lower(
            {"params": transformer.param_shapes(config)},
            jax.eval_shape(lambda: transformer.dummy_batch(inputs, targets, rows)),
        )
        .compile()
    )
    counted = rows * transformer.forward_flops(config, inputs, targets)
    assert compiled.cost_analysis()["flops"] == pytest.approx(counted, rel=0.02)
