"""Laws of checkpoints of transformers as files: every tensor is read to the bit or refused."""

from __future__ import annotations

import json
import re

import jax
import numpy as np
import pytest

from experiments import parity
from lm import transformer
from lm.interop import names, transformers


def exported(directory, name="t5_1_1", most=5_000_000_000):
    """A random model of EXPORTS in a directory; its config and parameters."""
    config = transformer.ModelConfig.from_flat(parity.EXPORTS[name])
    params = parity.random_params(config)
    transformers.write(params, config, directory, most)
    return config, params


def alter(directory, tensors=None, **keys) -> None:
    """Change tensors of a checkpoint (None: remove), and keys of its config."""
    safetensors = pytest.importorskip("safetensors.numpy")
    path = directory / "model.safetensors"
    changed = safetensors.load_file(path) | (tensors or {})
    safetensors.save_file({key: x for key, x in changed.items() if x is not None}, path)
    config = json.loads((directory / "config.json").read_text())
    config |= keys
    written = {key: value for key, value in config.items() if value != "absent"}
    (directory / "config.json").write_text(json.dumps(written))


def same_bits(one, other) -> bool:
    same = lambda a, b: a.dtype == b.dtype == np.float32 and a.tobytes() == b.tobytes()
    return jax.tree.all(jax.tree.map(same, one, other))


@pytest.mark.parametrize("most", [1, 4000, 5_000_000_000])
@pytest.mark.parametrize("name", parity.EXPORTS)
def test_importing_an_export_gives_the_same_bits_and_the_same_architecture(tmp_path, name, most):
    config, params = exported(tmp_path / "out", name, most)
    read = transformer.ModelConfig.from_flat(transformers.read_architecture(tmp_path / "out"))
    if config.position.kind != "rotary":  # and these play no part
        read = read.replace(
            {
                "position.rotary_base": config.position.rotary_base,
                "attention.window_size": config.attention.window_size,
            }
        )
    assert read == config
    assert same_bits(transformers.read_params(tmp_path / "out", read), params)
    sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")]
    assert len(sizes) == 1 if most > 10**9 else len(sizes) > 5
    assert not list(tmp_path.glob(".*"))  # no draft is left


OTHER = {  # for every field of ModelConfig that has to do with the function, another value
    "vocab_size": 90, "d_model": 20, "d_ff": 20, "num_heads": 8, "num_kv_heads": 1, "head_dim": 8,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "encoder.d_ff": 7,
    "decoder_start_token_id": 9,
    "architecture": "prefix_lm",
    "shared_params": "all",
    "position.kind": "none",
    "position.relative_attention_num_buckets": 12,
    "position.relative_attention_max_distance": 90,
    "position.rotary_base": 70.0,
    "norm.kind": "layer",
    "norm.placement": "post",
    "attention.query_key_norm": "rms",
    "activation": "swiglu",
    "attention.scale": 0.5,
    "attention.logits_soft_cap": 7.0,
    "final_logits_soft_cap": 7.0,
    "attention.pattern": "local",
    "attention.window_size": 5,
    "lm_head": "tied",
    "dropout_rate": 0.25,
    "embedding_scale": "none",
}  # fmt: skip
UNUSED = {  # by position.kind, the fields that have no effect
    "relative": {"attention.window_size", "position.rotary_base", "embedding_scale"},
    "relative_per_layer": {"attention.window_size", "position.rotary_base", "embedding_scale"},
    "rotary": {
        "position.relative_attention_num_buckets",
        "position.relative_attention_max_distance",
    },
}
# The encoder's other sizes are refused as d_ff is, where they have no key of their own.
ENCODER_SIZES = {f"encoder.{size}" for size in ("d_model", "num_heads", "num_kv_heads", "head_dim")}
COMPUTED = set(transformer.COMPUTE_KEYS) - {"dropout_rate"}
WITH = {"architecture": dict(num_encoder_layers=0, shared_params="embeddings")}
WITH |= {"shared_params": dict(num_encoder_layers=2)}


@pytest.mark.parametrize("position", UNUSED)
def test_every_field_of_the_model_is_written_or_refused(position):
    fields = (
        parity.OURS_GEMMA if position == "rotary" else parity.OURS | {"position.kind": position}
    )
    config = transformer.ModelConfig.from_flat(fields)
    expected = names.transformers_config(config, names.family_of(config))
    fields = set(config.to_flat()) - COMPUTED
    assert fields - ENCODER_SIZES == set(OTHER)
    for field in set(OTHER) - UNUSED[position]:
        other = config.replace({field: OTHER[field]} | WITH.get(field, {}))
        try:
            assert names.transformers_config(other, names.family_of(other)) != expected, field
        except ValueError as error:
            assert re.match(f"model.{field}=|.*model.{field}=|model.num_kv_heads=", str(error))


REFUSED = {  # what cannot be exported: fields, and the message
    "post": ({"norm.placement": "post"}, "norm.placement='post'.*'pre'"),
    "layer": ({"norm.kind": "layer"}, "norm.kind='layer'.*'rms'"),
    "sinusoidal": ({"position.kind": "sinusoidal"}, "position.kind='sinusoidal'.*relative"),
    "grouped": (dict(num_kv_heads=2), "num_kv_heads=2.*t5 has 4"),
    "decoder alone": (dict(architecture="prefix_lm", num_encoder_layers=0), "architecture"),
    "narrow encoder": (dict(encoder=dict(d_ff=7)), "encoder.d_ff=7"),
    "capped": (dict(final_logits_soft_cap=30.0), "final_logits_soft_cap=30.0.*0.0"),
    "umt5 tied_unscaled": (
        {"position.kind": "relative_per_layer", "lm_head": "tied_unscaled"},
        "head",
    ),
    "scale": (parity.OURS_GEMMA | {"attention.scale": 0.3}, "attention.scale=0.3.*integer"),
    "scale above 1": (parity.OURS_GEMMA | {"attention.scale": 2.0}, "attention.scale=2.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_no_family_can_represent_is_refused_and_leaves_no_files(tmp_path, case):
    fields, message = REFUSED[case]
    config = transformer.ModelConfig.from_flat(parity.OURS | fields)
    with pytest.raises(ValueError, match=message):
        transformers.write(parity.random_params(config), config, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_parameters_of_another_model_are_not_written(tmp_path):
    config, params = exported(tmp_path / "out")
    other = params | {"head": params["head"][:, :-1]}
    with pytest.raises(ValueError, match=r"head \(16, 95\) \(not \(16, 96\)\)"):
        transformers.write(other, config, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_error_lists_missing_unused_misshapen_and_differing_tensors(tmp_path):
    config, params = exported(tmp_path)
    query = "encoder.block.0.layer.0.SelfAttention.q.weight"
    alter(
        tmp_path,
        {
            "decoder.final_layer_norm.weight": None,
            "encoder.block.1.layer.1.layer_norm.weight": None,
            "encoder.block.9.layer.1.layer_norm.weight": np.ones(16, np.float32),
            query: np.zeros((24, 15), np.float32),
            "encoder.embed_tokens.weight": np.zeros((96, 16), np.float32),
        },
    )
    with pytest.raises(ValueError) as error:
        transformers.read_params(tmp_path, config)
    for text in (
        "missing: decoder.final_layer_norm.weight, encoder.block.1.layer.1.layer_norm.weight;",
        "unused: encoder.block.9.layer.1.layer_norm.weight;",
        f"of another shape: {query} [24, 15] (the model needs [24, 16]);",
        "differing though they should be copies: encoder.embed_tokens.weight (from shared.weight).",
    ):
        assert text in str(error.value)


def test_copies_and_leftovers_are_accepted_and_a_copy_can_replace_the_original(tmp_path):
    config, params = exported(tmp_path, "t5_1_0")
    bias = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    shared = params["embed"]["embedding"]
    copies = {f"{tower}.embed_tokens.weight": shared for tower in ("encoder", "decoder")}
    extra = {"lm_head.weight": shared, bias: np.ones((8, 4), np.float32)}
    alter(tmp_path, copies | extra)
    assert transformers.read_architecture(tmp_path)["lm_head"] == "tied"
    assert same_bits(transformers.read_params(tmp_path, config), params)
    alter(tmp_path, {"shared.weight": None})
    assert same_bits(transformers.read_params(tmp_path, config), params)


UNSCALED, SCALED = {"scale_decoder_outputs": False}, {"scale_decoder_outputs": True}
BY_ROOT = {"5, scaled and own", "5, loaded umT5", "5.23, the word unread", "6, scaled and own"}
HEADS = {  # model_type, keys of config.json, head in the file (None, "copy", "own"): lm_head
    "4.57, T5 1.0": ("t5", {}, None, "tied"),
    "4.57, T5 1.0 with copies": ("t5", {"tie_word_embeddings": True}, "copy", "tied"),
    "4.57, T5 1.1": ("t5", {"tie_word_embeddings": False}, "own", "untied"),
    "4.57, T5 1.1, head lost": ("t5", {"tie_word_embeddings": False}, None, "untied"),
    "4.57, two minds": ("t5", {"tie_word_embeddings": True}, "own", "disagree"),
    "4.57 after 5, T5 1.1": ("t5", {"scale_decoder_outputs": False}, None, "tied"),
    "5, T5 1.0": ("t5", {"five": True, "scale_decoder_outputs": True}, None, "tied"),
    "5, fresh T5 1.1": (
        "t5",
        {"five": True, "scale_decoder_outputs": False},
        None,
        "tied_unscaled",
    ),
    "5, loaded T5 1.1": ("t5", {"five": True, "scale_decoder_outputs": False}, "own", "untied"),
    "5, scaled and own": ("t5", {"five": True, "scale_decoder_outputs": True}, "own", "untied"),
    "4.57, mT5": ("mt5", {"tie_word_embeddings": False}, "own", "untied"),
    "4.57, mT5 by default": ("mt5", {}, "own", "untied"),
    "4.57, tied mT5": ("mt5", {"tie_word_embeddings": True}, None, "tied"),
    "5, fresh mT5": ("mt5", {"five": True}, None, "tied_unscaled"),
    "5, loaded mT5": ("mt5", {"five": True}, "own", "untied"),
    "4.57, umT5": ("umt5", {"tie_word_embeddings": False}, "own", "untied"),
    "4.57, tied umT5": ("umt5", {}, None, "tied"),
    "5, fresh umT5": ("umt5", {"five": True}, None, "tied"),
    "5, loaded umT5": ("umt5", {"five": True}, "own", "untied"),
    "5.23, the word unread": ("umt5", UNSCALED | {"five": True}, "own", "untied"),
    "5.24, fresh umT5": ("umt5", UNSCALED | {"five": "5.24.0"}, None, "tied_unscaled"),
    "5.24, tied umT5": ("umt5", SCALED | {"five": "5.24.0"}, None, "tied"),
    "5.24, loaded umT5": ("umt5", UNSCALED | {"five": "5.24.0"}, "own", "untied"),
    "6, scaled and own": ("umt5", SCALED | {"five": "6.0"}, "own", "untied"),
}


@pytest.mark.parametrize("case", HEADS)
def test_the_head_follows_from_the_version_the_config_and_the_tensors(tmp_path, case):
    kind, words, head, lm_head = HEADS[case]
    _, params = exported(tmp_path, "umt5" if kind == "umt5" else "t5_1_1")
    absent = dict.fromkeys(("tie_word_embeddings", "scale_decoder_outputs"), "absent")
    words = absent | words | {"model_type": kind}
    if five := words.pop("five", False):
        written_by = "5.23.0" if five is True else five
        words |= {"transformers_version": written_by, "tie_word_embeddings": True}
    tensors = {
        None: {"lm_head.weight": None},
        "copy": {"lm_head.weight": params["embed"]["embedding"]},
    }
    alter(tmp_path, tensors.get(head), **words)
    if lm_head == "disagree":
        with pytest.raises(ValueError, match="versions of transformers disagree"):
            transformers.read_architecture(tmp_path)
    else:
        read = transformers.read_architecture(tmp_path)
        assert read["lm_head"] == lm_head
        if lm_head == "untied" and head == "own":  # scaled by the version that wrote it, if at all
            factor = 16**-0.5 if case in BY_ROOT else 1
            actual = transformers.read_params(tmp_path, transformer.ModelConfig.from_flat(read))[
                "head"
            ]
            np.testing.assert_array_equal(actual, params["head"] * np.float32(factor))


UNSUPPORTED = {  # key and value of config.json ("-": of its decoder), and the message
    "t5_1_0": [
        ("model_type", "bart", "model_type='bart' is unknown.*t5"),
        ("layer_norm_epsilon", 1e-5, "layer_norm_epsilon=1e-05.*1e-06"),
        ("feed_forward_proj", "gelu", "activation='gelu' is unknown.*gelu_new"),
        ("tie_encoder_decoder", True, "tie_encoder_decoder=True"),
        ("d_kv", None, "lacks 'd_kv'"),
    ],
    "t5gemma": [
        ("-rms_norm_eps", 1e-5, "rms_norm_eps=1e-05"),
        ("-attention_bias", True, "attention_bias=True"),
        ("-rope_scaling", {"rope_type": "yarn", "factor": 2.0}, "rope_type='yarn'"),
        ("-rope_theta", 1e6, "rotary_base=500.0 in the encoder and 1000000.0 in the decoder"),
        ("-layer_types", ["full_attention", "sliding_attention"], "layer_types.*local_global_1_1"),
        ("-hidden_activation", "gelu", "activation='gelu' is unknown"),
        ("-hidden_size", None, "decoder lacks 'hidden_size'"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_config_with_unsupported_values_is_refused(tmp_path, name):
    exported(tmp_path, name)
    path = tmp_path / "config.json"
    content = path.read_text()
    for key, value, message in UNSUPPORTED[name]:
        config = json.loads(content)
        (config["decoder"] if key[0] == "-" else config)[key.strip("-")] = value
        path.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            transformers.read_architecture(tmp_path)
    path.write_text(content[:40])
    with pytest.raises(ValueError, match="is no JSON.*copy it again"):
        transformers.read_architecture(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="has no config.json"):
        transformers.read_architecture(tmp_path)


def test_damaged_files_are_refused_with_the_cause(tmp_path):
    config, _ = exported(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    damage = {
        "it is cut or damaged; copy it again": content[:-4],
        "no complete safetensors file": content[:100],
        "is no complete safetensors": b"",
        "it is cut": content + b"more",
        r"the dtype of \S+='I32' is unknown": content.replace(b'"F32"', b'"I32"', 1),
        "the bytes of .* do not fit its shape": content.replace(b"[96, 16]", b"[95, 16]", 1),
    }
    for message, data in damage.items():
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            transformers.read_params(tmp_path, config)
    path.unlink()
    with pytest.raises(ValueError, match="has no model.safetensors; give a directory"):
        transformers.read_params(tmp_path, config)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="is a pickle.*save_pretrained"):
        transformers.read_params(tmp_path, config)


def test_a_lost_shard_is_named(tmp_path):
    config, _ = exported(tmp_path, most=20_000)
    first, second, *_ = sorted(tmp_path.glob("model-*.safetensors"))
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match=r"index.json lists .*shared.weight.*, which no shard has"):
        transformers.read_params(tmp_path, config)
    first.unlink()
    with pytest.raises(ValueError, match="00001-of.* is missing"):
        transformers.read_params(tmp_path, config)
