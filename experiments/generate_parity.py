"""Does a trained run answer real inputs as transformers' `generate` does with its export?

  python -m experiments.generate_parity --run=runs/tasks/multi30k/0 --data_dir=...

Compares ids of greedy search and of 4 beams for the first inputs of a split, through transformers'
own tokenizer. Needs `make .venv/.hf`. Prints the counts and appends them to generate_parity.jsonl.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import tempfile

import numpy as np

from lm import decoding, evaluate, inference, interop, logs, tasks

SEARCHES = {  # short form of lm -> arguments of generate
    "greedy": {"num_beams": 1},
    "beam num_beams=4 length_penalty=1.0 length_penalty_kind=power": {
        "num_beams": 4,
        "length_penalty": 1.0,
    },
}
ROWS = 40  # inputs per call of generate
HERE = pathlib.Path(__file__).parent


def until_end(ids, eos: int) -> list[int]:
    """The ids up to and with the first eos."""
    ids = [int(token) for token in ids]
    return ids[: ids.index(eos) + 1] if eos in ids else ids


def transformers_ids(directory: str, texts: list[str], lengths: tuple[int, int], eos: int) -> dict:
    """{"inputs": ids, search: ids} by transformers. lengths: most tokens of inputs and answers."""
    import torch
    import transformers

    tokens = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory).eval()
    ids = {search: [] for search in ("inputs", *SEARCHES)}
    for start in range(0, len(texts), ROWS):
        batch = texts[start : start + ROWS]
        options = {"padding": True, "truncation": True, "max_length": lengths[0]}
        inputs = tokens(batch, return_tensors="pt", **options)
        ids["inputs"] += [until_end(row, eos) for row in inputs["input_ids"]]
        for search, arguments in SEARCHES.items():
            with torch.inference_mode():
                outputs = model.generate(
                    **inputs, max_new_tokens=lengths[1], do_sample=False, **arguments
                )
            ids[search] += [until_end(row[1:], eos) for row in outputs]
    return ids


def main() -> None:
    """Compares, prints the counts and appends them to the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True, help="folder of a fine-tuned run")
    parser.add_argument("--data_dir", default="", help="TFDS's directory")
    parser.add_argument("--split", default="test")
    parser.add_argument("--count", type=int, default=200, help="inputs")
    flags = parser.parse_args()
    run, strategy, tokens, params, step = inference.open_run(flags.run)
    (name,) = run.data.names
    texts = [pair["inputs"] for pair in evaluate.task_texts(run, name, flags.split)[: flags.count]]
    with tempfile.TemporaryDirectory() as directory:
        interop.write(flags.run, directory)
        reference = transformers_ids(directory, texts, run.lengths, tokens.eos)
    task, row = run.data.get_task(name), {"task": name, "inputs": len(texts), "update": step}
    ids = [tasks.truncate_input(task, text, run.data.input_length, tokens)[0] for text in texts]
    row["same inputs"] = sum(map(np.array_equal, ids, reference["inputs"]))
    for search in SEARCHES:
        answers = inference.Generator(run, strategy, params, tokens, decoding.parse(search))
        generated = [until_end(rows[0], tokens.eos) for rows, _ in answers.generate_ids(ids)]
        row[search] = sum(a == b for a, b in zip(generated, reference[search], strict=True))
    row |= {"commit": logs.commit(), "versions": logs.versions()}
    with (HERE / "generate_parity.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print({name: value for name, value in row.items() if name != "versions"})


if __name__ == "__main__":
    main()
