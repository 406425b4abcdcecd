"""Does one flipped bit in any file of a run or of a foreign checkpoint crash us, or pass as sound?

python -m experiments.flips FOLDER COUNT SEED

FOLDER has `run`, a run's folder, and `foreign`, a checkpoint as transformers writes it. COUNT times
a bit of one file is flipped, the file is read as our commands read it, and put back. The last line
is JSON: by file, how often it was unharmed (what is read is the same), said (an error of one
sentence), changed (other content, which nothing can tell from an edit); `broken` lists what must
never be: another kind of error, or a change in what is sealed. A crash ends the process.
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
    """What the report tells of a run."""
    found = report.read_run_folders([folder / "run"])[0]
    return found.manifest, found.rows


def read_foreign(folder: pathlib.Path):
    """The parameters of the foreign checkpoint, as import reads them."""
    model = runs.read_run(folder / "run").model
    try:
        return numbers(transformers.read_params(folder / "foreign", model))
    except interop.FOREIGN as error:  # import says it in a sentence
        raise ValueError(f"{folder} is not as transformers write it ({error})") from error


READERS: dict[str, tuple[str, Callable, bool]] = {  # file, reader, whether a change can be told
    "facts": ("run/checkpoints/0/facts/metadata", read_params, True),
    "tokenizer.json": ("run/tokenizer/tokenizer.json", read_params, True),
    "tokenizer.model": ("run/tokenizer/tokenizer.model", read_params, True),
    "config.json": ("run/config.json", read_config, False),
    "run.json": ("run/run.json", read_report, False),
    "metrics.jsonl": ("run/metrics.jsonl", read_report, False),
    "safetensors": ("foreign/model.safetensors", read_foreign, False),
}


def outcome(name: str, folder: pathlib.Path, sound, rng: np.random.Generator) -> str:
    """What comes of one flip: unharmed, said, changed, or "broken: why"."""
    file, read, sealed = READERS[name]
    path = folder / file
    before = path.read_bytes()
    damage.flip(path, rng)
    try:
        found = read(folder)
    except (ValueError, OSError) as error:
        return "said" if str(error) else f"broken: {name}: an error without a word"
    except (ArithmeticError, LookupError, RuntimeError, TypeError, AttributeError) as error:
        return f"broken: {name}: {type(error).__name__}: {error}"
    finally:
        path.write_bytes(before)
    if found == sound:
        return "unharmed"
    return f"broken: {name}: changed silently" if sealed else "changed"


def main(folder: str, count: str, seed: str) -> None:
    """COUNT flips, the files in turns."""
    place, rng = pathlib.Path(folder), np.random.default_rng(int(seed))
    sound = {name: read(place) for name, (_, read, _) in READERS.items()}
    told, broken = {name: collections.Counter() for name in READERS}, []
    for trial in range(int(count)):
        name = list(READERS)[trial % len(READERS)]
        found = outcome(name, place, sound[name], rng)
        if found.startswith("broken"):
            broken.append(found)
        told[name][found.split(":")[0]] += 1
    print(json.dumps(told | {"broken": broken}))


if __name__ == "__main__":
    main(*sys.argv[1:])
