"""Does a trained run say, on real inputs, what transformers' `generate` says of its export?

  python -m experiments.generate_parity --run=runs/tasks/multi30k/0 --data_dir=...

Ids of greedy search and of 4 beams, the first inputs of the task's test split, through their own
tokenizer. Needs `make .venv/.hf`. The answer is printed and kept in generate_parity.jsonl.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile

import numpy as np

from lm import decoding, evaluate, inference, interop, logs, tasks

SEARCHES = {  # ours in words, theirs in keywords
    "greedy": {"num_beams": 1},
    "beam num_beams=4 length_penalty=1.0 length_penalty_kind=power": {
        "num_beams": 4,
        "length_penalty": 1.0,
    },
}
ROWS = 40  # of theirs at once
HERE = pathlib.Path(__file__).parent


def until_end(ids, eos: int) -> list[int]:
    """The ids up to the first eos, with it; padding that follows is none."""
    ids = [int(token) for token in ids]
    return ids[: ids.index(eos) + 1] if eos in ids else ids


def theirs(place: str, texts: list[str], longest: tuple[int, int], eos: int) -> dict:
    """{"inputs": ids, search: ids} by transformers. longest: tokens of an input, of an answer."""
    import torch
    import transformers

    tokens = transformers.AutoTokenizer.from_pretrained(place)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(place).eval()
    found = {how: [] for how in ("inputs", *SEARCHES)}
    for start in range(0, len(texts), ROWS):
        some = texts[start : start + ROWS]
        options = {"padding": True, "truncation": True, "max_length": longest[0]}
        asked = tokens(some, return_tensors="pt", **options)
        found["inputs"] += [until_end(row, eos) for row in asked["input_ids"]]
        for how, words in SEARCHES.items():
            with torch.inference_mode():
                said = model.generate(**asked, max_new_tokens=longest[1], do_sample=False, **words)
            found[how] += [until_end(row[1:], eos) for row in said]
    return found


def main() -> None:
    """Compare, print a line a search, keep the figures."""
    known = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known.add_argument("--run", required=True, help="folder of a fine-tuned run")
    known.add_argument("--data_dir", default="", help="TFDS's directory")
    known.add_argument("--split", default="test")
    known.add_argument("--count", type=int, default=200, help="inputs")
    asked = known.parse_args()
    run, strategy, tokens, params, step = inference.open_run(asked.run)
    (name,) = run.data.names
    texts = [pair["inputs"] for pair in evaluate.task_texts(run, name, asked.split)[: asked.count]]
    with tempfile.TemporaryDirectory() as place:
        interop.write(asked.run, place)
        other = theirs(place, texts, run.lengths, tokens.eos)
    task, row = run.data.get_task(name), {"task": name, "inputs": len(texts), "update": step}
    ids = [tasks.truncate_input(task, text, run.data.input_length, tokens)[0] for text in texts]
    row["same inputs"] = sum(map(np.array_equal, ids, other["inputs"]))
    for how in SEARCHES:
        answers = inference.Generator(run, strategy, params, tokens, decoding.parse(how))
        ours = [until_end(found, tokens.eos) for (found, *_), _ in answers.generate_ids(ids)]
        row[how] = sum(a == b for a, b in zip(ours, other[how], strict=True))
    row |= {"commit": logs.commit(), "versions": logs.versions()}
    with (HERE / "generate_parity.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print({name: value for name, value in row.items() if name != "versions"})


if __name__ == "__main__":
    main()
