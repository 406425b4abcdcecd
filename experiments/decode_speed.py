"""How many sequences a second are decoded, ours and transformers' `generate`?  decode_speed.md.

  python -m experiments.decode_speed --data_dir=... [--sizes=small,base] [--batches=1,8,32]
                                     [--methods=greedy,beam] [--turns=5] [--cores=2]

T5 1.1 in float32 on the CPU, with the same weights, random ones written by lm.interop and loaded by
transformers; inputs are captions of multi30k's test. Both must say TOKENS tokens, so both do equal
work. They take turns in one process, a batch each; ratios are taken turn by turn, and ids compared.
Every turn is in decode_speed.jsonl. Rows of cases not asked for are kept.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import pathlib
import platform
import re
import statistics
import tempfile
import time
import zlib

import jax
import numpy as np
import tqdm

from configs import models
from lm import batch, decoding, logs, lookup, pipeline, sources, steps, transformer
from lm.interop import transformers as exchange

HERE = pathlib.Path(__file__).parent
TOKENS, WIDTH, ALPHA, EOS = 32, 4, 0.6, 1
ROOM = f"min_length={TOKENS} max_length={TOKENS}"
METHODS = {  # name -> our words, and what is the same to `generate`
    "greedy": (f"greedy {ROOM}", {}),
    "beam": (
        f"beam num_beams={WIDTH} length_penalty={ALPHA} {ROOM}",
        dict(num_beams=WIDTH, length_penalty=ALPHA),
    ),
}


def tokens_of(text: str, size: int = 32_000) -> np.ndarray:
    """A word or a mark an id, by its hash, then eos: about as many as of 32,000 learned pieces."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    ids = [3 + zlib.crc32(word.encode()) % (size - 3) for word in words]
    return np.array([*ids, EOS], np.int32)


def both(size: str):
    """The same model twice: ours, its parameters, and transformers'."""
    import torch
    import transformers

    _, _, keys = lookup.lookup(models.PRESETS, f"t5_1_1_{size}", "the preset")
    config = transformer.ModelConfig(**keys)
    model = transformer.Transformer(config)
    init = lambda: model.init(jax.random.key(0), transformer.dummy_batch())["params"]
    params = jax.jit(init)()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder:
        exchange.write(params, config, folder)
        theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    return model, params, theirs.eval()


def turns_of(pair, method: str, rows: list[batch.Batch], turns: int) -> dict:
    """Seconds of each turn of both, by batches in turn, and how many ids were the same."""
    import torch

    (model, params, stranger), (words, options) = pair, METHODS[method]
    how = decoding.parse(words)
    ours = functools.partial(steps.decode_step, model=model, length=TOKENS, eos=EOS, config=how)
    start = time.perf_counter()
    compiled = {part.inputs.shape: None for part in rows}
    for part in rows:
        shape = part.inputs.shape
        compiled[shape] = compiled[shape] or jax.jit(ours).lower(params, part).compile()
    found = dict(compile_seconds=time.perf_counter() - start, programs=len(compiled))
    found |= dict(ours=[], theirs=[], equal=0, compared=0)
    room = dict(do_sample=False, min_new_tokens=TOKENS, max_new_tokens=TOKENS, use_cache=True)

    def generate(part):
        ids, mask = (torch.tensor(np.asarray(x), dtype=torch.int64) for x in part[:2])
        with torch.inference_mode():
            return stranger.generate(input_ids=ids, attention_mask=mask, **room, **options)

    for turn in range(-1, turns):  # the first is not counted
        part = rows[turn % len(rows)]
        times = [time.perf_counter()]
        said = jax.block_until_ready(compiled[part.inputs.shape](params, part).ids)
        times.append(time.perf_counter())
        expected = generate(part)
        times.append(time.perf_counter())
        same = (np.asarray(said)[:, 0] == expected[:, 1:].numpy()).all(axis=1)
        found["equal"] += int(same.sum())
        found["compared"] += len(same)
        if turn >= 0:
            found["ours"].append(times[1] - times[0])
            found["theirs"].append(times[2] - times[1])
    return found


def measure(pair, size: str, method: str, count: int, asked: list, turns: int) -> dict:
    """The row of one size, method and number of sequences at a time."""
    few = asked[: max(count, 4)]
    rows = [part for _, part in pipeline.input_batches(few, count, 512)]
    found = turns_of(pair, method, rows, turns)
    ratios = [theirs / ours for ours, theirs in zip(found["ours"], found["theirs"], strict=True)]
    return dict(size=size, method=method, batch=count, ratios=ratios) | found


def table(rows: list[dict]) -> str:
    """The rows as the page shows them."""
    lines = [
        "| T5 1.1 | processor | cores | method | batch | sequences/s, ours | transformers "
        "| ours / it (lowest .. highest) | by best turns | same ids |"
    ]
    lines.append("|" + " --- |" * 10)
    for row in rows:
        rate = lambda side, pick=statistics.median: row["batch"] / pick(row[side])  # noqa: B023
        ratios = row["ratios"]
        shown = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"
        cells = [row[word] for word in ("size", "processor", "cores", "method", "batch")]
        cells.append(f"{rate('ours'):.3g}")
        cells += [f"{rate('theirs'):.3g}", shown, f"{rate('ours', min) / rate('theirs', min):.2f}"]
        cells.append(f"{row['equal']} of {row['compared']}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def write(row: dict) -> None:
    """Keep the row beside this file, with the others, and put the table on the page."""
    record, page = HERE / "decode_speed.jsonl", HERE / "decode_speed.md"
    words = ("size", "processor", "method", "cores", "batch")
    order = lambda row: [row["processor"], row["size"] != "small", row["method"] != "greedy"]
    named = lambda row: order(row) + [row[word] for word in words]
    old = logs.read(record) if record.exists() else []
    rows = sorted([other for other in old if named(other) != named(row)] + [row], key=named)
    before, mark, after = page.read_text().partition("<!-- table -->\n")
    _, end, rest = after.partition("<!-- end of table -->\n")
    logs.write_atomically(page, before + mark + table(rows) + "\n" + end + rest)
    logs.write_atomically(record, "".join(json.dumps(row) + "\n" for row in rows))


def processor() -> str:
    """What Linux calls the processor: vendor and model."""
    known = pathlib.Path("/proc/cpuinfo")
    said = re.findall(r"^(?:model name|model|cpu family)\s*: (.*)$", known.read_text(), re.M)
    family, model, name = said[:3]
    return f"{name}, family {family}, model {model}"


def main() -> None:
    """Measure what is asked for; each row is kept as soon as it is measured."""
    known = argparse.ArgumentParser(prog="python -m experiments.decode_speed")
    listed = lambda text: text.split(",")
    known.add_argument("--data_dir", default="", help="TFDS's directory")
    known.add_argument("--sizes", type=listed, default=["small", "base"])
    known.add_argument("--methods", type=listed, default=list(METHODS))
    known.add_argument("--batches", type=listed, default=["1", "8", "32"])
    known.add_argument("--turns", type=int, default=5)
    known.add_argument("--cores", type=int, default=0, help="to use, of both; 0: all")
    asked = known.parse_args()
    cores = sorted(os.sched_getaffinity(0))[-asked.cores :]
    os.sched_setaffinity(0, cores)  # before either makes its threads
    records = sources.records("tfds:multi30k", "test", asked.data_dir)
    texts = [tokens_of(records[index]["en"]) for index in range(max(map(int, asked.batches)))]
    stamp = dict(date=str(datetime.date.today()), commit=logs.commit(), machine=platform.machine())
    stamp |= dict(cores=len(cores), seed=0, versions=logs.versions(), processor=processor())
    for size in asked.sizes:
        pair = both(size)
        stamp["attention"] = pair[2].config._attn_implementation
        cases = [(method, int(count)) for method in asked.methods for count in asked.batches]
        for method, count in tqdm.tqdm(cases, desc=size):
            row = measure(pair, size, method, count, texts, asked.turns)
            load = os.getloadavg()[0]  # of both sides, and of what else the machine does
            row |= stamp | dict(load=load)
            write(row)
            print(table([row]))


if __name__ == "__main__":
    main()
