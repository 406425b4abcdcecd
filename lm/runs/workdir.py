"""The config that claims a workdir, and the keys that may change when a run is resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from lm import logs, lookup, storage, tokenizer
from lm.runs.renamed_keys import check_renamed, dotted_items
from lm.runs.schema import Run

# A resumed run may change these: they affect no number, or only its last bits.
OPERATIONAL = ("parallel", "log_every_steps", "eval_every_steps", "checkpoint", "evaluate")
OPERATIONAL += ("decoding", "guard.hang_timeout_seconds", "early_stopping_patience")
OPERATIONAL += ("data.num_workers", "data.max_bad_records", "model.dtype", "model.scan_layers")
OPERATIONAL += ("model.remat_policy", "model.attention.implementation", "extensions.file")


def is_claimed(workdir: str | os.PathLike) -> bool:
    """Return whether a run has written its config into the workdir."""
    return (storage.as_path(workdir) / "config.json").exists()


def read_config(workdir: str | os.PathLike) -> dict:
    """Read the config of a claimed workdir.

    Raises ValueError if it is missing or damaged, or has keys of an older version.
    """
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
            f"{workdir} holds a checkpoint of transformers; import it as a run: "
            f"python -m lm import {workdir} --workdir=..."
        )
    try:
        check_renamed(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return config


def differences(config: Mapping, stored: Mapping, prefix: str = "") -> list[str]:
    """Return "key (here x, there y)" for each leaf in which two nested configs differ."""
    lines = []
    for key in sorted(config.keys() | stored.keys()):
        a, b = config.get(key), stored.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key} (here {a!r}, there {b!r})")
    return lines


def without_operational(config: Mapping[str, Any], prefix: str = "") -> dict:
    """Return the nested config without the keys of OPERATIONAL."""
    return {
        key: without_operational(value, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in config.items()
        if prefix + key not in OPERATIONAL
    }


def is_allowed(key: str, allow: tuple[str, ...]) -> bool:
    """Return whether `allow` contains a dotted key or one of its sections."""
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in allow)


def check_workdir(run: Run, allow: tuple[str, ...] = ()) -> None:
    """Raise ValueError, naming the keys, if the workdir's config differs from the run's.

    allow: dotted keys and sections that may differ.
    """
    stored = read_config(run.workdir) if is_claimed(run.workdir) else run.config_dict
    keys = dict([*dotted_items(run.config_dict), *dotted_items(stored)])
    for key in allow:
        if key not in keys:
            raise ValueError(
                f"--allow_change={key} is no key of the config{lookup.nearest(key, keys)}; write "
                f"keys as optimizer.learning_rate, separated by commas."
            )
    lines = differences(without_operational(run.config_dict), without_operational(stored))
    lines = [line for line in lines if not is_allowed(line.split()[0], allow)]
    if lines:
        raise ValueError(
            f"{run.workdir} holds a run with another config: {', '.join(lines)}; use another "
            f"--workdir, or the same config, or, to change it midway, "
            f"--allow_change={','.join(line.split()[0] for line in lines)}."
        )


def claim(run: Run, tokens: tokenizer.Tokenizer) -> None:
    """Write the config into the workdir, with a copy of the tokenizer."""
    directory = run.workdir / "tokenizer"
    if directory.resolve() != tokens.directory.resolve():
        storage.copy_dir(tokens.directory, directory, tokenizer.METADATA_FILE)
    logs.write_atomically(run.workdir / "config.json", json.dumps(run.config_dict, indent=2) + "\n")
