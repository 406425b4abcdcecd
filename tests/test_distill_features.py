"""Laws of the terms that compare states inside student and teacher."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import attention, batch, cpu_kernels, transformer
from lm.distill import features
from tests.towers import (  # noqa: F401
    EXAMPLES,
    MODEL,
    drawn,
    term,
)

ALONE = {"num_encoder_layers": 0}
ARCHITECTURES = {
    "T5": {},
    "grouped heads that turn": {
        "num_kv_heads": 2,
        "position.kind": "rotary",
        "attention.query_key_norm": "rms",
    },
    "windows": {
        "attention.pattern": "local_global_1_1",
        "attention.window_size": 2,
        "norm.placement": "both",
    },
    "one tower for both": {"shared_params": "all", "num_decoder_layers": 2},
    "an encoder of its own": {"shared_params": "none", "encoder": {"d_model": 24, "num_heads": 8}},
    "prefix_lm": {"architecture": "prefix_lm", **ALONE},
    "language_model": {"architecture": "language_model", **ALONE, "norm.placement": "post"},
}
KINDS = (
    {"hidden": {"encoder": "all", "decoder": (0, 1, 2)}},
    {"hidden": {"distance": "cosine", "encoder": "even", "decoder": "all"}},
    {"attention": {"encoder": "all", "decoder": "all"}},
    {"relations": {"heads": 2, "encoder": "last", "decoder": "all"}},
)


def model_of(**words):
    return transformer.Transformer(MODEL.replace(words))


def packed(examples: batch.Batch) -> batch.Batch:
    """The same examples in one row."""

    def side(ids, segments):  # fmt: skip
        own = (segments * np.arange(1, len(ids) + 1)[:, None])[segments > 0]
        return ids[segments > 0][None], own[None].astype(np.int32)

    return batch.Batch(*side(*examples[:2]), *side(*examples[2:4]))


def totals(ours, theirs, examples=EXAMPLES):
    """The total of each term of KINDS for two (model, parameters)."""
    shown = [features.forward(*each, examples, None, True)[1] for each in (ours, theirs)]
    return jnp.stack([features.compare(term(kind), *shown, examples)[0] for kind in KINDS])


def made(**shown) -> features.Features:
    """Hand-made features of a decoder with one layer."""
    config = MODEL.replace({"num_decoder_layers": 1} | shown.pop("words", {}))
    inside = {"self_attention": {name: (x[None],) for name, x in shown.items() if x.ndim > 3}}
    ends = {name: (x,) for name, x in shown.items() if x.ndim == 3}
    tower = {"layers": inside, **ends}
    return features.Features(config, {"encoder": tower, "decoder": tower})


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# Features. -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["T5", "windows", "prefix_lm"])
def test_without_features_the_program_does_not_compute_them(name, monkeypatch):
    model = model_of(**ARCHITECTURES[name])
    params, key = transformer.param_shapes(model.config), jax.random.key(0)

    def program():
        jax.clear_caches()
        plain = lambda params: features.forward(model, params, EXAMPLES, key, False)[0]
        both = lambda params: jax.value_and_grad(lambda x: jnp.sum(plain(x)))(params)
        first = lambda key: model.init(key, EXAMPLES)
        return str(jax.make_jaxpr(both)(params)), str(jax.make_jaxpr(first)(key))

    ours = program()
    monkeypatch.setattr(nn.Module, "sow", lambda *args, **kwargs: False)
    monkeypatch.setattr(attention, "scores", None)
    assert program() == ours


COMPUTED = [
    {"remat_policy": "dots", "scan_layers": False},
    {"attention.implementation": "einsum", "remat_policy": "full"},
]


@pytest.mark.parametrize("words", COMPUTED, ids=str)
def test_features_do_not_depend_on_scan_or_attention_implementation(words, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "MIN_ROW_SCORES", 0)  # rows one after the other
    ways = model_of(), model_of(**words)
    params = drawn(ways[0], 0)
    show = lambda model: lambda params: features.forward(model, params, EXAMPLES, None, True)
    (ours, one), (theirs, other) = (jax.jit(show(model))(params) for model in ways)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        one.intermediates,
        other.intermediates,
    )


def test_hidden_states_and_attentions_equal_those_of_transformers_t5(tmp_path):
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from lm.interop import transformers

    words = {"num_encoder_layers": 3, "num_decoder_layers": 2}
    model = model_of(**words)
    params = drawn(model, 1)
    transformers.write(params, model.config, tmp_path / "t5")
    stranger = theirs.AutoModelForSeq2SeqLM.from_pretrained(
        tmp_path / "t5", attn_implementation="eager"
    ).eval()
    ours = features.forward(model, params, EXAMPLES, None, True)[1]
    read = slice(0, 3)  # an empty row is nothing to a stranger
    tensor = lambda x: torch.tensor(np.asarray(x[read])).long()
    said = batch.shift_right(EXAMPLES.targets, EXAMPLES.targets_segment_ids)
    with torch.no_grad():
        found = stranger(
            tensor(EXAMPLES.inputs),
            attention_mask=tensor(EXAMPLES.inputs_segment_ids),
            decoder_input_ids=tensor(said),
            decoder_attention_mask=tensor(EXAMPLES.targets_segment_ids),
            output_hidden_states=True,
            output_attentions=True,
        )
    for name, segments in (("encoder", EXAMPLES[1]), ("decoder", EXAMPLES[3])):
        tower, real = ours.tower(name), (segments > 0)[read]
        for layer, state in enumerate(found[f"{name}_hidden_states"]):
            own = tower.hidden_state(layer)[read][real]
            np.testing.assert_allclose(own, state.numpy()[real], rtol=1e-4, atol=1e-5)
    for name, side, part in (
        ("encoder_attentions", "encoder", "self_attention"),
        ("decoder_attentions", "decoder", "self_attention"),
        ("cross_attentions", "decoder", "cross_attention"),
    ):
        real = ((EXAMPLES[1] if side == "encoder" else EXAMPLES[3]) > 0)[read]
        for layer, maps in enumerate(found[name], 1):
            own = jax.nn.softmax(ours.tower(side).attention(part, "scores", layer))[read]
            own, maps = (np.moveaxis(np.asarray(x), 1, 2)[real] for x in (own, maps))
            np.testing.assert_allclose(own, maps, rtol=1e-4, atol=1e-5)


def test_a_shared_tower_has_encoder_features_first_and_decoder_features_last():
    model = model_of(**ARCHITECTURES["one tower for both"])
    params = drawn(model, 0)
    shown = features.forward(model, params, EXAMPLES, None, True)[1]
    said = batch.shift_right(EXAMPLES.targets, EXAMPLES.targets_segment_ids)
    for name, ids in (("encoder", EXAMPLES.inputs), ("decoder", said)):
        expected = params["embed"]["embedding"][ids]
        np.testing.assert_allclose(shown.tower(name).hidden_state(0), expected, rtol=1e-6)
    assert shown.tower("encoder").attention_kinds == ["self_attention"]


# Comparisons. --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equal_models_have_zero_feature_losses_and_different_ones_do_not(name):
    model = model_of(**ARCHITECTURES[name])
    same, other = drawn(model, 0), drawn(model, 1)

    @jax.jit
    def learnt(ours):
        each, back = jax.vjp(lambda ours: totals((model, ours), (model, same)), ours)
        slope = back(jnp.ones(len(KINDS)))[0]
        return each, jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in jax.tree.leaves(slope)]))

    each, slope = learnt(same)
    assert max(abs(each)) < 1e-5 and slope < 1e-4
    each, slope = learnt(other)
    assert min(each) > 0.01 and np.all(np.isfinite(each)) and slope > 1e-3


@pytest.mark.parametrize("name", ["T5", "one tower for both", "an encoder of its own"])
def test_packing_and_padding_change_no_total(name):
    model = model_of(**ARCHITECTURES[name])
    ours, theirs = (model, drawn(model, 0)), (model, drawn(model, 1))
    expected = totals(ours, theirs)
    np.testing.assert_allclose(totals(ours, theirs, packed(EXAMPLES)), expected, rtol=1e-4)
    inputs, theirs_of, targets, own = (np.pad(part, ((0, 1), (0, 3))) for part in EXAMPLES[:4])
    # What padding holds is no matter.
    inputs, targets = np.where(theirs_of > 0, inputs, 7), np.where(own > 0, targets, 7)
    wider = batch.Batch(inputs, theirs_of, targets, own)
    np.testing.assert_allclose(totals(ours, theirs, wider), expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["T5", "prefix_lm"])
def test_the_totals_of_rows_add_up(name):
    model = model_of(**ARCHITECTURES[name])
    ours, theirs = (model, drawn(model, 0)), (model, drawn(model, 1))
    total = jax.jit(lambda examples: totals(ours, theirs, examples))
    rows = [batch.Batch(*(part[[at]] for part in EXAMPLES[:4])) for at in range(4)]
    np.testing.assert_allclose(total(EXAMPLES), sum(map(total, rows)), rtol=1e-5)


def test_a_difference_of_one_everywhere_totals_the_targets_of_each_tower():
    ours, theirs = (made(output=jnp.full((4, 9, 16), x)) for x in (1.0, 2.0))
    for kind, towers in (
        ({"hidden": {}}, 2),
        ({"hidden": {"encoder": "none"}}, 1),
        ({"hidden": {"decoder": "none"}}, 1),
    ):
        total, weight = features.compare(term(kind), ours, theirs, EXAMPLES)
        np.testing.assert_allclose((total, weight), (12 * towers, 12), rtol=1e-6)


@pytest.mark.parametrize("name", ["queries", "keys", "values"])
def test_relations_do_not_depend_on_rotations_of_a_head(name):
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))
    ours = normal(0, 4, 9, 2, 8)
    said = {"relations": {"encoder": "none", "heads": 2, "vectors": name[0]}}
    words = {"words": {"num_heads": 2, "num_kv_heads": 2, "head_dim": 8}}
    one, turned, longer = (made(**{name: x}, **words) for x in (ours, ours @ turn, ours * 2))
    total = lambda theirs: float(features.compare(term(said), one, theirs, EXAMPLES)[0])
    assert abs(total(turned)) < 1e-5 < 1e-2 < total(longer)


def test_relations_do_not_depend_on_the_number_of_attention_heads():
    shown = {name: normal(at, 4, 9, 2, 8) for at, name in enumerate(("queries", "keys", "values"))}
    cut = {name: x.reshape(4, 9, 4, 4) for name, x in shown.items()}
    two, four = made(**shown, words={"num_heads": 2, "num_kv_heads": 2, "head_dim": 8}), made(**cut)
    for heads in (1, 2, 4, 8, 16):
        said = term({"relations": {"encoder": "none", "heads": heads}})
        assert abs(float(features.compare(said, two, four, EXAMPLES)[0])) < 1e-5
    other = made(**{name: x[::-1] for name, x in cut.items()})
    assert (
        float(features.compare(term({"relations": {"encoder": "none"}}), two, other, EXAMPLES)[0])
        > 0.1
    )


# Against references. -------------------------------------------------------------------------


def test_relations_equal_minilm_in_torch():
    torch = pytest.importorskip("torch")
    ours = {name: normal(at, 4, 9, 4, 4) for at, name in enumerate(("queries", "keys", "values"))}
    theirs = {name: normal(9 + at, 4, 9, 2, 16) for at, name in enumerate(ours)}

    def related(x, length):  # [1, heads, length, length], as the paper's equations 4 to 6 have it
        x = torch.tensor(np.asarray(x))[:length].reshape(1, length, 8, -1).transpose(1, 2)
        return torch.log_softmax(x @ x.transpose(2, 3) / x.shape[-1] ** 0.5, dim=-1)

    expected = 0.0
    for at, length in enumerate([4, 1, 7]):
        for name in ours:
            one, other = (related(side[name][at], length) for side in (ours, theirs))
            kl = torch.nn.functional.kl_div(one, other, reduction="sum", log_target=True)
            expected += float(kl) / 8  # the mean over relation heads
    wide = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 16}
    said = term({"relations": {"encoder": "none", "heads": 8}})
    found = features.compare(said, made(**ours), made(**theirs, words=wide), EXAMPLES)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("distance", ["mse", "cosine"])
def test_hidden_state_distances_equal_torch(distance):
    torch = pytest.importorskip("torch")
    ours, theirs = normal(0, 4, 9, 16), normal(1, 4, 9, 16)
    real = torch.tensor(EXAMPLES.targets_segment_ids > 0)
    one, other = (torch.tensor(np.asarray(x))[real] for x in (ours, theirs))
    if distance == "mse":
        expected = torch.nn.functional.mse_loss(one, other) * len(one)
    else:  # as DistilBERT's distiller calls it
        near = torch.ones(len(one))
        expected = torch.nn.functional.cosine_embedding_loss(one, other, near, reduction="sum")
    said = term({"hidden": {"distance": distance, "encoder": "none"}})
    found = features.compare(said, made(output=ours), made(output=theirs), EXAMPLES)[0]
    np.testing.assert_allclose(found, float(expected), rtol=1e-5)


def test_attention_divergences_equal_torch_also_with_masked_entries():
    torch = pytest.importorskip("torch")
    ours, theirs = normal(0, 4, 4, 9, 9), 30 * normal(1, 4, 4, 9, 9)
    seen = np.tril(np.ones((9, 9), bool))
    ours, theirs = (jnp.where(seen, x, jnp.finfo(jnp.float32).min) for x in (ours, theirs))
    one, other = (torch.tensor(np.asarray(x)).double() for x in (ours, theirs))
    kl = torch.softmax(other, -1) * (torch.log_softmax(other, -1) - torch.log_softmax(one, -1))
    expected = kl.sum(-1).mean(1)[torch.tensor(EXAMPLES.targets_segment_ids > 0)].sum()
    said = term({"attention": {"encoder": "none"}})
    total = lambda x: features.compare(said, made(scores=x), made(scores=theirs), EXAMPLES)[0]
    found, slope = jax.value_and_grad(total)(ours)
    np.testing.assert_allclose(found, float(expected), rtol=1e-5)
    assert np.all(np.isfinite(slope)) and np.all(slope[..., ~seen] == 0)
