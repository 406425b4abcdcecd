"""A workdir and the config that claims it; what may change when a run is continued."""

from __future__ import annotations

import json

from lm import logs, lookup, storage, tokenizer
from lm.runs.schema import Run

# What a continued run may change, for it decides no number but how exactly they are computed.
OPERATIONAL = ("parallel", "log_every_steps", "eval_every_steps", "checkpoint", "evaluate")
OPERATIONAL += ("guard.hang_timeout_seconds", "early_stopping_patience")
OPERATIONAL += ("data.num_workers", "data.max_bad_records", "model.dtype", "model.scan_layers")
OPERATIONAL += ("model.remat_policy", "model.attention.implementation")


def is_claimed(workdir) -> bool:
    """Whether a run's training has begun there."""
    return (storage.as_path(workdir) / "config.json").exists()


def read_config(workdir) -> dict:
    """The config of a claimed workdir. Raises ValueError where there is none, or it is damaged."""
    path = storage.as_path(workdir) / "config.json"
    if not path.exists():
        raise ValueError(f"{workdir} holds no run (no config.json); train one there first.")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); restore it from a copy.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no config; restore it from a copy.")
    if "model_type" in config:
        raise ValueError(
            f"{workdir} holds a checkpoint of transformers, no run; make one of it first: "
            f"python -m lm import {workdir} --workdir=..."
        )
    return config


def _keys(config: dict, prefix: str = ""):
    """(dotted key, value) of every section and leaf."""
    for key, value in config.items():
        yield prefix + key, value
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")


def differences(ours: dict, theirs: dict, prefix: str = "") -> list[str]:
    """Dotted keys, with both values, in which two nested configs differ."""
    found = []
    for key in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} (here {a!r}, there {b!r})")
    return found


def settled(config: dict) -> dict:
    """The config without the keys of OPERATIONAL, which may change from one call to the next."""

    def without(section: dict, prefix: str) -> dict:
        return {
            key: without(value, f"{prefix}{key}.") if isinstance(value, dict) else value
            for key, value in section.items()
            if prefix + key not in OPERATIONAL
        }

    return without(config, "")


def is_allowed(key: str, allow: tuple[str, ...]) -> bool:
    """Whether a dotted key, or a section that it is in, is among those that may differ."""
    return any(key == one or key.startswith(f"{one}.") for one in allow)


def check_workdir(run: Run, allow: tuple[str, ...] = ()) -> None:
    """Raise ValueError, naming the keys that differ, if the workdir is another config's.

    allow: dotted keys, or sections, that may differ nevertheless.
    """
    known = dict(_keys(run.config))
    for key in allow:
        if key not in known:
            raise ValueError(
                f"--allow_change={key} is no key of the config{lookup.nearest(key, known)}; name "
                f"keys as optimizer.learning_rate, several with a comma between."
            )
    theirs = read_config(run.workdir) if is_claimed(run.workdir) else run.config
    differing = differences(settled(run.config), settled(theirs))
    differing = [line for line in differing if not is_allowed(line.split()[0], allow)]
    if differing:
        keys = ",".join(line.split()[0] for line in differing)
        raise ValueError(
            f"{run.workdir} holds a run with another config: {', '.join(differing)}; use another "
            f"--workdir, or the config it was made with to continue it, or, to change it midway, "
            f"--allow_change={keys}."
        )


def claim(run: Run, tokens: tokenizer.Tokenizer) -> None:
    """Make the workdir this config's, with a copy of its tokenizer, so that it stands by itself."""
    own = run.workdir / "tokenizer"
    if own.resolve() != tokens.directory.resolve():
        storage.copy_dir(tokens.directory, own, tokenizer.METADATA_FILE)
    logs.write_atomically(run.workdir / "config.json", json.dumps(run.config, indent=2) + "\n")
