"""The table of model presets, taken after a colon: --config=configs/pretrain.py:t5_1_1_small."""

from __future__ import annotations

from lm import choose

# d_model, d_ff, heads x head_dim, encoder + decoder layers; vocabulary: embedding rows and pieces
PRESETS = {
    "tiny": dict(shape=(128, 512, 4, 32, 4, 4), vocabulary=(4096, 3968)),
    "t5_1_1_small": dict(shape=(512, 1024, 6, 64, 8, 8), vocabulary=(32_128, 32_000)),
    "t5_1_1_base": dict(shape=(768, 2048, 12, 64, 12, 12), vocabulary=(32_128, 32_000)),
}


def apply(config, preset: str):
    """Set config.model's sizes and tokenizer.pieces to those of `preset`; returns config."""
    chosen = choose.choose(PRESETS, preset, "the preset after the config's colon")
    d_model, d_ff, heads, head_dim, encoder, decoder = chosen["shape"]
    rows, config.tokenizer.pieces = chosen["vocabulary"]
    config.model.update(
        vocab_size=rows,
        d_model=d_model,
        d_ff=d_ff,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        num_encoder_layers=encoder,
        num_decoder_layers=decoder,
    )
    return config
