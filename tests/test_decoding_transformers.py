"""Search over our T5 finds the ids that transformers' `generate` finds over the same weights."""

from __future__ import annotations

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import batch, decoding, transformer

V, D, F, N, H, L = 64, 32, 64, 4, 8, 2
EOS, LENGTH, ROWS, SOURCE = 1, 10, 224, 9
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
    head="untied",
    layers="scanned",
)
MODEL = transformer.Transformer(CONFIG)
THEIRS = {  # of a layer; the feed-forward comes last, after the cross-attention if there is one
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
SEARCHES = [(w, a, s) for w in (2, 4) for a in (0.0, 0.6, 1.0, 2.0) for s in decoding.STOPS]


@pytest.fixture(scope="module")
def stranger():
    """A random T5 of transformers whose answers end after one token to never."""
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
    head[EOS] *= 2.0  # an eos often likely, often not
    model.lm_head.weight = torch.nn.Parameter(head)  # whatever the config said, untied
    for block in model.decoder.block:
        block.layer[1].EncDecAttention.o.weight.data *= 4.0  # answers that follow the inputs
    assert not torch.equal(model.lm_head.weight, model.shared.weight)
    return model


@pytest.fixture(scope="module")
def params(stranger):
    """The stranger's weights in the places of ours."""
    weights = {name: tensor.detach().numpy() for name, tensor in stranger.named_parameters()}
    unread = set(weights) - {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}

    def read(name):
        unread.discard(name + ".weight")
        return weights[name + ".weight"]

    def place(path, shape):
        match path:
            case ["embed", _]:
                return read("shared")
            case ["head"]:
                return read("lm_head").T
            case [tower, "norm", _]:
                return read(f"{tower}.final_layer_norm")
            case [tower, "relative", _]:
                return read(f"{tower}.block.0.layer.0.SelfAttention.relative_attention_bias")
            case [tower, "layers", *parts, _]:
                last = 2 if tower == "decoder" else 1
                name = ".".join(THEIRS[part] for part in parts).format(last=last)
                names = [f"{tower}.block.{i}.layer.{name}" for i in range(L)]
                return np.stack([read(name).T for name in names]).reshape(shape)

    flat = flax.traverse_util.flatten_dict(transformer.shapes(CONFIG))
    flat = {path: place(list(path), leaf.shape) for path, leaf in flat.items()}
    assert not unread
    return flax.traverse_util.unflatten_dict(flat)


@pytest.fixture(scope="module")
def inputs():
    """Ragged inputs and their mask: int [ROWS, SOURCE], int [ROWS, SOURCE]."""
    rng = np.random.default_rng(0)
    mask = (np.arange(SOURCE) < rng.integers(1, SOURCE + 1, (ROWS, 1))).astype(np.int32)
    return rng.integers(2, V, (ROWS, SOURCE)).astype(np.int32) * mask, mask


@pytest.fixture(scope="module")
def cache(params, inputs):
    """What every search starts from; the encoder runs once for all tests."""
    start = functools.partial(MODEL.apply, method="start")
    return jax.jit(start, static_argnums=3)({"params": params}, *inputs, LENGTH)


@functools.partial(jax.jit, static_argnames="config")
def search(params, cache, config):
    """Greedy where config is None."""
    step = functools.partial(MODEL.apply, {"params": params}, method="decode_step")
    start = jnp.zeros(ROWS, jnp.int32)
    if config is None:
        return decoding.greedy(step, cache, start, length=LENGTH, eos=EOS)
    return decoding.beam(step, cache, start, transformer.take_rows, config, length=LENGTH, eos=EOS)


def generate(stranger, inputs, mask, **options):
    """transformers' ids int [B, n, LENGTH] and scores [B, n], pad after eos."""
    import torch

    beams = options.get("num_beams", 1)
    made = stranger.generate(
        input_ids=torch.tensor(inputs),
        attention_mask=torch.tensor(mask),
        max_new_tokens=LENGTH,
        do_sample=False,
        num_return_sequences=beams,
        eos_token_id=EOS,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    ids = made.sequences[:, 1:].numpy()
    ids = np.pad(ids, ((0, 0), (0, LENGTH - ids.shape[1])))
    ended = np.cumsum(ids == EOS, axis=1) - (ids == EOS) > 0
    ids = np.where(ended, 0, ids)  # its beams fill the tail with eos where pad is 0
    scores = made.sequences_scores.numpy().reshape(-1, beams) if beams > 1 else None
    return ids.reshape(-1, beams, LENGTH), scores


def score(params, inputs, mask, ids, alpha):
    """The scores of answers [B, n, LENGTH] by one teacher-forced pass over whole answers."""
    rows, beams, _ = ids.shape
    repeat = lambda x: np.repeat(x, beams, axis=0)
    ids = ids.reshape(rows * beams, LENGTH)
    real = np.cumsum(ids == EOS, axis=1) - (ids == EOS) == 0
    examples = batch.Batch(repeat(inputs), repeat(mask), ids, real.astype(np.int32))
    logs = jax.nn.log_softmax(jax.jit(MODEL.apply)({"params": params}, examples))
    logs = np.take_along_axis(np.asarray(logs), ids[..., None], axis=-1)[..., 0]
    return ((logs * real).sum(1) / real.sum(1) ** alpha).reshape(rows, beams)


def test_greedy_ids_equal_generate(stranger, params, cache, inputs):
    expected, _ = generate(stranger, *inputs)
    np.testing.assert_array_equal(search(params, cache, None), expected[:, 0])


@pytest.mark.parametrize("width, alpha, stop", SEARCHES)
def test_beam_ids_equal_generate(width, alpha, stop, stranger, params, cache, inputs):
    expected, expected_scores = generate(
        stranger,
        *inputs,
        num_beams=width,
        length_penalty=alpha,
        early_stopping=decoding.STOPS[stop],
    )
    config = decoding.BeamConfig(width, alpha, stop=stop)
    ids, scores = search(params, cache, config)
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5, rtol=1e-5)
    ended = (np.asarray(ids) == EOS).any(-1)
    assert 0.1 < ended.mean() < 0.9  # some end early, some never: both count


def test_a_beam_score_is_what_teacher_forcing_gives(params, cache, inputs):
    config = decoding.BeamConfig(width=4, alpha=0.6)
    ids, scores = search(params, cache, config)
    expected = score(params, *inputs, np.asarray(ids), 0.6)
    np.testing.assert_allclose(scores, expected, atol=1e-5, rtol=1e-5)
