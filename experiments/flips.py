"""Does a flipped bit in a file of a run or a transformers checkpoint crash lm or pass unnoticed?

python -m experiments.flips FOLDER COUNT SEED

FOLDER has `run`, a run's folder, and `foreign`, a checkpoint as transformers writes it. COUNT times
the program flips a bit of one file, reads the file as lm's commands do, and restores it. The last
line is JSON with counts per file: unharmed (the same content), said (an error in one sentence),
changed (other content in a file without checksum). `broken` lists violations: another kind of
error, or changed content in a file with a checksum. A crash ends the process.
"""

from __future__ import annotations

import collections
import json
import pathlib
import sys
from collections.abc import Callable

import numpy as np

from experiments import damage
from lm import checkpoints, inference, interop, report, runs
from lm.interop import transformers

PROBE = "Returns the shape of an array, or 12.5 é."


def numbers(tree) -> dict[str, bytes]:
    """The bits of every array of a tree."""
    return {k: np.asarray(x).tobytes() for k, x in checkpoints.flatten(tree).items()}


def read_params(folder: pathlib.Path):
    """The ids of a text and the parameters, as evaluate and predict read them."""
    run = runs.read_run(folder / "run")
    tokens = runs.make_tokenizer(run)
    params, step = inference.read_params(run, tokens)
    return [int(i) for i in tokens.encode(PROBE)], numbers(params), step


def read_config(folder: pathlib.Path):
    """The config of a run."""
    return runs.read_run(folder / "run").config_dict


def read_report(folder: pathlib.Path):
    """The manifest and rows of a run, as the report reads them."""
    content = report.read_run_folders([folder / "run"])[0]
    return content.manifest, content.rows


def read_foreign(folder: pathlib.Path):
    """The parameters of the transformers checkpoint, as import reads them."""
    model = runs.read_run(folder / "run").model
    try:
        return numbers(transformers.read_params(folder / "foreign", model))
    except interop.FORMAT_ERRORS as error:  # import prints it in a sentence
        raise ValueError(f"{folder} is not as transformers write it ({error})") from error


READERS: dict[str, tuple[str, Callable, bool]] = {  # file, reader, whether it has a checksum
    "facts": ("run/checkpoints/0/facts/metadata", read_params, True),
    "tokenizer.json": ("run/tokenizer/tokenizer.json", read_params, True),
    "tokenizer.model": ("run/tokenizer/tokenizer.model", read_params, True),
    "config.json": ("run/config.json", read_config, False),
    "run.json": ("run/run.json", read_report, False),
    "metrics.jsonl": ("run/metrics.jsonl", read_report, False),
    "safetensors": ("foreign/model.safetensors", read_foreign, False),
}


def outcome(name: str, folder: pathlib.Path, expected, rng: np.random.Generator) -> str:
    """Flips one bit and returns the result: unharmed, said, changed, or "broken: why"."""
    file, read, sealed = READERS[name]
    path = folder / file
    data = path.read_bytes()
    damage.flip(path, rng)
    try:
        content = read(folder)
    except (ValueError, OSError) as error:
        return "said" if str(error) else f"broken: {name}: an error without a message"
    except (ArithmeticError, LookupError, RuntimeError, TypeError, AttributeError) as error:
        return f"broken: {name}: {type(error).__name__}: {error}"
    finally:
        path.write_bytes(data)
    if content == expected:
        return "unharmed"
    return f"broken: {name}: changed silently" if sealed else "changed"


def main(folder: str, count: str, seed: str) -> None:
    """Flips COUNT bits, the files in turns, and prints the counts."""
    directory, rng = pathlib.Path(folder), np.random.default_rng(int(seed))
    expected = {name: read(directory) for name, (_, read, _) in READERS.items()}
    counts, broken = {name: collections.Counter() for name in READERS}, []
    for trial in range(int(count)):
        name = list(READERS)[trial % len(READERS)]
        result = outcome(name, directory, expected[name], rng)
        if result.startswith("broken"):
            broken.append(result)
        counts[name][result.split(":")[0]] += 1
    print(json.dumps(counts | {"broken": broken}))


if __name__ == "__main__":
    main(*sys.argv[1:])
