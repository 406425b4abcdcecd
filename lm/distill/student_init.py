"""How a student is initialized: from its teacher's layers, from slices of them, or at random.

teacher.student_init is `random`, or the layers of each tower to copy, `even`, `first` or `last`;
after it, for a narrower student, `sliced` or `projected`; before it `shared`, if the encoder is to
stay the teacher's. Parameters are copied bit for bit.

sliced     takes of each kernel the first units of d_model, d_ff and head_dim, and the first heads;
           of grouped heads the first of each group; of rotary pairs those with the frequencies of
           the narrower head
projected  multiplies d_model by a random matrix P with orthonormal columns [D, D'], W to P^T W or
           W P, after folding the norms' scales into the kernels behind them, and slices the rest.
           At full width logits are unchanged (with a tied head, if the last norm's scale is
           uniform). Source of the folding: Ashkboos et al. 2024, section 3, arXiv:2401.15024.

A student with a tied head copies only the embedding of a teacher with an untied one. That embedding
was never a head: the student starts above the loss of random logits, and first learns a head.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from lm import initialization, lookup, transformer

ModelConfig = transformer.ModelConfig

SIZES = tuple(field.name for field in dataclasses.fields(transformer.EncoderConfig))
OR_RANDOM = ", or teacher.student_init='random'"
# Pattern of a kernel's path in a tower -> the norm whose result it reads. Cross-attention's keys
# and values and the head read the norm at the end of a tower.
NORMS = {
    r"layers/self_attention/(query|key|value)/kernel": "layers/self_norm/scale",
    r"layers/cross_attention/query/kernel": "layers/cross_norm/scale",
    r"layers/feed_forward/(up|gate)/kernel": "layers/ff_norm/scale",
}
HEAD_AXES = ((r"query/kernel$", -2), (r"out/kernel$", -3), (r"relative_bias$", -1))


def evenly(teacher_layers: int, student_layers: int) -> list[int]:
    """The teacher layers, from 0, that a shallower student copies: first, last, evenly between."""
    if student_layers == 1:
        return [0]
    last = teacher_layers - 1
    return [round(i * last / (student_layers - 1)) for i in range(student_layers)]


LAYERS = {  # (number of the teacher's layers, of the student's) -> those to copy, in order
    "even": evenly,
    "first": lambda teacher, student: [*range(student)],
    "last": lambda teacher, student: [*range(teacher - student, teacher)],
}
WIDTHS = ("sliced", "projected")


@dataclasses.dataclass(frozen=True)
class Start:
    """A parsed teacher.student_init: a word of LAYERS, one of WIDTHS or "", and `shared`."""

    layers: str
    width: str = ""
    shared: bool = False


def parse_start(text: str) -> Start | None:
    """Parse teacher.student_init; None for random parameters.

    Raises ValueError for unknown words and unsupported combinations.
    """
    words, table = text.split(), dict.fromkeys((*LAYERS, *WIDTHS, "shared", "random"))
    for word in words:
        lookup.lookup(table, word, "teacher.student_init")
    if words == ["random"]:
        return None
    shared = words[:1] == ["shared"]
    layers, widths = ([word for word in words if word in names] for names in (LAYERS, WIDTHS))
    num_rest = len(words) - len(layers) - len(widths)
    if len(layers) != 1 or len(widths) > 1 - shared or num_rest != shared:
        raise ValueError(
            f"teacher.student_init={text!r} is unsupported; write even, first or last, followed by "
            f"sliced or projected for a narrower student, or preceded by shared to keep the "
            f"teacher's encoder; or random alone."
        )
    return Start(layers[0], *widths, shared=shared)


def check_student(init: str, teacher: ModelConfig, student: ModelConfig) -> None:
    """Raise ValueError if the student cannot learn from this teacher, or not start with `init`."""
    start = parse_start(init)
    initialization.check_same(student, teacher, ("vocab_size",), "the teacher's")
    if start is None:
        return
    free = [*SIZES, *(f"encoder.{size}" for size in SIZES)]
    free += ["attention.scale"] * bool(start.width)
    free += ["lm_head"] * leaves_head(teacher, student)
    fields = [field for field in transformer.SHARED_KEYS if field not in free]
    initialization.check_same(student, teacher, fields, "the teacher's", OR_RANDOM)
    for tower in ("encoder", "decoder"):
        counts = (getattr(config, f"num_{tower}_layers") for config in (student, teacher))
        _check_at_most(f"num_{tower}_layers", *counts)
        _check_width(start, init, teacher.tower(tower), student.tower(tower))
    if start.width == "projected":
        _check_projectable(student)
    if start.shared:
        _check_shared(init, teacher, student)


def leaves_head(teacher: ModelConfig, student: ModelConfig) -> bool:
    """Whether the student's tied head leaves out the teacher's untied one."""
    return teacher.lm_head == "untied" != student.lm_head


def _check_at_most(field: str, value: int, most: int) -> None:
    if value > most:
        raise ValueError(
            f"model.{field}={value} is more than the teacher's {most}; use at most {most}"
            f"{OR_RANDOM}."
        )


def _check_width(start: Start, init: str, teacher: ModelConfig, student: ModelConfig) -> None:
    for field in SIZES:
        value, most = getattr(student, field), getattr(teacher, field)
        if not start.width:
            can_slice = value < most and not start.shared
            cure = f", teacher.student_init='{init} sliced' for a part of it" * can_slice
            initialization.check_same(student, teacher, (field,), "the teacher's", cure + OR_RANDOM)
        _check_at_most(field, value, most)
    group, most = (config.num_heads // config.num_kv_heads for config in (student, teacher))
    if group > most:
        raise ValueError(
            f"model.num_heads={student.num_heads} has {group} to each of model.num_kv_heads="
            f"{student.num_kv_heads}, and the teacher {most}; use more num_kv_heads{OR_RANDOM}."
        )
    if student.position.kind == "rotary" and teacher.head_dim % student.head_dim:
        raise ValueError(
            f"model.head_dim={student.head_dim} does not divide the teacher's {teacher.head_dim}, "
            f"so its rotary frequencies differ; use {teacher.head_dim // 2}{OR_RANDOM}."
        )


def _check_projectable(student: ModelConfig) -> None:
    for field, words in (
        ("norm.kind", ("rms", "rms_offset")),
        ("norm.placement", ("pre",)),
        ("position.kind", ("relative", "relative_per_layer", "rotary", "none")),
    ):
        value = student.to_flat()[field]
        if value not in words:
            raise ValueError(
                f"model.{field}={value!r} depends on the axes of d_model, which "
                f"teacher.student_init's word projected mixes; use sliced."
            )


def _check_shared(init: str, teacher: ModelConfig, student: ModelConfig) -> None:
    unshared = init.removeprefix("shared ")
    if student.architecture != "encoder_decoder" or student.shared_params == "all":
        raise ValueError(
            f"teacher.student_init={init!r} needs an encoder of its own; use {unshared!r}, or "
            f"model.architecture='encoder_decoder' and model.shared_params='embeddings'."
        )
    count, most = student.num_encoder_layers, teacher.num_encoder_layers
    if count != most:
        raise ValueError(
            f"model.num_encoder_layers={count} is not the teacher's {most}, whose encoder "
            f"teacher.student_init={init!r} copies; use {most}, or {unshared!r}."
        )


def frozen(init: str, config: ModelConfig) -> str:
    """A regular expression of the paths of `shared`, which are not trained; "" for none.

    They are those of the encoder and of its embedding.
    """
    start = parse_start(init)
    if start is None or not start.shared:
        return ""
    return "^(encoder|encoder_embed)/" if config.shared_params == "none" else "^(encoder|embed)/"


def init_student(
    init: str, params: Any, teacher: ModelConfig, student: ModelConfig, seed: int = 0
) -> Any:
    """The student's first parameters, or None for random ones.

    params: the teacher's. seed: of the matrix of `projected`. Raises ValueError as check_student.
    """
    check_student(init, teacher, student)
    start = parse_start(init)
    if start is None:
        return None
    flat = traverse_util.flatten_dict(params, sep="/")
    if leaves_head(teacher, student):
        flat.pop("head")
    shapes = traverse_util.flatten_dict(transformer.param_shapes(student), sep="/")
    if start.width == "projected":
        flat = _project(flat, teacher, student, seed)
    for path, leaf in flat.items():
        tower = "encoder" if path.startswith("encoder") else "decoder"
        if "/layers/" in path:
            counts = (getattr(config, f"num_{tower}_layers") for config in (teacher, student))
            leaf = leaf[jnp.array(LAYERS[start.layers](*counts))]
        flat[path] = _slice(
            path, leaf, shapes[path].shape, teacher.tower(tower), student.tower(tower)
        )
    return traverse_util.unflatten_dict(flat, sep="/")


def _slice(
    path: str, leaf: jax.Array, shape: tuple, teacher: ModelConfig, student: ModelConfig
) -> jax.Array:
    """Select a student's heads and rotary pairs of a parameter, and the first of all other axes."""
    for pattern, axis in HEAD_AXES:
        if re.search(pattern, path) and leaf.shape[axis] != shape[leaf.ndim + axis]:
            # A query head keeps its key and value head: the first heads of the first groups.
            group = teacher.num_heads // teacher.num_kv_heads
            groups = np.arange(student.num_kv_heads)[:, None] * group
            heads = (groups + np.arange(student.num_heads // student.num_kv_heads)).ravel()
            leaf = jnp.take(leaf, heads, axis)
    is_rotary = student.position.kind == "rotary"
    is_rotated = is_rotary and re.search(r"self_attention/(query|key)(_norm)?/", path)
    if is_rotated and leaf.shape[-1] != shape[-1]:
        # Pairs are (i, i + H/2); every n-th has the frequency of a pair of the narrower head.
        low = np.arange(student.head_dim // 2) * (teacher.head_dim // student.head_dim)
        leaf = jnp.take(leaf, np.concatenate([low, low + teacher.head_dim // 2]), -1)
    return leaf[tuple(map(slice, shape))]


def _project(flat: dict, teacher: ModelConfig, student: ModelConfig, seed: int) -> dict:
    """Project every axis of d_model in a teacher's parameters to the student's width."""
    gains, scales = _fold_norms(flat, student)
    projected = {}
    for path, leaf in flat.items():
        # These kernels of cross-attention read the encoder's output.
        reads_encoder = re.search(r"cross_attention/(key|value)/kernel$", path)
        tower = "encoder" if path.startswith("encoder") or reads_encoder else "decoder"
        sizes = teacher.tower(tower).d_model, student.tower(tower).d_model
        matrix = _orthonormal_columns(*sizes, seed)
        norm = _norm_before(path, teacher)
        if norm:
            axis = int("/layers/" in path)
            gain = gains[norm] if gains[norm].ndim > axis else gains[norm][None]
            leaf = leaf * gain.reshape(*gain.shape, *[1] * (leaf.ndim - gain.ndim))
            projected[path] = jnp.moveaxis(jnp.tensordot(leaf, matrix, (axis, 0)), -1, axis)
        elif re.search(r"((out|down)/kernel|embedding)$", path):
            projected[path] = jnp.tensordot(leaf, matrix, (-1, 0))
        else:
            projected[path] = scales.get(path, leaf)
    return projected


def _fold_norms(flat: dict, config: ModelConfig) -> tuple[dict, dict]:
    """By path of each norm, the gain to multiply into kernels, and the scale that remains.

    A tied head cannot take the gain of the norm before it, whose mean remains as its scale.
    """
    offset, gains, scales = float(config.norm.kind == "rms_offset"), {}, {}
    is_tied = config.lm_head != "untied"
    for path in flat:
        if not re.search(r"(^|/)((self|cross|ff)_)?norm/scale$", path):
            continue
        gain = flat[path] + offset
        is_uniform = is_tied and path == _last_norm(config)
        rest = jnp.mean(gain) if is_uniform else jnp.ones([])
        gains[path] = gain / rest
        scales[path] = jnp.full(gain.shape, rest - offset, flat[path].dtype)
    return gains, scales


def _norm_before(path: str, config: ModelConfig) -> str:
    """The path of the norm whose result this kernel multiplies; "" if there is none."""
    if path == "head":
        return _last_norm(config)
    tower, _, rest = path.partition("/")
    if re.fullmatch(r"layers/cross_attention/(key|value)/kernel", rest):
        return "encoder/norm/scale"
    norms = (norm for pattern, norm in NORMS.items() if re.fullmatch(pattern, rest))
    return next((f"{tower}/{norm}" for norm in norms), "")


def _last_norm(config: ModelConfig) -> str:
    return f"{'encoder' if config.shared_params == 'all' else 'decoder'}/norm/scale"


def _orthonormal_columns(rows: int, columns: int, seed: int) -> jax.Array:
    """A random matrix [rows, columns] with orthonormal columns; a function of its arguments."""
    normal = np.random.default_rng((seed, rows, columns)).normal(size=(rows, columns))
    q, r = np.linalg.qr(normal)
    return jnp.asarray(q * np.sign(np.diag(r)), jnp.float32)
