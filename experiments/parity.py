"""Does lm compute what transformers computes with the same weights? Answer: parity.md.

python -m experiments.parity    # make parity

Tiny random models of every variant go both ways: created by transformers and read by lm, created by
lm and loaded by transformers. Version 5 is installed; `make` installs 4.57 into its own folder.
Both compute logits of ragged rows, greedy ids and the best of four beams.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import NamedTuple

import jax
import numpy as np
from flax import traverse_util

from lm import batch, decoding, logs, steps, transformer
from lm.interop import names, transformers

ROOT = pathlib.Path(__file__).parents[1]
OLD = pathlib.Path(sys.prefix) / "transformers-4.57"
VERSIONS = ("4.57", "5")
LENGTH = 8  # tokens to generate
BEAM = decoding.parse("beam num_beams=4 length_penalty=0.6 length_penalty_kind=power")  # as theirs

# What a version of transformers is asked to do, in a process of its own: make random models and
# save them, load what we exported, and write down what both compute.
STRANGER = """
import json, pathlib, sys
import numpy as np, torch, transformers
from transformers import AutoModelForSeq2SeqLM

transformers.logging.set_verbosity_error()
root = pathlib.Path(sys.argv[1])
jobs = json.loads((root / "jobs.json").read_text())
version = tuple(map(int, transformers.__version__.split(".")[:2]))
five = version >= (5,)


def observe(model, name):
    model.eval()
    data = {key: torch.tensor(value) for key, value in np.load(root / "inputs.npz").items()}
    window = name.startswith("t5gemma")
    if window and five:  # its encoder sees |distance| <= window: inputs in which nothing is there
        data["input_ids"], data["attention_mask"] = data["short_ids"], data["short_mask"]
    with torch.no_grad():
        start = 2 if window else 0
        decoder = torch.nn.functional.pad(data["labels"], (1, 0), value=start)[:, :-1]
        rows = dict(input_ids=data["input_ids"], attention_mask=data["attention_mask"])
        seen = torch.nn.functional.pad(data["labels_mask"], (1, 0), value=1)[:, :-1]
        logits = model(**rows, decoder_input_ids=decoder, decoder_attention_mask=seen).logits
        # 4.57's cache of cross-attention keeps a window of the inputs only: short ones again.
        short = dict(input_ids=data["short_ids"][:, :5], attention_mask=data["short_mask"][:, :5])
        short |= dict(max_new_tokens=jobs["length"], do_sample=False)
        ids = model.generate(**short, num_beams=1)
        best = model.generate(**short, num_beams=jobs["width"], length_penalty=jobs["alpha"])
    found = dict(logits=logits.float().numpy(), ids=ids[:, 1:].numpy(), best=best[:, 1:].numpy())
    np.savez(root / f"{name}.npz", **found)


for name, job in jobs["make"].items():
    torch.manual_seed(0)
    config = getattr(transformers, job["config"])(**job["args"])
    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager")
    model.generation_config.decoder_start_token_id = config.decoder_start_token_id = job["start"]
    if job["untied"] and five:  # 5 ties whatever it is told
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    for key, value in model.named_parameters():
        offset = 1.0 if "norm" in key and not name.startswith("t5gemma") else 0.0
        big = 1.0 if "embed" in key or "shared" in key or "relative" in key else 0.3
        value.data = offset + big * torch.randn_like(value)
    model.to(getattr(torch, job.get("dtype", "float32")))
    model.save_pretrained(root / name, max_shard_size=job.get("shard", "5GB"))
    observe(model.float(), name)
for name in jobs["load"]:
    model, report = AutoModelForSeq2SeqLM.from_pretrained(
        root / name, attn_implementation="eager", output_loading_info=True
    )
    wrong = [key for key, found in report.items() if found]
    assert not wrong, (name, report)
    if name == "umt5_ours" and (5,) <= version < (5, 24):  # which scale every umT5
        model.config.tie_word_embeddings = False
    observe(model, name)
"""

# 4.57 cannot generate with a decoder deeper than the encoder: its cache has too few layers.
T5 = dict(vocab_size=96, d_model=16, d_kv=6, d_ff=24, num_layers=3, num_decoder_layers=2)
T5 |= dict(num_heads=4, relative_attention_num_buckets=8, relative_attention_max_distance=9)
GEMMA = dict(vocab_size=96, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
GEMMA |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=6, query_pre_attn_scalar=9)
GEMMA |= dict(sliding_window=6, attn_logit_softcapping=3.0, final_logit_softcapping=2.0)
NARROW = GEMMA | dict(hidden_size=8, intermediate_size=12, num_attention_heads=2, head_dim=10)
NARROW |= dict(num_key_value_heads=1, num_hidden_layers=3)


def their(config: str, untied=False, start=0, **args) -> dict:
    return dict(config=config, untied=untied, start=start, args=args | {})


def t5(config="T5Config", untied=True, proj="gated-gelu", **sizes) -> dict:
    args = T5 | sizes | dict(feed_forward_proj=proj, tie_word_embeddings=not untied)
    return their(config, untied, **args)


def gemma(encoder, decoder, tied=True) -> dict:
    own = dict(tie_word_embeddings=tied)
    towers = dict(encoder=encoder | own, decoder=decoder | own)
    return their("T5GemmaConfig", start=2, vocab_size=96, **towers, **own)


MAKE = {
    "t5_1_0": t5(untied=False, proj="relu"),
    "t5_1_1": t5(),
    "t5_bfloat16_in_shards": t5() | dict(dtype="bfloat16", shard="9KB"),
    "t5_float16": t5(untied=False, proj="gelu_new") | dict(dtype="float16"),
    "t5_tied_1_1": t5(untied=False),
    "mt5": t5("MT5Config"),
    "mt5_tied": t5("MT5Config", untied=False),
    "umt5": t5("UMT5Config"),
    "umt5_tied": t5("UMT5Config", untied=False),
    "byt5": t5(vocab_size=384, num_layers=4, num_decoder_layers=1),
    "ul2": t5(proj="gated-silu"),
    "t5gemma": gemma(GEMMA, GEMMA),
    "t5gemma_unequal": gemma(NARROW, GEMMA),
    "t5gemma_untied": gemma(GEMMA, GEMMA, tied=False),
}

OURS = dict(vocab_size=96, d_model=16, d_ff=24, num_heads=4, num_kv_heads=4, head_dim=6)
OURS |= {
    "num_encoder_layers": 3,
    "num_decoder_layers": 2,
    "position.relative_attention_num_buckets": 8,
    "position.relative_attention_max_distance": 9,
}
OURS_GEMMA = (
    OURS | names.T5GEMMA_WORDS | {"attention.scale": 9**-0.5, "attention.logits_soft_cap": 3.0}
)
OURS_GEMMA |= {
    "final_logits_soft_cap": 2.0,
    "attention.pattern": "local_global_1_1",
    "attention.window_size": 6,
    "decoder_start_token_id": 2,
    "num_kv_heads": 2,
}
OURS_GEMMA |= {
    "lm_head": "tied_unscaled",
    "position.rotary_base": 500.0,
    "position.relative_attention_num_buckets": 32,
    "position.relative_attention_max_distance": 128,
}
OURS_NARROW = dict(d_model=8, d_ff=12, num_heads=2, num_kv_heads=1, head_dim=10)
EXPORTS = {
    "t5_1_0": OURS | dict(activation="relu", lm_head="tied", dropout_rate=0.25),
    "t5_1_1": OURS,
    "t5_gelu": OURS | dict(activation="gelu", lm_head="tied_unscaled"),
    "ul2": OURS | dict(activation="swiglu"),
    "byt5": OURS | dict(vocab_size=384, num_encoder_layers=4, num_decoder_layers=1),
    "umt5": OURS | {"position.kind": "relative_per_layer"},
    "umt5_tied": OURS | {"position.kind": "relative_per_layer", "lm_head": "tied"},
    "t5gemma": OURS_GEMMA | dict(dropout_rate=0.25),
    "t5gemma_unequal": OURS_GEMMA | dict(encoder=OURS_NARROW, activation="swiglu"),
    "t5gemma_untied": OURS_GEMMA
    | {"lm_head": "untied", "attention.pattern": "local_global_5_1", "num_encoder_layers": 6},
}


class Agreement(NamedTuple):
    """How a model and its twin in transformers agree."""

    logits: float  # the largest difference, of real targets
    spread: float  # between our largest and smallest logit
    greedy: bool  # are the ids of all rows equal?
    beam: bool


def random_params(config: transformer.ModelConfig, seed: int = 0) -> dict:
    """Every leaf random, norms and relative tables too, at their place's usual size."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        offset = 1.0 if path[-1] == "scale" and config.norm.kind == "rms" else 0.0
        big = 1.0 if path[-1] in ("embedding", "relative_bias") else 0.3
        return np.float32(offset + big * rng.standard_normal(leaf.shape))

    flat = traverse_util.flatten_dict(transformer.param_shapes(config))
    return traverse_util.unflatten_dict({path: draw(path, leaf) for path, leaf in flat.items()})


def made_inputs() -> dict:
    """Ragged rows: ids and masks of inputs, of inputs no longer than the window, of targets."""
    rng = np.random.default_rng(1)
    data = {}
    for name, lengths in (("input", (11, 7, 3)), ("short", (6, 4, 5)), ("labels", (10, 4, 7))):
        mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
        ids = rng.integers(3, 96, mask.shape) * mask
        data |= {f"{name}_ids": ids, f"{name}_mask": mask.astype(np.int64)}
    data["labels"] = data.pop("labels_ids")
    data["attention_mask"] = data.pop("input_mask")
    return data


def path_of(version: str) -> dict[str, str]:
    """The environment in which a process finds this version of transformers."""
    return {"PYTHONPATH": str(OLD)} if version == "4.57" else {}


def ask(version: str, root: pathlib.Path) -> None:
    """Let a version of transformers load our exports and leave its own models, all in `root`."""
    for name, fields in EXPORTS.items():
        config = transformer.ModelConfig.from_flat(fields)
        most = 20_000 if name == "t5_1_1" else 5_000_000_000
        transformers.write(random_params(config), config, root / f"{name}_ours", most)
    jobs = dict(make=MAKE, load=[f"{name}_ours" for name in EXPORTS], length=LENGTH)
    jobs |= dict(width=BEAM.num_beams, alpha=BEAM.length_penalty)
    logs.write_atomically(root / "jobs.json", json.dumps(jobs))
    np.savez(root / "inputs.npz", **made_inputs())
    logs.write_atomically(root / "stranger.py", STRANGER)
    told = subprocess.run(
        [sys.executable, root / "stranger.py", root],
        env={"PATH": "", "HOME": str(root), "OMP_NUM_THREADS": "1"} | path_of(version),
        capture_output=True,
        text=True,
        check=False,
    )
    if told.returncode:
        raise ValueError(f"transformers {version} failed: {told.stderr[-4000:]}")


def agreement(version: str, root: pathlib.Path, name: str, model, params) -> Agreement:
    """What the stranger saw of a model in `root`, against ours with these parameters."""
    data, seen = np.load(root / "inputs.npz"), np.load(root / f"{name}.npz")
    short = version == "5" and name.startswith("t5gemma")
    ids = data["short_ids"] if short else data["input_ids"]
    mask = data["short_mask"] if short else data["attention_mask"]
    examples = batch.Batch(*map(np.int32, (ids, mask, data["labels"], data["labels_mask"])))
    real = examples.targets_segment_ids > 0
    logits = jax.jit(steps.apply_model, static_argnums=(0, 3))(model, params, examples, None)
    logits = np.asarray(logits)[real]
    brief = [np.int32(data[key][:, :5]) for key in ("short_ids", "short_mask")]
    examples = batch.Batch(*brief, examples.targets, examples.targets_segment_ids)
    same = {}
    for what, how in (("ids", decoding.DecodingConfig()), ("best", BEAM)):
        decode = functools.partial(
            steps.decode_step, model=model, length=LENGTH, eos=names.EOS, config=how
        )
        ids = jax.jit(decode)(params, examples).ids[:, 0]
        same[what] = np.array_equal(ids, _ended(seen[what]))
    delta = float(np.abs(logits - seen["logits"][real]).max())
    return Agreement(delta, float(np.ptp(logits)), same["ids"], same["best"])


def _ended(ids: np.ndarray) -> np.ndarray:
    # As ours: LENGTH columns, pad after eos. A beam of theirs goes on with eos where pad is 0.
    ids = np.pad(ids, ((0, 0), (0, LENGTH - ids.shape[1])))
    after = np.cumsum(ids == names.EOS, axis=1) - (ids == names.EOS) > 0
    return np.where(after, 0, ids).astype(np.int32)


def read_theirs(root: pathlib.Path, name: str):
    """(model, parameters) of a checkpoint that transformers made."""
    config = transformer.ModelConfig.from_flat(transformers.read_architecture(root / name))
    return transformer.Transformer(config), transformers.read_params(root / name, config)


def rows(version: str, root: pathlib.Path):
    """(variant, direction, Agreement) of all variants."""
    for name in MAKE:
        yield name, "in", agreement(version, root, name, *read_theirs(root, name))
    for name, fields in EXPORTS.items():
        config = transformer.ModelConfig.from_flat(fields)
        made = transformer.Transformer(config), random_params(config)
        yield name, "out", agreement(version, root, f"{name}_ours", *made)


def main() -> None:
    """Print the table, and keep it with its record beside this file."""
    table = ["| variant | direction | transformers | max abs logit difference | greedy | beam 4 |"]
    table += ["| --- | --- | --- | --- | --- | --- |"]
    record = []
    for version in VERSIONS:
        with tempfile.TemporaryDirectory() as folder:
            ask(version, pathlib.Path(folder))
            for name, direction, found in rows(version, pathlib.Path(folder)):
                word = {True: "equal", False: "DIFFERENT"}
                cells = [f"{found.logits:.1e}", word[found.greedy], word[found.beam]]
                table.append(f"| {' | '.join([name, direction, version, *cells])} |")
                where = dict(variant=name, direction=direction, version=version)
                record.append(where | found._asdict())
    print("\n".join(table))
    stamp = dict(date=str(datetime.date.today()), commit=logs.commit(), jax=jax.__version__)
    _keep(table, [stamp, *record])


def _keep(table: list[str], record: list[dict]) -> None:
    page = ROOT / "experiments" / "parity.md"
    before, mark, _ = page.read_text().partition("<!-- table -->\n")
    logs.write_atomically(page, before + mark + "\n".join(table) + "\n")
    lines = "".join(json.dumps(row) + "\n" for row in record)
    logs.write_atomically(ROOT / "experiments" / "parity.jsonl", lines)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
