"""Laws of reading T5X checkpoints: transformers computes the same logits; damage is refused."""

from __future__ import annotations

import functools
import pathlib
import re
import subprocess
import sys

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest

from lm import batch, transformer
from lm.interop import t5x

ROOT = pathlib.Path(__file__).parents[1]
VOCAB, D, F, HEADS, H, BUCKETS, DEPTHS = 24, 16, 28, 2, 6, 8, {"encoder": 2, "decoder": 3}
SIZES = {"vocab_size": VOCAB, "d_model": D, "d_ff": F, "num_heads": HEADS, "num_kv_heads": HEADS}
SIZES |= {"head_dim": H, "num_encoder_layers": 2, "num_decoder_layers": 3}
SIZES |= {"position.relative_attention_num_buckets": BUCKETS, "shared_params": "embeddings"}
T5_1_0 = {"activation": "relu", "lm_head": "tied", "position.kind": "relative"}
T5_1_1 = {"activation": "geglu", "lm_head": "untied", "position.kind": "relative"}
UMT5 = {"activation": "geglu", "lm_head": "untied", "position.kind": "relative_per_layer"}


def made_up_tree(words: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """The parameters of t5x/examples/t5/network.py by their names, drawn at random."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(0, shape[0] ** -0.5, shape).astype(np.float32)
    scale = lambda: rng.uniform(0.5, 1.5, D).astype(np.float32)
    tree = {"token_embedder/embedding": draw(VOCAB, D) * 5}
    for tower, depth in DEPTHS.items():
        tree[f"{tower}/{tower}_norm/scale"] = scale()
        if words["position.kind"] == "relative":
            tree[f"{tower}/relpos_bias/rel_embedding"] = draw(HEADS, BUCKETS)
        attentions = {
            "encoder": {"attention": "pre_attention_layer_norm"},
            "decoder": {
                "self_attention": "pre_self_attention_layer_norm",
                "encoder_decoder_attention": "pre_cross_attention_layer_norm",
            },
        }[tower]
        for layer in (f"{tower}/layers_{i}" for i in range(depth)):
            if words["position.kind"] == "relative_per_layer":
                tree[f"{layer}/relpos_bias/rel_embedding"] = draw(HEADS, BUCKETS)
            for attention, norm in attentions.items():
                tree[f"{layer}/{norm}/scale"] = scale()
                for part in ("query", "key", "value"):
                    tree[f"{layer}/{attention}/{part}/kernel"] = draw(D, HEADS * H)
                tree[f"{layer}/{attention}/out/kernel"] = draw(HEADS * H, D)
            tree[f"{layer}/pre_mlp_layer_norm/scale"] = scale()
            for name in ("wi",) if words["activation"] == "relu" else ("wi_0", "wi_1"):
                tree[f"{layer}/mlp/{name}/kernel"] = draw(D, F)
            tree[f"{layer}/mlp/wo/kernel"] = draw(F, D)
    if words["lm_head"] == "untied":
        tree["decoder/logits_dense/kernel"] = draw(D, VOCAB)
    return tree


def scanned(tree: dict, layers: dict[str, str], relative: str) -> dict[str, np.ndarray]:
    """The same numbers with layers stacked on axis 1 and a separate axis of heads."""
    split = {"query": (D, HEADS, H), "key": (D, HEADS, H), "value": (D, HEADS, H)}
    split["out"] = (HEADS, H, D)
    stacks, rest = {}, {}
    for name, array in tree.items():
        tower, _, part = name.partition("/layers_")
        if not part:
            rest[name] = array
            continue
        number, _, part = part.partition("/")
        shape = split.get(part.split("/")[-2], array.shape)
        stack = stacks.setdefault(
            f"{tower}/{layers[tower]}/{part.replace('relpos_bias', relative)}", {}
        )
        stack[int(number)] = array.reshape(shape)
    return rest | {
        name: np.stack([stack[i] for i in range(len(stack))], 1) for name, stack in stacks.items()
    }


def state(tree: dict) -> dict:
    """An optimizer's state: two arrays as large as each parameter, and a step."""
    moments = {f"{name}/{slot}": array for name, array in tree.items() for slot in ("m", "v")}
    return {"step": np.int32(7), "param_states": flax.traverse_util.unflatten_dict(moments, "/")}


def write_msgpack(root, tree: dict, wrapped: bool = True):
    """A step folder with everything in one msgpack file."""
    folder = root / "checkpoint_7"
    folder.mkdir()
    contents = {"target": flax.traverse_util.unflatten_dict(tree, "/"), "state": state(tree)}
    contents = {"version": 3, "optimizer": contents} if wrapped else contents
    (folder / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(contents))
    return folder


write_bare = functools.partial(write_msgpack, wrapped=False)


def write_zarr(folder, array: np.ndarray, dtype: str, codec: str = "gzip", cuts: int = 2):
    """One array as T5X writes it, each axis cut; returns the spec with its relative path."""
    tensorstore = pytest.importorskip("tensorstore")
    chunks = [max(1, -(-size // cuts)) for size in array.shape]
    metadata = {"compressor": {"id": codec}, "shape": array.shape, "chunks": chunks}
    spec = {"driver": "zarr", "dtype": dtype, "metadata": metadata}
    store = {"driver": "file", "path": str(folder)}
    base = tensorstore.Spec(spec | {"kvstore": store}).to_json()
    cast = {"driver": "cast", "dtype": "float32", "base": base}
    tensorstore.open(cast, create=True, delete_existing=True).result().write(array).result()
    return base | {"kvstore": {"driver": "gfile", "path": folder.name}}


def write_tensorstore(root, tree: dict, dtype: str = "float32", **zarr):
    """A step folder with zarr folders for the matrices; what is not partitioned is in the file."""
    folder = root / f"checkpoint_{dtype}"
    folder.mkdir()
    target = {}
    for name, array in tree.items():
        path = folder / f"target.{name.replace('/', '.')}"
        target[name] = array.astype(jnp.dtype(dtype))
        if array.ndim > 1:
            target[name] = write_zarr(path, array, dtype, **zarr)
    target = flax.traverse_util.unflatten_dict(target, "/")
    contents = {"version": 3, "optimizer": {"target": target, "state": {"step": np.int32(7)}}}
    (folder / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(contents))
    return folder


def params(folder, words: dict) -> dict:
    return t5x.read_params(folder, transformer.ModelConfig.from_flat(SIZES | words))


def assert_same(ours: dict, theirs: dict) -> None:
    ours, theirs = (flax.traverse_util.flatten_dict(tree, sep="/") for tree in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


def transformers_weights(tree: dict, per_layer: bool) -> dict[str, np.ndarray]:
    """The tree under the names of transformers' T5, independent of lm's table."""
    actual = {"shared.weight": tree["token_embedder/embedding"]}
    attention = {"query": "q", "key": "k", "value": "v", "out": "o"}
    for tower, depth in DEPTHS.items():
        actual[f"{tower}.final_layer_norm.weight"] = tree[f"{tower}/{tower}_norm/scale"]
        own = "" if tower == "encoder" else "self_"
        for i in range(depth):
            layer, block = f"{tower}/layers_{i}", f"{tower}.block.{i}.layer"
            parts = [("SelfAttention", f"{own}attention", f"pre_{own}attention_layer_norm")]
            if tower == "decoder":
                cross = "encoder_decoder_attention"
                parts.append(("EncDecAttention", cross, "pre_cross_attention_layer_norm"))
            for number, (expected, name, norm) in enumerate(parts):
                actual[f"{block}.{number}.layer_norm.weight"] = tree[f"{layer}/{norm}/scale"]
                for part, letter in attention.items():
                    kernel = tree[f"{layer}/{name}/{part}/kernel"]
                    actual[f"{block}.{number}.{expected}.{letter}.weight"] = kernel.T
            last = f"{block}.{len(parts)}"
            actual[f"{last}.layer_norm.weight"] = tree[f"{layer}/pre_mlp_layer_norm/scale"]
            for name in ("wi", "wi_0", "wi_1", "wo"):
                if f"{layer}/mlp/{name}/kernel" in tree:
                    kernel = tree[f"{layer}/mlp/{name}/kernel"]
                    actual[f"{last}.DenseReluDense.{name}.weight"] = kernel.T
            if per_layer or i == 0:
                table = tree[f"{layer if per_layer else tower}/relpos_bias/rel_embedding"]
                actual[f"{block}.0.SelfAttention.relative_attention_bias.weight"] = table.T
        actual[f"{tower}.embed_tokens.weight"] = actual["shared.weight"]
    head = tree.get("decoder/logits_dense/kernel")
    actual["lm_head.weight"] = actual["shared.weight"] if head is None else head.T
    return actual


def transformers_logits(tree: dict, words: dict, inputs, decoder_inputs) -> np.ndarray:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    per_layer = words["position.kind"] == "relative_per_layer"
    kind = "UMT5" if per_layer else "T5"
    sizes = dict(vocab_size=VOCAB, d_model=D, d_kv=H, d_ff=F, num_heads=HEADS)
    sizes |= dict(num_layers=2, num_decoder_layers=3, relative_attention_num_buckets=BUCKETS)
    config = getattr(transformers, f"{kind}Config")(
        **sizes,
        feed_forward_proj="relu" if words["activation"] == "relu" else "gated-gelu",
        tie_word_embeddings=words["lm_head"] == "tied",
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    model.config.tie_word_embeddings = words["lm_head"] == "tied"  # 5.x ties and scales umT5 always
    model.lm_head = torch.nn.Linear(D, VOCAB, bias=False)
    weights = transformers_weights(tree, per_layer)
    model.load_state_dict({k: torch.tensor(v) for k, v in weights.items()}, strict=True)
    with torch.no_grad():
        ids = {"input_ids": inputs, "decoder_input_ids": decoder_inputs}
        return model(**{k: torch.tensor(v) for k, v in ids.items()}).logits.numpy()


@pytest.mark.parametrize("words", [T5_1_0, T5_1_1, UMT5], ids=["t5_1_0", "t5_1_1", "umt5"])
def test_transformers_computes_the_same_logits_from_the_same_checkpoint(tmp_path, words):
    tree = made_up_tree(words)
    folder = write_tensorstore(tmp_path, tree)
    rng = np.random.default_rng(1)
    inputs, targets = rng.integers(1, VOCAB, (2, 2, 40)).astype(np.int32)
    ones = np.ones_like(inputs)
    config = transformer.ModelConfig.from_flat(t5x.read_architecture(folder))
    examples = batch.Batch(inputs, ones, targets, ones)
    variables = {"params": t5x.read_params(folder, config)}
    actual = jax.jit(transformer.Transformer(config).apply)(variables, examples)
    shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    expected = transformers_logits(tree, words, inputs, shifted)
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(actual, expected, atol=1e-4)


@pytest.mark.parametrize("words", [T5_1_0, T5_1_1, UMT5], ids=["t5_1_0", "t5_1_1", "umt5"])
def test_the_architecture_is_read_from_names_and_shapes(tmp_path, words):
    folder = write_msgpack(tmp_path, made_up_tree(words))
    assert t5x.read_architecture(folder) == SIZES | words


def test_every_format_of_a_checkpoint_gives_the_same_tree(tmp_path):
    tree = made_up_tree(T5_1_1)
    once = params(write_msgpack(tmp_path, tree), T5_1_1)
    assert_same(once, params(write_tensorstore(tmp_path, tree), T5_1_1))
    (tmp_path / "bare").mkdir()
    bare = write_bare(tmp_path / "bare", tree)
    assert_same(once, params(bare, T5_1_1))
    assert_same(once, params(bare / "checkpoint", T5_1_1))
    shapes = transformer.param_shapes(transformer.ModelConfig.from_flat(SIZES | T5_1_1))
    assert jax.tree.map(np.shape, once) == jax.tree.map(np.shape, shapes)


def test_arrays_that_flax_stored_in_chunks_are_joined(tmp_path, monkeypatch):
    tree = made_up_tree(T5_1_0)
    (tmp_path / "cut").mkdir()
    whole = params(write_msgpack(tmp_path, tree), T5_1_0)
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 200)
    cut = write_msgpack(tmp_path / "cut", tree)
    assert b"__msgpack_chunked_array__" in (cut / "checkpoint").read_bytes()
    assert_same(whole, params(cut, T5_1_0))


@pytest.mark.parametrize("words", [T5_1_1, UMT5], ids=["t5_1_1", "umt5"])
def test_chunks_of_any_size_give_the_same_arrays(tmp_path, monkeypatch, words):
    tree = made_up_tree(words)
    stack = scanned(tree, {"encoder": "encoder", "decoder": "decoder"}, "relpos_bias")
    for name in ("cut", "stack", "stacked_zarr"):
        (tmp_path / name).mkdir()
    folders = [write_msgpack(tmp_path, tree), write_msgpack(tmp_path / "stack", stack)]
    whole = params(folders[0], words)
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 200)
    folders.append(write_msgpack(tmp_path / "cut", tree))
    folders.append(write_tensorstore(tmp_path, tree, cuts=3))
    folders.append(write_tensorstore(tmp_path / "stacked_zarr", stack, cuts=3))
    monkeypatch.setattr(t5x, "CHUNK", 7)
    for folder in folders:
        assert_same(whole, params(folder, words))


def test_orbax_placeholders_are_read(tmp_path):
    tree = made_up_tree(T5_1_1)
    folder = tmp_path / "checkpoint_8" / "state"
    folder.mkdir(parents=True)
    names = {name: f"target.{name.replace('/', '.')}" for name in tree}
    for name, array in tree.items():
        write_zarr(folder / names[name], array, "float32", codec="zstd")
    target = {name: f"PLACEHOLDER://{path}" for name, path in names.items()}
    contents = {"target": flax.traverse_util.unflatten_dict(target, "/"), "state": {}}
    (folder / "checkpoint").write_bytes(flax.serialization.msgpack_serialize(contents))
    once = params(write_msgpack(tmp_path, tree), T5_1_1)
    assert_same(once, params(folder.parent, T5_1_1))
    assert_same(once, params(folder, T5_1_1))


def test_bfloat16_is_read_to_the_bit_from_every_format(tmp_path):
    tree = made_up_tree(T5_1_0)
    halves = {name: array.astype(jnp.bfloat16) for name, array in tree.items()}
    widened = {name: array.astype(np.float32) for name, array in halves.items()}
    once = params(write_msgpack(tmp_path, widened), T5_1_0)
    (tmp_path / "half").mkdir()
    (tmp_path / "old").mkdir()
    assert_same(once, params(write_msgpack(tmp_path / "half", halves), T5_1_0))
    assert_same(once, params(write_tensorstore(tmp_path, tree, "bfloat16"), T5_1_0))
    old = write_tensorstore(tmp_path / "old", tree, "bfloat16")
    for path in old.rglob(".zarray"):  # version 2 called the same bytes uint16
        path.write_text(path.read_text().replace('"bfloat16"', '"<u2"'))
    assert_same(once, params(old, T5_1_0))


@pytest.mark.parametrize(
    "layers, relative",
    [
        ({"encoder": "layers", "decoder": "layers"}, "relative_posemb"),
        ({"encoder": "encoder", "decoder": "decoder"}, "relpos_bias"),
    ],
    ids=["scalable_t5", "umt5 as released"],
)
def test_scanned_layers_give_the_unrolled_parameters(tmp_path, layers, relative):
    tree = made_up_tree(UMT5)
    stacked = write_tensorstore(tmp_path, scanned(tree, layers, relative))
    assert t5x.read_architecture(stacked) == SIZES | UMT5
    assert_same(params(write_msgpack(tmp_path, tree), UMT5), params(stacked, UMT5))


def test_separate_embeddings_of_the_towers_are_read(tmp_path):
    tree = made_up_tree(T5_1_1)
    decoder = tree.pop("token_embedder/embedding")
    tree["decoder/token_embedder/embedding"] = decoder
    tree["encoder/token_embedder/embedding"] = decoder + 1
    folder = write_msgpack(tmp_path, tree)
    assert t5x.read_architecture(folder) == SIZES | T5_1_1 | {"shared_params": "none"}
    read = params(folder, T5_1_1 | {"shared_params": "none"})
    np.testing.assert_array_equal(read["embed"]["embedding"], decoder)
    np.testing.assert_array_equal(read["encoder_embed"]["embedding"], decoder + 1)


@pytest.mark.parametrize("victim", ["1.0", "0.1", ".zarray", ""])
def test_a_missing_chunk_is_refused_not_read_as_zeros(tmp_path, victim):
    folder = write_tensorstore(tmp_path, made_up_tree(T5_1_1))
    array = folder / "target.decoder.layers_1.mlp.wo.kernel"
    for path in [array / victim] if victim else array.iterdir():
        path.unlink()
    with pytest.raises(
        ValueError, match="layers_1/mlp/wo/kernel's .* is incomplete .* fetch it again"
    ):
        params(folder, T5_1_1)


def test_two_arrays_in_one_folder_are_refused(tmp_path):
    folder = write_tensorstore(tmp_path, made_up_tree(T5_1_1))
    one, other = (f"target.decoder.layers_{i}.mlp.wo.kernel".encode() for i in (1, 2))
    file = folder / "checkpoint"
    file.write_bytes(file.read_bytes().replace(one, other))
    with pytest.raises(ValueError, match="one folder for two arrays.* fetch it again"):
        params(folder, T5_1_1)


def test_a_broken_chunk_is_refused(tmp_path):
    folder = write_tensorstore(tmp_path, made_up_tree(T5_1_1))
    chunk = folder / "target.decoder.layers_1.mlp.wo.kernel" / "1.0"
    chunk.write_bytes(chunk.read_bytes()[:-30])
    with pytest.raises(ValueError, match="layers_1.mlp.wo.kernel is damaged; fetch it again"):
        params(folder, T5_1_1)


def test_a_folder_of_another_checkpoint_is_refused(tmp_path):
    folder = write_tensorstore(tmp_path, made_up_tree(T5_1_1))
    array = folder / "target.decoder.layers_1.mlp.wo.kernel"
    write_zarr(array, np.ones((F + 2, D), np.float32), "float32")
    with pytest.raises(ValueError, match=r"\[30, 16\] in .* and \[28, 16\] in .* two checkpoints"):
        params(folder, T5_1_1)


@pytest.mark.parametrize("write", [write_msgpack, write_bare, write_tensorstore])
def test_a_msgpack_file_that_ends_early_is_refused_wherever_it_ends(tmp_path, write):
    folder = write(tmp_path, made_up_tree(T5_1_0))
    whole = (folder / "checkpoint").read_bytes()
    ends = np.random.default_rng(0).integers(16, len(whole) - 1, 40)
    for end in [*ends, len(whole) - 1]:
        (folder / "checkpoint").write_bytes(whole[:end])
        with pytest.raises(ValueError, match="ends in the middle .* fetch it again"):
            params(folder, T5_1_0)


def test_unused_and_missing_names_are_one_error_that_lists_them(tmp_path):
    tree = made_up_tree(T5_1_1)
    tree["decoder/layers_1/adapter/kernel"] = tree["decoder/layers_1/mlp/wo/kernel"]
    tree["decoder/layers_7/mlp/wo/kernel"] = tree.pop("decoder/layers_1/mlp/wo/kernel")
    tree["encoder/final_bias"] = np.zeros(3, np.float32)
    del tree["decoder/logits_dense/kernel"]
    with pytest.raises(ValueError) as error:
        params(write_msgpack(tmp_path, tree), T5_1_1)
    unused = ("decoder/layers_1/adapter/kernel", "decoder/layers_7/mlp/wo", "encoder/final_bias")
    for name in (*unused, "decoder/layers/feed_forward/down/kernel[1]", "head"):
        assert name in str(error.value)
    assert "query" not in str(error.value)


def test_unused_and_missing_parameters_are_refused(tmp_path):
    tree = made_up_tree(T5_1_1)
    twice = tree | {"decoder/token_embedder/embedding": tree["token_embedder/embedding"]}
    with pytest.raises(ValueError, match="checkpoint: token_embedder/embedding;.*: nothing"):
        params(write_msgpack(tmp_path, twice), T5_1_1)
    del tree["decoder/layers_2/mlp/wo/kernel"]
    with pytest.raises(ValueError, match=r"checkpoint: nothing; .*/layers/.*down/kernel\[2\]\."):
        params(write_tensorstore(tmp_path, tree), T5_1_1)


@pytest.mark.parametrize(
    "changes", [{"d_ff": 14}, {"head_dim": 3}, {"num_heads": 6, "num_kv_heads": 6, "head_dim": 2}]
)
def test_a_shape_that_the_config_does_not_have_is_refused(tmp_path, changes):
    folder = write_msgpack(tmp_path, made_up_tree(T5_1_1))
    with pytest.raises(ValueError, match=r"has shape \[.*, not \[.*; use read_architecture"):
        params(folder, T5_1_1 | changes)


MEASURE = """
import sys
import jax
from lm import transformer
from lm.interop import t5x

def kilobytes(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))

def imported(directory):
    config = transformer.ModelConfig.from_flat(t5x.read_architecture(directory))
    return jax.tree.map(jax.device_put, t5x.read_params(directory, config))

small, big = sys.argv[1:]
imported(small)  # all that the reading itself needs
before = kilobytes("VmRSS")
params = imported(big)
print(kilobytes("VmHWM") - before)
"""
zarr_of = lambda **zarr: functools.partial(write_tensorstore, codec="zstd", **zarr)


def write_scanned(root, tree: dict):
    """The layers stacked as scalable_t5 does, in zarr folders."""
    layers = {"encoder": "layers", "decoder": "layers"}
    return zarr_of()(root, scanned(tree, layers, "relative_posemb"))


FORMS = {  # how it is written, the words, the rows of the embedding, d_ff
    "msgpack": (write_msgpack, T5_1_1, 1_100_000, 24_000),
    "zarr": (zarr_of(), T5_1_1, 1_100_000, 24_000),
    "bfloat16": (zarr_of(dtype="bfloat16"), T5_1_1, 1_100_000, 24_000),
    "scanned": (write_scanned, T5_1_1, 1_100_000, 24_000),
    "a chunk an array": (zarr_of(cuts=1), T5_1_0, 800_000, 200_000),
}


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("form", FORMS)
def test_peak_memory_is_little_more_than_the_parameters(tmp_path, form):
    write, words, rows, d_ff = FORMS[form]
    tree, rng = made_up_tree(words), np.random.default_rng(0)
    (tmp_path / "small").mkdir()
    small = write(tmp_path / "small", tree)
    for name, array in tree.items():
        shape = [{VOCAB: rows, F: d_ff}.get(size, size) for size in array.shape]
        tree[name] = rng.random(shape, np.float32)
    size = sum(array.nbytes for array in tree.values())
    share = tree["token_embedder/embedding"].nbytes / size
    assert size > 160e6 and share > (0.42 if words["lm_head"] == "untied" else 0.25)
    command = [sys.executable, "-c", MEASURE, small, write(tmp_path, tree)]
    del tree
    report = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert report.returncode == 0, report.stderr
    peak = int(report.stdout) * 1024
    assert 0.9 * size < peak < 1.2 * size, peak / size


CURES = "fetch it again|choose one of|read_architecture|name the step|no parameters|no T5 enc"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["msgpack", "chunks", "tensorstore"])
def test_a_damaged_byte_of_a_header_is_refused_or_changes_nothing(tmp_path, monkeypatch, form):
    tree, rng = made_up_tree(T5_1_0), np.random.default_rng(0)
    if form == "chunks":
        monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 1000)
    monkeypatch.setattr(transformer, "param_shapes", functools.cache(transformer.param_shapes))
    write = write_tensorstore if form == "tensorstore" else write_msgpack
    file = write(tmp_path, tree) / "checkpoint"
    whole, once = file.read_bytes(), params(file, T5_1_0)
    header = np.ones(len(whole), bool)
    for data in (array.tobytes() for array in tree.values()):
        for start in range(0, len(data), 1000):
            for actual in re.finditer(re.escape(data[start : start + 1000]), whole):
                header[slice(*actual.span())] = False
    refused = 0
    for path in rng.choice(np.flatnonzero(header), 300, replace=False):
        damaged = bytearray(whole)
        damaged[path] ^= rng.integers(1, 256)
        file.write_bytes(damaged)
        try:
            config = transformer.ModelConfig.from_flat(t5x.read_architecture(file))
            assert_same(once, t5x.read_params(file, config))
        except ValueError as error:
            assert re.search(CURES, str(error)), str(error)
            refused += 1
    assert 30 < refused < 300


ARRAY = {"__msgpack_chunked_array__": True, "shape": {"0": D}, "chunks": {"0": np.ones(D, "f4")}}
GARBAGE = {
    "another kind of number": np.ones(D, np.float16),
    "no such path": {"kvstore": {"path": 7}, "metadata": {"shape": [D]}},
    "no kvstore": {"kvstore": 7, "path": "target.encoder.encoder_norm.scale"},
    "no file name": "PLACEHOLDER://\0",
    "no chunks": ARRAY | {"chunks": {"0": D}},
    "chunks by other names": ARRAY | {"chunks": {"1": np.ones(D, "f4")}},
    "more bytes": msgpack.ExtType(1, msgpack.packb(([D], "float32", bytes(4 * D + 4)))),
    "fewer bytes": msgpack.ExtType(1, msgpack.packb(([D], "float32", bytes(4 * D - 4)))),
    "half a number": msgpack.ExtType(1, msgpack.packb(([D], "float32", bytes(4 * D - 1)))),
    "no bytes": msgpack.ExtType(1, msgpack.packb(([D], "float32", D))),
    "sizes by other names": ARRAY | {"shape": {"1": D}},
    "no sizes": ARRAY | {"shape": {"0": "many"}},
    "a size less than nothing": ARRAY | {"shape": {"0": -D, "1": -1}},
    "no array at all": [1, 2, 3],
}


@pytest.mark.parametrize("what", GARBAGE)
def test_a_leaf_that_is_no_array_is_refused(tmp_path, what):
    tree = made_up_tree(T5_1_0) | {"encoder/encoder_norm/scale": ARRAY}
    (tmp_path / "sound").mkdir()
    target = lambda tree: {"target": flax.traverse_util.unflatten_dict(tree, "/")}
    for root, leaf in ((tmp_path / "sound", ARRAY), (tmp_path, GARBAGE[what])):
        tree["encoder/encoder_norm/scale"] = leaf
        data = flax.serialization.msgpack_serialize(target(tree))
        (root / "checkpoint").write_bytes(data)
    assert params(tmp_path / "sound", T5_1_0)["encoder"]["norm"]["scale"].tolist() == [1.0] * D
    with pytest.raises(ValueError, match="(checkpoint|_norm/scale).* (fetch it again|choose one)"):
        params(tmp_path, T5_1_0)


@pytest.mark.parametrize(
    "data", [b"\x91" * 10_000, b"\x81\x80\x01", b"\x81\x07\x01", b"\xc7\x05\x01abcde"]
)
def test_a_file_without_a_tree_of_names_is_refused(tmp_path, data):
    (tmp_path / "checkpoint").write_bytes(b"\x81\xa6target" + data)
    with pytest.raises(ValueError, match=f"checkpoint.* ({CURES})"):
        t5x.read_architecture(tmp_path)


def test_only_a_t5x_checkpoint_is_found(tmp_path):
    tree = made_up_tree(T5_1_0)
    folder = write_msgpack(tmp_path, tree)
    assert t5x.find_checkpoint(folder) and t5x.find_checkpoint(str(folder / "checkpoint"))
    assert t5x.find_checkpoint(write_tensorstore(tmp_path, tree))
    assert not t5x.find_checkpoint(tmp_path) and not t5x.find_checkpoint(tmp_path / "nothing")
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-1000000"\n')
    assert not t5x.find_checkpoint(folder)
    with pytest.raises(ValueError, match="is no T5X checkpoint; name the step folder"):
        t5x.read_architecture(folder)


def test_a_checkpoint_of_another_model_is_named_as_such(tmp_path):
    folder = write_msgpack(tmp_path, {"params/conv/kernel": np.ones((2, 2), np.float32)})
    with pytest.raises(ValueError, match=r"no T5 encoder-decoder .* params/conv/kernel"):
        t5x.read_architecture(folder)
