"""Entries that a config file adds to lm's tables: its own activation, objective, optimizer, ...

The config file registers them when it is read, as configs/squared_relu.py does:

    extensions.register(layers.ACTIVATIONS, "squared_relu", (squared_relu, False))

A run whose config names one records the file and the sha256 of the entry's source text, in its
config, run.json and checkpoints; it is not continued, read or exported without them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_SOURCES: dict[str, dict[int, tuple[str, str]]] = {}  # name -> id of table -> (file, source text)


def register(table: dict[str, Any], name: str, entry: Any) -> None:
    """Add an entry of the calling file to one of lm's tables.

    Args:
      table: any that a config chooses from, as layers.ACTIVATIONS, objectives.OBJECTIVES,
        optimizers.OPTIMIZERS, distill.TERMS, layers.ATTENTION, tasks.TASKS.
      name: as the config will name it. entry: of the kind that the table holds.

    Raises: ValueError if the table has an entry of that name from elsewhere.
    """
    file = sys._getframe(1).f_code.co_filename
    earlier = os.path.abspath(_SOURCES.get(name, {}).get(id(table), ("", ""))[0])
    if name in table and earlier != os.path.abspath(file):
        raise ValueError(f"{file} registers {name!r}, which exists already; choose another name.")
    _SOURCES.setdefault(name, {})[id(table)] = file, "".join(_source_texts(entry))
    table[name] = entry


def _source_texts(entry: Any) -> Iterator[str]:
    """Yield the text that defines an entry: of each function in it, and of other values' repr."""
    for value in entry if isinstance(entry, tuple) else (entry,):
        yield inspect.getsource(value) if inspect.isroutine(value) else repr(value)


def load(files: Iterable[str]) -> None:
    """Run the config files that register a run's extensions.

    Raises: ValueError for a file that cannot be read.
    """
    for file in files:
        spec = importlib.util.spec_from_file_location("extensions_of_a_config", file)
        if not file.endswith(".py") or spec is None or spec.loader is None:
            raise ValueError(f"--extensions={file} is no Python file; name a config file.")
        try:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        except (OSError, ImportError, SyntaxError) as error:
            raise ValueError(f"--extensions={file} cannot be run: {error}") from error


def files() -> list[str]:
    """Return the files of all entries registered in this process, as `load` takes them."""
    return sorted({file for tables in _SOURCES.values() for file, _ in tables.values()})


def record(config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the file and the sha256, by name, of the registered entries that a config names."""
    names = sorted(set(_strings(config)) & _SOURCES.keys())
    origins = {name: _describe(name) for name in names}
    kinds = ("file", "sha256") if names else ()
    return {kind: {name: origins[name][kind] for name in names} for kind in kinds}


def _describe(name: str) -> dict[str, str]:
    sources = sorted(_SOURCES[name].values())
    text = "".join(source for _, source in sources)
    return {"file": sources[0][0], "sha256": hashlib.sha256(text.encode()).hexdigest()}


def _strings(value: Any) -> Iterator[str]:
    """Yield every string in nested mappings and lists, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (key for key in value)
        yield from _strings(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def check(recorded: Mapping[str, Mapping[str, str]], owner: str) -> None:
    """Raise ValueError unless a run's recorded entries are registered with the same source.

    owner: the workdir, for the message.
    """
    for name, digest in recorded.get("sha256", {}).items():
        file = recorded["file"][name]
        if name not in _SOURCES:
            raise ValueError(
                f"{owner} uses {name!r}, which {file} registers; pass that config file: "
                f"--extensions={file} (train: --config={file})."
            )
        if (current := _describe(name))["sha256"] != digest:
            raise ValueError(
                f"{owner} uses {name!r} of {file} with sha256 {digest[:12]}, but "
                f"{current['file']} has {current['sha256'][:12]}; restore that version."
            )
