"""The config of a model, in sections that check themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from lm import layers, lookup

# Which layers are local (l) and which global (g), repeated over the depth.
ATTENTION_PATTERNS = {
    "global": "g",
    "local": "l",
    "local_global_1_1": "lg",
    "local_global_5_1": "lllllg",
}
DTYPES = ("float32", "bfloat16")
ARCHITECTURES = ("encoder_decoder", "prefix_lm", "language_model")
POSITIONS = ("relative", "relative_per_layer", "rotary", "sinusoidal", "none")
# Keys of how the model is computed; parameters fit any value of them.
COMPUTE_KEYS = ("dropout_rate", "dtype", "scan_layers", "remat_policy", "attention.implementation")


def _choice(default: str, choices: Iterable[str]) -> Any:
    return dataclasses.field(default=default, metadata={"choices": choices})


def _number(default: float, least: float = 1, above: float | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"least": least, "above": above})


def _check(is_valid: bool, key: str, value: Any, fix: str) -> None:
    if not is_valid:
        raise ValueError(f"model.{key}={value!r} {fix}")


def _check_fields(section: Any, prefix: str) -> None:
    """Raise ValueError for the first field of a section that breaks its own bound or choices."""
    for field in dataclasses.fields(section):
        value, key = getattr(section, field.name), f"{prefix}{field.name}"
        if "choices" in field.metadata:
            lookup.lookup(dict.fromkeys(field.metadata["choices"]), value, f"model.{key}")
        if "least" not in field.metadata:
            continue
        is_valid = field.type != "int" or isinstance(value, int)
        _check(is_valid, key, value, "is not an integer; use one.")
        least, above = field.metadata["least"], field.metadata["above"]
        if above is not None:
            _check(value > above, key, value, f"is too small; use more than {above}.")
        else:
            _check(value >= least, key, value, f"is too small; use {least} or more.")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The encoder's sizes; 0: the decoder's."""

    d_model: int = 0
    d_ff: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0

    def __post_init__(self):
        for key, value in dataclasses.asdict(self).items():
            fix = "is too small; use 1 or more, or 0 for the decoder's."
            _check(value >= 0, f"encoder.{key}", value, fix)


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """The scale and cap of scores, the layers' windows, and the implementation."""

    scale: float = _number(1.0, above=1e-4)
    logits_soft_cap: float = _number(0.0, least=0)
    pattern: str = _choice("global", ATTENTION_PATTERNS)
    window_size: int = _number(4096)
    query_key_norm: str = _choice("none", ("none", "rms"))
    implementation: str = _choice("fast_cpu", layers.ATTENTION)

    def __post_init__(self):
        _check_fields(self, "attention.")


@dataclasses.dataclass(frozen=True)
class PositionConfig:
    """Positions: relative biases, rotary or sinusoidal embeddings."""

    kind: str = _choice("relative", POSITIONS)
    relative_attention_num_buckets: int = _number(32)
    relative_attention_max_distance: int = _number(128)
    rotary_base: float = _number(10_000.0, above=1)

    def __post_init__(self):
        _check_fields(self, "position.")
        buckets, limit = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if self.kind.startswith("relative") and (buckets % 4 or limit <= buckets // 2):
            raise ValueError(
                f"model.position.relative_attention_num_buckets={buckets} and "
                f"model.position.relative_attention_max_distance={limit} do not make bins; use a "
                f"multiple of 4 for the first and more than its half for the second (T5: 32, 128)."
            )


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """The kind of norm, and its placement around a sub-layer."""

    kind: str = _choice("rms", layers.NORMS)
    placement: str = _choice("pre", ("pre", "post", "both"))

    def __post_init__(self):
        _check_fields(self, "norm.")


SECTIONS = {
    "encoder": EncoderConfig,
    "attention": AttentionConfig,
    "position": PositionConfig,
    "norm": NormConfig,
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture; keys, units and choices as in configs/base.py. Sections may be dicts.

    Raises ValueError for an unknown key, a value out of bounds, and an impossible combination.
    """

    vocab_size: int = _number(32_128)
    d_model: int = _number(512)
    d_ff: int = _number(1024)
    num_heads: int = _number(6)
    num_kv_heads: int = _number(6)
    head_dim: int = _number(64)
    num_encoder_layers: int = _number(8, least=0)
    num_decoder_layers: int = _number(8)
    encoder: EncoderConfig = EncoderConfig()
    architecture: str = _choice("encoder_decoder", ARCHITECTURES)
    shared_params: str = _choice("embeddings", ("embeddings", "none", "all"))
    attention: AttentionConfig = AttentionConfig()
    position: PositionConfig = PositionConfig()
    norm: NormConfig = NormConfig()
    activation: str = _choice("geglu", layers.ACTIVATIONS)
    final_logits_soft_cap: float = _number(0.0, least=0)
    lm_head: str = _choice("untied", ("untied", "tied", "tied_unscaled"))
    embedding_scale: str = _choice("none", ("none", "sqrt_d_model"))
    decoder_start_token_id: int = _number(0, least=0)
    dropout_rate: float = 0.0
    dtype: str = _choice("float32", DTYPES)
    scan_layers: bool = False
    remat_policy: str = _choice("none", ("none", "dots", "full"))

    def __post_init__(self):
        for name, section in SECTIONS.items():
            value = getattr(self, name)
            if isinstance(value, Mapping):
                fields = {field.name: field for field in dataclasses.fields(section)}
                for key in value:
                    lookup.lookup(fields, key, f"the key of model.{name}")
                object.__setattr__(self, name, section(**value))
        _check_fields(self, "")
        is_bool = isinstance(self.scan_layers, bool)
        _check(is_bool, "scan_layers", self.scan_layers, "is not a boolean; use True or False.")
        rate, rows = self.dropout_rate, self.vocab_size
        _check(0 <= rate < 1, "dropout_rate", rate, "is not a probability; use 0 to below 1.")
        start_id, fix = self.decoder_start_token_id, f"is not an id; use 0 to below {rows}."
        _check(start_id < rows, "decoder_start_token_id", start_id, fix)
        self._check_shape()
        self._check_architecture()
        try:
            self.tower("encoder")
        except ValueError as error:  # the same checks with the encoder's sizes
            raise ValueError(str(error).replace("model.", "model.encoder.")) from error

    @classmethod
    def from_flat(cls, keys: Mapping[str, Any]) -> ModelConfig:
        """Make a config from dotted keys: {"d_model": 8, "position.kind": "rotary"}."""
        nested: dict[str, Any] = {}
        for key, value in keys.items():
            section, _, name = key.rpartition(".")
            (nested.setdefault(section, {}) if section else nested)[name] = value
        return cls(**nested)

    def to_flat(self) -> dict[str, Any]:
        """Return all keys, dotted in sections, with their values: the inverse of `from_flat`."""
        return flatten(dataclasses.asdict(self))

    def replace(self, keys: Mapping[str, Any]) -> ModelConfig:
        """Return this config with changed values of some keys, dotted as in `to_flat`."""
        return self.from_flat(self.to_flat() | dict(keys))

    def tower(self, name: str) -> ModelConfig:
        """Return the config of a tower: for "encoder" with the encoder's sizes."""
        sizes = {k: v for k, v in dataclasses.asdict(self.encoder).items() if v}
        if name != "encoder" or not sizes:
            return self
        return dataclasses.replace(self, encoder=EncoderConfig(), **sizes)

    def layer_window(self, layer: int) -> int | None:
        """Return how many tokens before and after its own a layer (from 0) sees; None: all."""
        pattern = ATTENTION_PATTERNS[self.attention.pattern]
        is_local = pattern[layer % len(pattern)] == "l"
        return self.attention.window_size if is_local else None

    def _check_shape(self) -> None:
        heads, kv_heads = self.num_heads, self.num_kv_heads
        fix = (
            f"is not a multiple of model.num_kv_heads={kv_heads}; use a divisor, or "
            f"num_kv_heads={heads} for ordinary multi-head attention."
        )
        _check(heads % kv_heads == 0, "num_heads", heads, fix)
        key = {"rotary": "head_dim", "sinusoidal": "d_model"}.get(self.position.kind)
        if key:
            size, fix = getattr(self, key), f"is odd; {self.position.kind} positions need pairs, "
            _check(size % 2 == 0, key, size, f"{fix}use an even number.")

    def _check_architecture(self) -> None:
        depth, key = self.num_encoder_layers, f"model.architecture={self.architecture!r}"
        encoder, shared = self.encoder, self.shared_params
        if self.architecture != "encoder_decoder":
            fix = f"is unused with {key}, which has no encoder; use 0."
            _check(depth == 0, "num_encoder_layers", depth, fix)
            _check(encoder == EncoderConfig(), "encoder", encoder, f"is unused with {key}.")
            fix = f"is unused with {key}; leave it 'embeddings'."
            _check(shared == "embeddings", "shared_params", shared, fix)
            return
        _check(depth > 0, "num_encoder_layers", depth, f"is too small for {key}; use 1 or more.")
        is_same = encoder == EncoderConfig() and depth == self.num_decoder_layers
        fix = "needs equal towers; remove model.encoder's sizes and set equal depths."
        _check(shared != "all" or is_same, "shared_params", shared, fix)
        can_share = shared == "none" or encoder.d_model in (0, self.d_model)
        fix = "needs a separate embedding; use model.shared_params='none', or 0."
        _check(can_share, "encoder.d_model", encoder.d_model, fix)


def flatten(keys: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts, joining keys by dots."""
    flat: dict[str, Any] = {}
    for key, value in keys.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


# Keys in which two models must agree for their layers to be exchangeable.
SHARED_KEYS = tuple(
    key
    for key in ModelConfig().to_flat()
    if key not in (*COMPUTE_KEYS, "num_encoder_layers", "num_decoder_layers")
)
