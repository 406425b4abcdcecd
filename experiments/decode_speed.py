"""How many sequences per second do lm and transformers' `generate` decode? decode_speed.md.

  python -m experiments.decode_speed --data_dir=... [--sizes=small,base] [--batches=1,8,32]
                                     [--methods=greedy,beam] [--turns=5] [--cores=2]

T5 1.1 in float32 on the CPU with the same random weights, written by lm.interop and loaded by
transformers; inputs are captions of multi30k's test. Both generate exactly TOKENS tokens, for equal
work. They take turns in one process, a batch each; ratios are those of a turn, and ids are
compared. decode_speed.jsonl has every turn. Other cases keep their recorded rows.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
import statistics
import tempfile
import time
import zlib

import jax
import numpy as np
import tqdm

from experiments import records, step_speed
from lm import batch, decoding, pipeline, sources, steps, transformer
from lm.interop import transformers as exchange

NAME = "decode_speed"
TOKENS, WIDTH, ALPHA, EOS = 32, 4, 0.6, 1
ROOM = f"min_length={TOKENS} max_length={TOKENS}"
METHODS = {  # name -> lm's short form, and the same as arguments of `generate`
    "greedy": (f"greedy {ROOM}", {}),
    "beam": (
        f"beam num_beams={WIDTH} length_penalty={ALPHA} {ROOM}",
        dict(num_beams=WIDTH, length_penalty=ALPHA),
    ),
}


def tokens_of(text: str, size: int = 32_000) -> np.ndarray:
    """Hashes each word or mark to an id and adds eos; about as many ids as a tokenizer makes."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    ids = [3 + zlib.crc32(word.encode()) % (size - 3) for word in words]
    return np.array([*ids, EOS], np.int32)


def both(size: str):
    """Returns lm's model, its parameters, and transformers' model with the same weights."""
    import torch
    import transformers

    config = step_speed.model_config(size)
    model = transformer.Transformer(config)
    init = lambda: model.init(jax.random.key(0), transformer.dummy_batch())["params"]
    params = jax.jit(init)()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as folder:
        exchange.write(params, config, folder)
        theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    return model, params, theirs.eval()


def turns_of(pair, method: str, rows: list[batch.Batch], turns: int) -> dict:
    """Seconds of each turn of both models, cycling through batches, and the number of equal ids."""
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
    """Measures one size, method and batch size."""
    few = asked[: max(count, 4)]
    rows = [part for _, part in pipeline.input_batches(few, count, 512)]
    found = turns_of(pair, method, rows, turns)
    ratios = [theirs / ours for ours, theirs in zip(found["ours"], found["theirs"], strict=True)]
    return dict(size=size, method=method, batch=count, ratios=ratios) | found


def table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    header = ["T5 1.1", "processor", "cores", "method", "batch", "sequences/s, ours"]
    header += ["transformers", "ours / it (lowest .. highest)", "by best turns", "same ids"]
    lines = []
    for row in rows:
        rate = lambda side, pick=statistics.median: row["batch"] / pick(row[side])  # noqa: B023
        ratios = row["ratios"]
        shown = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"
        cells = [row[word] for word in ("size", "processor", "cores", "method", "batch")]
        cells.append(f"{rate('ours'):.3g}")
        cells += [f"{rate('theirs'):.3g}", shown, f"{rate('ours', min) / rate('theirs', min):.2f}"]
        cells.append(f"{row['equal']} of {row['compared']}")
        lines.append(cells)
    return records.markdown(header, lines)


def processor() -> str:
    """The processor's name, family and model, from /proc/cpuinfo."""
    known = pathlib.Path("/proc/cpuinfo")
    said = re.findall(r"^(?:model name|model|cpu family)\s*: (.*)$", known.read_text(), re.M)
    family, model, name = said[:3]
    return f"{name}, family {family}, model {model}"


def order(row: dict) -> tuple:
    """The sort key of a row."""
    first = [row["processor"], row["size"] != "small", row["method"] != "greedy"]
    return (*first, *(row[key] for key in ("size", "processor", "method", "cores", "batch")))


def main(arguments: list[str] | None = None) -> None:
    """Measures each case and saves its row."""
    parser = records.parser(NAME, __doc__)
    parser.add_argument("--data_dir", default="", help="TFDS's directory")
    parser.add_argument("--sizes", type=records.words, default=["small", "base"])
    parser.add_argument("--methods", type=records.words, default=list(METHODS))
    parser.add_argument("--batches", type=records.words, default=["1", "8", "32"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--cores", type=int, default=0, help="cores to use; 0: all")
    flags = parser.parse_args(arguments)
    cores = sorted(os.sched_getaffinity(0))[-flags.cores :]
    os.sched_setaffinity(0, cores)  # before either library starts its threads
    captions = sources.records("tfds:multi30k", "test", flags.data_dir)
    texts = [tokens_of(captions[index]["en"]) for index in range(max(map(int, flags.batches)))]
    for size in flags.sizes:
        pair = both(size)
        attention = pair[2].config._attn_implementation
        cases = [(method, int(count)) for method in flags.methods for count in flags.batches]
        for method, count in tqdm.tqdm(cases, desc=size):
            row = measure(pair, size, method, count, texts, flags.turns) | records.stamp()
            row |= dict(cores=len(cores), seed=0, processor=processor(), attention=attention)
            rows = records.save(flags.out, NAME, [row], order)
            records.put_table(flags.out, NAME, table(rows))
            print(table([row]))


if __name__ == "__main__":
    main()
