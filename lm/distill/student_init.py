"""Where a student starts: in its teacher's layers, in a part of their width, or at random.

The words of teacher.student_init: `even`, `first` or `last` says which layers of each tower are
copied;
behind it, for a narrower student, `sliced` or `projected`; before it `shared`, where the encoder
is to be the teacher's own and to stay so. Or `random` alone. What is copied is so to the bit.

sliced     of every kernel the first units of d_model, d_ff and head_dim, and the first heads; of
           grouped heads the first of each kept group; of rotary pairs those whose frequencies
           the narrower head has.
projected  d_model is turned by a random matrix P of orthonormal columns [D, D'], W to P^T W or
           W P, the scales of the norms moved into the kernels behind them first; all else is
           sliced. At full width the logits stay (with a tied head, if the last norm's scale is
           even). Source of the folding: Ashkboos et al. 2024, section 3, arXiv:2401.15024.

A student with a tied head takes of a teacher with another matrix for it the embedding alone. That
was never a head: such a student starts above random logits, and is to learn one first.
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

SIZES = tuple(field.name for field in dataclasses.fields(transformer.EncoderConfig))
RANDOM = ", or teacher.student_init='random'"
# The norm whose result a kernel reads, by the kernel's place in a layer; of an encoder's result
# and of the head, the norm at the end of a tower.
READERS = {
    r"layers/self_attention/(query|key|value)/kernel": "layers/self_norm/scale",
    r"layers/cross_attention/query/kernel": "layers/cross_norm/scale",
    r"layers/feed_forward/(up|gate)/kernel": "layers/ff_norm/scale",
}
HEADS = ((r"query/kernel$", -2), (r"out/kernel$", -3), (r"relative_bias$", -1))


def evenly(teacher_layers: int, student_layers: int) -> list[int]:
    """Which teacher layers a shallower student copies: first and last, the rest evenly between."""
    if student_layers == 1:
        return [0]
    last = teacher_layers - 1
    return [round(i * last / (student_layers - 1)) for i in range(student_layers)]


DEPTHS = {
    "even": evenly,
    "first": lambda theirs, ours: [*range(ours)],
    "last": lambda theirs, ours: [*range(theirs - ours, theirs)],
}
WIDTHS = ("sliced", "projected")


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a student starts: a word of DEPTHS, one of WIDTHS or none, the teacher's encoder."""

    depth: str
    width: str = ""
    shared: bool = False

    def layers(self, theirs: int, ours: int) -> list[int]:
        """The teacher's layers that a tower of the student copies, in order."""
        return DEPTHS[self.depth](theirs, ours)


def parse_start(text: str) -> Start | None:
    """The start that teacher.student_init says in words, None for a random one.

    Raises ValueError for unknown words, and for some that do not go together.
    """
    words = text.split()
    for word in words:
        lookup.lookup(
            dict.fromkeys((*DEPTHS, *WIDTHS, "shared", "random")), word, "teacher.student_init"
        )
    if words == ["random"]:
        return None
    depths, widths = ([word for word in words if word in table] for table in (DEPTHS, WIDTHS))
    rest = len(words) - len(depths) - len(widths)
    shared = words[:1] == ["shared"]
    if len(depths) != 1 or len(widths) > 1 or rest != shared or shared and widths:
        raise ValueError(
            f"teacher.student_init={text!r} is no start; write even, first or last, and for "
            f"a narrower "
            f"student sliced or projected behind it, or for the teacher's own encoder shared "
            f"before it; or random alone."
        )
    return Start(depths[0], *widths, shared=shared)


def check_student(init: str, teacher_config, config) -> None:
    """Raise ValueError where this student cannot learn from this teacher, or not start so."""
    start = parse_start(init)
    initialization.check_same(config, teacher_config, ("vocab_size",), "the teacher's")
    if start is None:
        return
    sizes = (*SIZES, *(f"encoder.{size}" for size in SIZES))
    sizes += ("attention.scale",) if start.width else ()
    sizes += ("lm_head",) if leaves_head(teacher_config, config) else ()
    fields = [field for field in transformer.SHARED_KEYS if field not in sizes]
    initialization.check_same(config, teacher_config, fields, "the teacher's", RANDOM)
    for tower in ("encoder", "decoder"):
        ours, theirs = (getattr(c, f"num_{tower}_layers") for c in (config, teacher_config))
        _check_most(f"num_{tower}_layers", ours, theirs)
        _check_width(start, init, teacher_config.tower(tower), config.tower(tower))
    if start.width == "projected":
        _check_turned(config)
    if start.shared:
        _check_shared(init, teacher_config, config)


def leaves_head(teacher_config, config) -> bool:
    """Whether a student starts with a head that is no teacher's: its own embedding, tied."""
    return teacher_config.lm_head == "untied" != config.lm_head


def _check_most(field: str, ours: int, theirs: int) -> None:
    if ours > theirs:
        raise ValueError(
            f"model.{field}={ours} is more than the teacher's {theirs}; use at most {theirs}"
            f"{RANDOM}."
        )


def _check_width(start: Start, init: str, theirs, ours) -> None:
    for field in SIZES:
        most, less = getattr(theirs, field), getattr(ours, field) < getattr(theirs, field)
        if not start.width:
            part = f", teacher.student_init='{init} sliced' for a part of it" * (
                less and not start.shared
            )
            initialization.check_same(ours, theirs, (field,), "the teacher's", part + RANDOM)
        _check_most(field, getattr(ours, field), most)
    groups = [config.num_heads // config.num_kv_heads for config in (ours, theirs)]
    if groups[0] > groups[1]:
        raise ValueError(
            f"model.num_heads={ours.num_heads} has {groups[0]} to each of model.num_kv_heads="
            f"{ours.num_kv_heads}, and the teacher {groups[1]}; use more num_kv_heads"
            f"{RANDOM}."
        )
    if ours.position.kind == "rotary" and theirs.head_dim % ours.head_dim:
        raise ValueError(
            f"model.head_dim={ours.head_dim} does not divide the teacher's {theirs.head_dim}, and "
            f"its rotary pairs turn at other speeds; use {theirs.head_dim // 2}{RANDOM}."
        )


def _check_turned(config) -> None:
    for field, words in (
        ("norm.kind", ("rms", "rms_offset")),
        ("norm.placement", ("pre",)),
        ("position.kind", ("relative", "relative_per_layer", "rotary", "none")),
    ):
        value = config.to_flat()[field]
        if value not in words:
            raise ValueError(
                f"model.{field}={value!r} knows d_model's axes apart, and "
                f"teacher.student_init's word projected turns them; use sliced."
            )


def _check_shared(init: str, teacher_config, config) -> None:
    if config.architecture != "encoder_decoder" or config.shared_params == "all":
        raise ValueError(
            f"teacher.student_init={init!r} needs an encoder that does not write; use "
            f"{init.removeprefix('shared ')!r}, or model.architecture='encoder_decoder' and "
            f"model.shared_params='embeddings'."
        )
    ours, theirs = config.num_encoder_layers, teacher_config.num_encoder_layers
    if ours != theirs:
        raise ValueError(
            f"model.num_encoder_layers={ours} is not the teacher's {theirs}, whose encoder "
            f"teacher.student_init={init!r} takes; use {theirs}, or "
            f"{init.removeprefix('shared ')!r}."
        )


def frozen(init: str, config: transformer.ModelConfig) -> str:
    """The paths, as a regular expression, that stay the teacher's own; "" where all is trained.

    Those of the encoder and of the embedding that it reads.
    """
    start = parse_start(init)
    if start is None or not start.shared:
        return ""
    return "^(encoder|encoder_embed)/" if config.shared_params == "none" else "^(encoder|embed)/"


def init_student(
    init: str, teacher: Any, teacher_config, config: transformer.ModelConfig, seed: int = 0
) -> Any:
    """The student's first parameters by the words of `init`, or None for random ones.

    seed: of a projection. Raises ValueError as check_student does.
    """
    check_student(init, teacher_config, config)
    start = parse_start(init)
    if start is None:
        return None
    flat = traverse_util.flatten_dict(teacher, sep="/")
    if leaves_head(teacher_config, config):
        flat.pop("head")
    wanted = traverse_util.flatten_dict(transformer.param_shapes(config), sep="/")
    if start.width == "projected":
        flat = _turned(flat, teacher_config, config, seed)
    for path, leaf in flat.items():
        tower = "encoder" if path.startswith("encoder") else "decoder"
        if "/layers/" in path:
            depths = (getattr(c, f"num_{tower}_layers") for c in (teacher_config, config))
            leaf = leaf[jnp.array(start.layers(*depths))]
        theirs, ours = (c.tower(tower) for c in (teacher_config, config))
        flat[path] = _part(path, leaf, wanted[path].shape, theirs, ours)
    return traverse_util.unflatten_dict(flat, sep="/")


def _part(path: str, leaf, shape: tuple, theirs, ours):
    """What a narrower student takes of a parameter: heads and rotary pairs by number, or the first
    of each axis.
    """
    for pattern, axis in HEADS:
        if re.search(pattern, path) and leaf.shape[axis] != shape[leaf.ndim + axis]:
            leaf = jnp.take(leaf, _heads(theirs, ours), axis)
    turned = ours.position.kind == "rotary" and re.search(
        r"self_attention/(query|key)(_norm)?/", path
    )
    if turned and leaf.shape[-1] != shape[-1]:
        leaf = jnp.take(leaf, _pairs(theirs.head_dim, ours.head_dim), -1)
    return leaf[tuple(map(slice, shape))]


def _heads(theirs, ours) -> np.ndarray:
    # The first of each group of the first groups: a head goes on with its own keys and values.
    groups = np.arange(ours.num_kv_heads)[:, None] * (theirs.num_heads // theirs.num_kv_heads)
    return (groups + np.arange(ours.num_heads // ours.num_kv_heads)).ravel()


def _pairs(theirs: int, ours: int) -> np.ndarray:
    # Pairs (i, i + H/2): every so many-th turns as fast as those of the narrower head.
    low = np.arange(ours // 2) * (theirs // ours)
    return np.concatenate([low, low + theirs // 2])


def _turned(flat: dict, teacher_config, config, seed: int) -> dict:
    """A teacher's parameters with every axis of d_model turned into the student's."""
    gains, scales = _gains(flat, config)
    made = {}
    for path, leaf in flat.items():
        # Of the kernels of cross-attention these read what the encoder wrote.
        reads_encoder = re.search(r"cross_attention/(key|value)/kernel$", path)
        side = "encoder" if path.startswith("encoder") or reads_encoder else "decoder"
        turn = _turn(teacher_config.tower(side).d_model, config.tower(side).d_model, seed)
        norm = _norm_before(path, teacher_config)
        if norm:
            axis = int("/layers/" in path)
            gain = gains[norm] if gains[norm].ndim > axis else gains[norm][None]
            leaf = leaf * gain.reshape(*gain.shape, *[1] * (leaf.ndim - gain.ndim))
            made[path] = jnp.moveaxis(jnp.tensordot(leaf, turn, (axis, 0)), -1, axis)
        elif re.search(r"((out|down)/kernel|embedding)$", path):
            made[path] = jnp.tensordot(leaf, turn, (-1, 0))
        else:
            made[path] = scales.get(path, leaf)
    return made


def _gains(flat: dict, config) -> tuple[dict, dict]:
    """What goes from each norm into the kernels behind it, and the scale that stays, by path.

    A tied head cannot take it: of the norm before it the mean stays.
    """
    offset, gains, scales = float(config.norm.kind == "rms_offset"), {}, {}
    tied = config.lm_head != "untied"
    for path in flat:
        if not re.search(r"(^|/)((self|cross|ff)_)?norm/scale$", path):
            continue
        gain = flat[path] + offset
        stays = jnp.mean(gain) if tied and path == _last_norm(config) else jnp.ones([])
        gains[path] = gain / stays
        scales[path] = jnp.full(gain.shape, stays - offset, flat[path].dtype)
    return gains, scales


def _norm_before(path: str, config) -> str:
    # The norm whose result this kernel multiplies; "": it is no such kernel.
    if path == "head":
        return _last_norm(config)
    tower, _, rest = path.partition("/")
    if re.fullmatch(r"layers/cross_attention/(key|value)/kernel", rest):
        return "encoder/norm/scale"
    found = (norm for pattern, norm in READERS.items() if re.fullmatch(pattern, rest))
    return next((f"{tower}/{norm}" for norm in found), "")


def _last_norm(config) -> str:
    return f"{'encoder' if config.shared_params == 'all' else 'decoder'}/norm/scale"


def _turn(theirs: int, ours: int, seed: int) -> jax.Array:
    """Random orthonormal columns, [theirs, ours]: the same of the same sizes and seed."""
    drawn = np.random.default_rng((seed, theirs, ours)).normal(size=(theirs, ours))
    columns, upper = np.linalg.qr(drawn)
    return jnp.asarray(columns * np.sign(np.diag(upper)), jnp.float32)
