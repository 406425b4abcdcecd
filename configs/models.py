"""Model presets, named after a config's colon: --config=configs/pretrain.py:t5_1_1_small.

A run folder instead of a preset gives the run's model, and its parameters to start from.
"""

from __future__ import annotations

from lm import lookup, storage

# d_model, d_ff, heads, key/value heads, head_dim
SMALL, BASE, LARGE = (512, 1024, 6, 6, 64), (768, 2048, 12, 12, 64), (1024, 2816, 16, 16, 64)
XL, XXL = (2048, 5120, 32, 32, 64), (4096, 10240, 64, 64, 64)
T5_1_1 = {"small": (SMALL, 8, 8), "base": (BASE, 12, 12), "large": (LARGE, 24, 24)}
T5_1_1 |= {"xl": (XL, 24, 24), "xxl": (XXL, 24, 24)}
T5_1_0 = {
    "small": ((512, 2048, 8, 8, 64), 6, 6),
    "base": ((768, 3072, 12, 12, 64), 12, 12),
    "large": ((1024, 4096, 16, 16, 64), 24, 24),
    "3b": ((1024, 16384, 32, 32, 128), 24, 24),
    "11b": ((1024, 65536, 128, 128, 128), 24, 24),
}
BYT5 = {
    "small": ((1472, 3584, 6, 6, 64), 12, 4),
    "base": ((1536, 3968, 12, 12, 64), 18, 6),
    "large": ((1536, 3840, 16, 16, 64), 36, 12),
    "xl": ((2560, 6720, 32, 32, 64), 36, 12),
    "xxl": ((4672, 12352, 64, 64, 64), 36, 12),
}
GEMMA = {
    "s": ((512, 1024, 8, 8, 64), 8),
    "b": (BASE, 12),
    "l": (LARGE, 24),
    "ml": ((1152, 6912, 4, 4, 256), 26),
    "xl": (XL, 24),
    "2b": ((2304, 9216, 8, 4, 256), 26),
    "9b": ((3584, 14336, 16, 8, 256), 42),
}
PAIRS = ("s_s", "b_b", "l_l", "ml_ml", "xl_xl", "2b_2b", "9b_9b", "9b_2b")
T5GEMMA = dict(
    shared_params="none",
    attention=dict(logits_soft_cap=50.0, pattern="local_global_1_1"),
    position=dict(kind="rotary"),
    norm=dict(kind="rms_offset", placement="both"),
    final_logits_soft_cap=30.0,
    lm_head="tied_unscaled",
    embedding_scale="sqrt_d_model",
    decoder_start_token_id=2,
)
SIZES = ("d_model", "d_ff", "num_heads", "num_kv_heads", "head_dim")


def _model(vocab_size: int, sizes, encoder_layers: int, decoder_layers: int, **options) -> dict:
    depths = dict(num_encoder_layers=encoder_layers, num_decoder_layers=decoder_layers)
    return dict(zip(SIZES, sizes, strict=True)) | depths | dict(vocab_size=vocab_size) | options


def _t5gemma(pair: str) -> dict:
    (encoder, encoder_layers), (decoder, decoder_layers) = (GEMMA[x] for x in pair.split("_"))
    options = T5GEMMA | dict(attention=T5GEMMA["attention"] | dict(scale=decoder[-1] ** -0.5))
    if encoder != decoder:
        options["encoder"] = dict(zip(SIZES, encoder, strict=True))
    return _model(256_000, decoder, encoder_layers, decoder_layers, **options)


# name: (tokenizer.vocab_size, tokenizer.num_extra_ids, changes of config.model)
PRESETS = {"tiny": (3968, 100, _model(4096, (128, 512, 4, 4, 32), 4, 4))}
for _family, _sizes, _vocab_size, _pieces, _sentinels, _options in (
    ("t5", T5_1_0, 32_128, 32_000, 100, dict(activation="relu", lm_head="tied")),
    ("t5_1_1", T5_1_1, 32_128, 32_000, 100, {}),
    ("flan_t5", T5_1_1, 32_128, 32_000, 100, {}),
    ("mt5", T5_1_1, 250_112, 250_000, 100, {}),
    ("umt5", T5_1_1, 256_384, 256_000, 300, dict(position=dict(kind="relative_per_layer"))),
    ("byt5", BYT5, 384, 259, 125, {}),
    (
        "ul2",
        {"20b": ((4096, 16384, 16, 16, 256), 32, 32)},
        32_128,
        32_000,
        100,
        dict(activation="swiglu"),
    ),
):
    for _size, _shape in _sizes.items():
        _changes = _model(_vocab_size, *_shape, **_options)
        PRESETS[f"{_family}_{_size}"] = (_pieces, _sentinels, _changes)
PRESETS |= {f"t5gemma_{pair}": (255_872, 128, _t5gemma(pair)) for pair in PAIRS}


def apply(config, preset: str):
    """Set config.model and the tokenizer's sizes to those of a preset, and return the config.

    If `preset` is a run folder, set them to the run's, and config.init_from to the folder.
    """
    folder = storage.as_path(preset).expanduser()
    if preset not in PRESETS and (folder / "config.json").exists():
        from lm import runs, transformer

        run_config = runs.read_config(folder)
        keys = transformer.flatten(run_config["model"]).items()
        config.model.update_from_flattened_dict(
            {key: value for key, value in keys if key not in transformer.COMPUTE_KEYS}
        )
        for key in ("kind", "vocab_size", "num_extra_ids", "normalization"):
            config.tokenizer[key] = run_config["tokenizer"][key]
        config.init_from = str(folder)
        return config
    entry = lookup.lookup(PRESETS, preset, "the preset (or run's folder) after the config's colon")
    config.tokenizer.vocab_size, config.tokenizer.num_extra_ids, model = entry
    config.tokenizer.kind = "bytes" if preset.startswith("byt5") else "unigram"
    config.model.update(model)
    return config
