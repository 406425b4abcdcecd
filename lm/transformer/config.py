"""The architecture in words and sizes, checked once."""

from __future__ import annotations

import dataclasses

from lm import layers, lookup

LAYERS = {"unrolled": True, "scanned": False}  # one parameter layout, two ways to compile it
WINDOWS = {"global": "g", "local": "l", "alternating": "lg", "five_local": "lllllg"}  # repeated
DTYPES = ("float32", "bfloat16")  # that a model is computed in
WORDS = {
    "arrangement": ("encoder_decoder", "prefix_lm", "language_model"),
    "shared": ("embeddings", "nothing", "all"),
    "position": ("relative", "relative_per_layer", "rotary", "sinusoidal", "none"),
    "norm": layers.NORMS,
    "norm_placement": ("pre", "post", "both"),
    "query_key_norm": ("none", "rms"),
    "activation": layers.ACTIVATIONS,
    "windows": WINDOWS,
    "head": ("untied", "tied", "tied_unscaled"),
    "embedding_scale": ("none", "sqrt_d_model"),
    "dtype": DTYPES,
    "layers": LAYERS,
    "remat": ("none", "dots", "full"),
    "attention": ("rows", "whole"),
}
# How it is computed, not what it is.
COMPUTED = ("dropout_rate", "dtype", "layers", "remat", "attention")
# Fields that two models with exchangeable layers may differ in: no parameter means another thing.
FREE = (*COMPUTED, "num_encoder_layers", "num_decoder_layers")


@dataclasses.dataclass(frozen=True)
class Shape:
    """The encoder's sizes where they are not the decoder's; 0: the same."""

    d_model: int = 0
    d_ff: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture; keys, units and words as in configs/base.py. `encoder` may be a dict.

    Raises ValueError: one sentence with the value, the bound and the cure.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_ff: int = 1024
    num_heads: int = 6
    num_kv_heads: int = 6
    head_dim: int = 64
    num_encoder_layers: int = 8
    num_decoder_layers: int = 8
    encoder: Shape = Shape()
    arrangement: str = "encoder_decoder"
    shared: str = "embeddings"
    position: str = "relative"
    relative_buckets: int = 32
    relative_limit: int = 128
    rotary_base: float = 10_000.0
    norm: str = "rms"
    norm_placement: str = "pre"
    query_key_norm: str = "none"
    activation: str = "geglu"
    attention_scale: float = 1.0
    attention_cap: float = 0.0
    logits_cap: float = 0.0
    windows: str = "global"
    window: int = 4096
    head: str = "untied"
    embedding_scale: str = "none"
    start_id: int = 0
    dropout_rate: float = 0.0
    dtype: str = "float32"
    layers: str = "unrolled"
    remat: str = "none"
    attention: str = "rows"

    def __post_init__(self):
        if not isinstance(self.encoder, Shape):
            sizes = {field.name: field for field in dataclasses.fields(Shape)}
            for key in self.encoder:
                lookup.lookup(sizes, key, "the key of model.encoder")
            object.__setattr__(self, "encoder", Shape(**self.encoder))
        for field, words in WORDS.items():
            lookup.lookup(dict.fromkeys(words), getattr(self, field), f"model.{field}")
        self._check_bounds()
        self._check_shape()
        self._check_arrangement()
        try:
            self.side("encoder")
        except ValueError as error:  # the same checks, of the encoder's own sizes
            raise ValueError(str(error).replace("model.", "model.encoder.")) from error

    def side(self, name: str) -> ModelConfig:
        """The config of one tower: with the encoder's own sizes for "encoder"."""
        own = {k: v for k, v in dataclasses.asdict(self.encoder).items() if v}
        return (
            dataclasses.replace(self, encoder=Shape(), **own) if own and name == "encoder" else self
        )

    def sight(self, layer: int) -> int | None:
        """How many tokens back and ahead a layer, from 0, sees; None: all."""
        pattern = WINDOWS[self.windows]
        return self.window if pattern[layer % len(pattern)] == "l" else None

    def _check_bounds(self) -> None:
        least = {"num_encoder_layers": 0, "start_id": 0, "attention_cap": 0, "logits_cap": 0}
        for field in dataclasses.fields(self):
            value, bound = getattr(self, field.name), least.get(field.name, 1)
            whole = field.type != "int" or isinstance(value, int)
            _check(whole, field.name, value, "is no whole number; use one.")
            if field.type == "int" or field.name in least:
                _check(value >= bound, field.name, value, f"is too small; use {bound} or more.")
        for field, bound in (("rotary_base", 1), ("attention_scale", 1e-4)):
            value = getattr(self, field)
            _check(value > bound, field, value, f"is too small; use more than {bound}.")
        for field, value in dataclasses.asdict(self.encoder).items():
            cure = "is too small; use 1 or more, or 0 for the decoder's."
            _check(value >= 0, f"encoder.{field}", value, cure)
        rate, bound = self.dropout_rate, self.vocab_size
        _check(0 <= rate < 1, "dropout_rate", rate, "is no probability; use 0 to below 1.")
        start = f"is no id; use 0 to below model.vocab_size={bound}."
        _check(self.start_id < bound, "start_id", self.start_id, start)

    def _check_shape(self) -> None:
        heads, kv_heads = self.num_heads, self.num_kv_heads
        cure = (
            f"is not a multiple of model.num_kv_heads={kv_heads}; use a divisor, or "
            f"num_kv_heads={heads} for ordinary multi-head attention."
        )
        _check(heads % kv_heads == 0, "num_heads", heads, cure)
        turns = self.position != "rotary" or self.head_dim % 2 == 0
        cure = "is odd; rotary positions turn pairs, use an even number."
        _check(turns, "head_dim", self.head_dim, cure)
        pairs = self.position != "sinusoidal" or self.d_model % 2 == 0
        cure = "is odd; sines come with cosines, use an even number."
        _check(pairs, "d_model", self.d_model, cure)
        buckets, limit = self.relative_buckets, self.relative_limit
        if self.position.startswith("relative") and (buckets % 4 or limit <= buckets // 2):
            raise ValueError(
                f"model.relative_buckets={buckets} and model.relative_limit={limit} do not make "
                f"bins; use a multiple of 4 for the first and more than its half for the second "
                f"(T5: 32 and 128)."
            )

    def _check_arrangement(self) -> None:
        depth, word = self.num_encoder_layers, f"model.arrangement={self.arrangement!r}"
        if self.arrangement != "encoder_decoder":
            cure = f"has no use with {word}, which has no encoder; use 0."
            _check(depth == 0, "num_encoder_layers", depth, cure)
            _check(self.encoder == Shape(), "encoder", self.encoder, f"has no use with {word}.")
            cure = f"has no use with {word}; leave it 'embeddings'."
            _check(self.shared == "embeddings", "shared", self.shared, cure)
            return
        _check(depth > 0, "num_encoder_layers", depth, f"is too small for {word}; use 1 or more.")
        alike = self.encoder == Shape() and depth == self.num_decoder_layers
        cure = (
            "needs towers of one shape and depth; drop model.encoder's sizes and equal the depths."
        )
        _check(self.shared != "all" or alike, "shared", self.shared, cure)
        width = self.encoder.d_model
        cure = "needs an embedding of its own; use model.shared='nothing', or 0."
        fits = self.shared == "nothing" or width in (0, self.d_model)
        _check(fits, "encoder.d_model", width, cure)


def _check(holds: bool, field: str, value, cure: str) -> None:
    if not holds:
        raise ValueError(f"model.{field}={value!r} {cure}")


SHARED = tuple(f.name for f in dataclasses.fields(ModelConfig) if f.name not in FREE)
