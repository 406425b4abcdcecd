"""Search gives the ids of transformers' `generate` for the same T5 weights."""

from __future__ import annotations

import functools
import pathlib
import zlib

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import batch, decoding, sources, transformer

V, D, F, N, H, L = 64, 32, 64, 4, 8, 2
EOS, LENGTH, ROWS, SOURCE = 1, 10, 224, 16
CONFIG = transformer.ModelConfig(
    vocab_size=V,
    d_model=D,
    d_ff=F,
    num_heads=N,
    num_kv_heads=N,
    head_dim=H,
    num_encoder_layers=L,
    num_decoder_layers=L,
    activation="geglu",
    lm_head="untied",
    scan_layers=True,
)
MODEL = transformer.Transformer(CONFIG)
T5_NAMES = {  # of a layer; the feed-forward is last, after any cross-attention
    "self_attention": "0.SelfAttention",
    "cross_attention": "1.EncDecAttention",
    "self_norm": "0.layer_norm",
    "cross_norm": "1.layer_norm",
    "feed_forward": "{last}.DenseReluDense",
    "ff_norm": "{last}.layer_norm",
    "query": "q",
    "key": "k",
    "value": "v",
    "out": "o",
    "gate": "wi_0",
    "up": "wi_1",
    "down": "wo",
}
GREEDY = {  # short form: arguments of `generate`
    "": {},
    "repetition_penalty=1.5": {"repetition_penalty": 1.5},
    "min_length=4 repetition_penalty=0.8": {"min_new_tokens": 4, "repetition_penalty": 0.8},
}
BEAMS = {
    "num_beams=2 length_penalty=0": {"num_beams": 2, "length_penalty": 0.0},
    "num_beams=2 length_penalty=2 early_stopping=True": {
        "num_beams": 2, "length_penalty": 2.0, "early_stopping": True,
    },
    "num_beams=4 length_penalty=0.6": {"num_beams": 4, "length_penalty": 0.6},
    "num_beams=4 length_penalty=1 early_stopping=True": {
        "num_beams": 4, "length_penalty": 1.0, "early_stopping": True,
    },
    "num_beams=4 length_penalty=2": {"num_beams": 4, "length_penalty": 2.0},
    "num_beams=4 length_penalty=1 num_return_sequences=3 repetition_penalty=1.5": {
        "num_beams": 4, "length_penalty": 1.0, "repetition_penalty": 1.5
    },
    "num_beams=4 length_penalty=0.6 num_return_sequences=1 min_length=5": {
        "num_beams": 4, "length_penalty": 0.6, "min_new_tokens": 5
    },
    "num_beams=3 length_penalty=0 early_stopping=True num_return_sequences=2 "
    "repetition_penalty=0.7 min_length=3 max_length=7": {
        "num_beams": 3, "length_penalty": 0.0, "early_stopping": True,
        "repetition_penalty": 0.7, "min_new_tokens": 3, "max_new_tokens": 7,
    },
}  # fmt: skip
ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def t5():
    """A random T5 of transformers whose answers have all lengths."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=V,
            d_model=D,
            d_kv=H,
            d_ff=F,
            num_layers=L,
            num_decoder_layers=L,
            num_heads=N,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            decoder_start_token_id=0,
        )
    ).eval()
    head = 0.4 * torch.randn(V, D)
    head[EOS] *= 2.0  # eos is often probable, often not
    model.lm_head.weight = torch.nn.Parameter(head)  # untied
    for block in model.decoder.block:
        block.layer[1].EncDecAttention.o.weight.data *= 4.0  # answers depend on the inputs
    assert not torch.equal(model.lm_head.weight, model.shared.weight)
    return model


@pytest.fixture(scope="module")
def params(t5):
    """The weights of t5 as parameters of MODEL."""
    weights = {name: tensor.detach().numpy() for name, tensor in t5.named_parameters()}
    unread = set(weights) - {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}

    def read(name):
        unread.discard(name + ".weight")
        return weights[name + ".weight"]

    def read_leaf(path, shape):
        match path:
            case ["embed", _]:
                return read("shared")
            case ["head"]:
                return read("lm_head").T
            case [tower, "norm", _]:
                return read(f"{tower}.final_layer_norm")
            case [tower, "relative", _]:
                return read(f"{tower}.block.0.layer.0.SelfAttention.relative_attention_bias")
            case [tower, "layers", *names, _]:
                last = 2 if tower == "decoder" else 1
                name = ".".join(T5_NAMES[name] for name in names).format(last=last)
                t5_names = [f"{tower}.block.{i}.layer.{name}" for i in range(L)]
                return np.stack([read(name).T for name in t5_names]).reshape(shape)

    flat = flax.traverse_util.flatten_dict(transformer.param_shapes(CONFIG))
    flat = {path: read_leaf(list(path), leaf.shape) for path, leaf in flat.items()}
    assert not unread
    return flax.traverse_util.unflatten_dict(flat)


def sentences():
    """Read ROWS lines of text: English captions if that data set is present, else README."""
    tfds_dir = ROOT.parent / "shared" / "tfds"
    if (tfds_dir / "multi30k").is_dir():
        records = sources.tfds_records("multi30k", "test", str(tfds_dir))
        return [records[index]["en"] for index in range(ROWS)]
    lines = (ROOT / "README.md").read_text().splitlines() + (
        ROOT / "NOTEBOOK.md"
    ).open().readlines()
    return [line for line in lines if len(line.split()) > 3][:ROWS]


@pytest.fixture(scope="module")
def inputs():
    """Inputs, a token for each word, and their mask: int [ROWS, SOURCE], int [ROWS, SOURCE]."""
    ids, mask = np.zeros((2, ROWS, SOURCE), np.int32)
    for row, text in enumerate(sentences()):
        words = [2 + zlib.crc32(word.encode()) % (V - 2) for word in text.split()][: SOURCE - 1]
        ids[row, : len(words) + 1], mask[row, : len(words) + 1] = [*words, EOS], 1
    assert mask.any(1).all() and len(set(mask.sum(1))) > 5
    return ids, mask


@pytest.fixture(scope="module")
def cache(params, inputs):
    """The cache at the start; the encoder runs once for all tests."""
    start = functools.partial(MODEL.apply, method="start")
    return jax.jit(start, static_argnums=3)({"params": params}, *inputs, LENGTH)


@functools.partial(jax.jit, static_argnames="config")
def search(params, cache, config):
    step = functools.partial(MODEL.apply, {"params": params}, method="decode_step")
    start, gather = jnp.zeros(ROWS, jnp.int32), transformer.gather_beams
    return decoding.search(
        step, cache, start, gather, config, length=config.max_tokens(LENGTH), eos=EOS
    )


def generate(t5, inputs, mask, config, options):
    """Return ids int [B, n, T], pad after eos, and scores [B, n] of transformers."""
    import torch

    length = config.max_tokens(LENGTH)
    output = t5.generate(
        input_ids=torch.tensor(inputs),
        attention_mask=torch.tensor(mask),
        do_sample=False,
        num_return_sequences=config.num_return_sequences,
        eos_token_id=EOS,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **{"max_new_tokens": LENGTH} | options,
    )
    ids = output.sequences[:, 1:].numpy()
    ids = np.pad(ids, ((0, 0), (0, length - ids.shape[1])))
    ended = np.cumsum(ids == EOS, axis=1) - (ids == EOS) > 0
    ids = np.where(ended, 0, ids)  # transformers pads beams with eos
    shape = (-1, config.num_return_sequences)
    scores = output.sequences_scores.numpy().reshape(shape) if config.method == "beam" else None
    return ids.reshape(*shape, length), scores


def score(params, inputs, mask, ids, alpha):
    """Score answers [B, n, LENGTH] by one teacher-forced pass."""
    rows, beams, _ = ids.shape
    repeat = lambda x: np.repeat(x, beams, axis=0)
    ids = ids.reshape(rows * beams, LENGTH)
    real = np.cumsum(ids == EOS, axis=1) - (ids == EOS) == 0
    examples = batch.Batch(repeat(inputs), repeat(mask), ids, real.astype(np.int32))
    logs = jax.nn.log_softmax(jax.jit(MODEL.apply)({"params": params}, examples))
    logs = np.take_along_axis(np.asarray(logs), ids[..., None], axis=-1)[..., 0]
    return ((logs * real).sum(1) / real.sum(1) ** alpha).reshape(rows, beams)


@pytest.mark.parametrize("words", GREEDY)
def test_greedy_ids_equal_generate(words, t5, params, cache, inputs):
    config = decoding.parse(f"greedy {words}")
    expected, _ = generate(t5, *inputs, config, GREEDY[words])
    np.testing.assert_array_equal(search(params, cache, config).ids, expected)
    assert len(np.unique(expected, axis=0)) > ROWS / 10  # answers depend on the inputs


@pytest.mark.parametrize("words, options", BEAMS.items())
def test_beam_ids_equal_generate(words, options, t5, params, cache, inputs):
    if "num_return_sequences" not in words:
        words += f" num_return_sequences={options['num_beams']}"
    config = decoding.parse(f"beam length_penalty_kind=power {words}")
    expected, expected_scores = generate(t5, *inputs, config, options)
    ids, scores = search(params, cache, config)
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5, rtol=1e-5)
    ended = (np.asarray(ids) == EOS).any(-1)
    assert 0.05 < ended.mean() < 0.95  # both kinds occur


def test_a_beam_score_equals_that_of_teacher_forcing(params, cache, inputs):
    ids, scores = search(
        params,
        cache,
        decoding.parse("beam num_return_sequences=4 length_penalty=0.6 length_penalty_kind=power"),
    )
    expected = score(params, *inputs, np.asarray(ids), 0.6)
    np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=1e-5)


def test_a_greedy_score_equals_that_of_teacher_forcing(params, cache, inputs):
    ids, scores = search(
        params, cache, decoding.parse("greedy repetition_penalty=1.5 min_length=2")
    )
    expected = score(params, *inputs, np.asarray(ids), 0.0)
    np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=1e-5)
