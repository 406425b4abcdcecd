"""Entries that a config file adds to lm's tables: its own activation, objective, optimizer, ...

The config file registers them when it is read, as configs/squared_relu.py does:

    extensions.register(layers.ACTIVATIONS, "squared_relu", (squared_relu, False))

A run whose config names one records the file and a sha256 in its config, run.json and checkpoints;
it is not continued, read or exported without them. The sha256 covers the entry and all that it uses
of its file: functions, constants, closures.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import inspect
import os
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_ENTRIES: dict[str, dict[int, tuple[str, Any]]] = {}  # name -> id of table -> (file, entry)

ERRORS = (OSError, ImportError, SyntaxError, NameError, AttributeError, TypeError)
ERRORS += (LookupError, ArithmeticError)  # of the code in a user's file


def register(table: dict[str, Any], name: str, entry: Any) -> None:
    """Add an entry of the calling file to one of lm's tables.

    Args:
      table: any that a config chooses from, as layers.ACTIVATIONS, objectives.OBJECTIVES,
        optimizers.OPTIMIZERS, distill.TERMS, layers.ATTENTION, tasks.TASKS.
      name: as the config will name it. entry: of the kind that the table holds.

    Raises: ValueError if the table has an entry of that name from elsewhere.
    """
    file = sys._getframe(1).f_code.co_filename
    earlier = os.path.abspath(_ENTRIES.get(name, {}).get(id(table), ("", None))[0])
    if name in table and earlier != os.path.abspath(file):
        raise ValueError(f"{file} registers {name!r}, which exists already; choose another name.")
    _ENTRIES.setdefault(name, {})[id(table)] = file, entry
    table[name] = entry


def _texts(value: Any, file: str, seen: set[int]) -> Iterator[str]:
    """Yield text that is the same for equal values in every process.

    Of what the file defines the source, with all that it uses; of imports the name.
    """
    value = inspect.unwrap(value) if callable(value) else value
    if isinstance(value, functools.partial):
        value = (value.func, value.args, value.keywords)
    if isinstance(value, types.FunctionType) and value.__code__.co_filename == file:
        if id(value) in seen:  # functions alone: they live as long as the table
            return
        seen.add(id(value))
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        names = sorted(_names(value.__code__) & value.__globals__.keys())
        yield inspect.getsource(value)
        parts = (cells, value.__defaults__, value.__kwdefaults__)
        yield from _texts([*parts, *(value.__globals__[name] for name in names)], file, seen)
    elif isinstance(value, list | tuple | Mapping):
        for item in value.items() if isinstance(value, Mapping) else value:
            yield from _texts(item, file, seen)
    elif callable(value) or isinstance(value, types.ModuleType):
        yield getattr(value, "__qualname__", getattr(value, "__name__", type(value).__qualname__))
    elif hasattr(value, "tobytes"):
        yield f"{value.dtype} {value.shape} {value.tobytes().hex()}"
    else:
        if " at 0x" in repr(value):
            raise ValueError(
                f"{file} registers an entry that uses {value!r}, which has no text of its own to "
                f"record; use functions, numbers and text."
            )
        yield repr(value)


def _names(code: types.CodeType) -> set[str]:
    """Return the names that a function's code uses, those of functions inside it included."""
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def load(files: Iterable[str]) -> None:
    """Run the config files that register a run's extensions.

    Raises: ValueError for a file that cannot be read.
    """
    for file in files:
        name = f"extensions_{hashlib.sha256(os.path.abspath(file).encode()).hexdigest()[:12]}"
        spec = importlib.util.spec_from_file_location(name, file)
        if not file.endswith(".py") or spec is None or spec.loader is None:
            raise ValueError(f"--extensions={file} is no Python file; name a config file.")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)  # dataclasses look there
        try:
            spec.loader.exec_module(module)
        except ERRORS as error:
            message = f"{type(error).__name__}: {error}"
            raise ValueError(f"--extensions={file} cannot be run: {message}") from error


def files() -> list[str]:
    """Return the files of all entries registered in this process, as `load` takes them."""
    return sorted({file for tables in _ENTRIES.values() for file, _ in tables.values()})


def record(config: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the file and the sha256, by name, of the registered entries that a config names."""
    names = sorted(set(_strings(config)) & _ENTRIES.keys())
    origins = {name: _describe(name) for name in names}
    kinds = ("file", "sha256") if names else ()
    return {kind: {name: origins[name][kind] for name in names} for kind in kinds}


def _describe(name: str) -> dict[str, str]:
    entries = sorted(_ENTRIES[name].values(), key=lambda pair: pair[0])
    text = "\n".join(text for file, entry in entries for text in _texts(entry, file, set()))
    return {"file": entries[0][0], "sha256": hashlib.sha256(text.encode()).hexdigest()}


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
        if name not in _ENTRIES:
            raise ValueError(
                f"{owner} uses {name!r}, which {file} registers; pass that config file: "
                f"--extensions={file}."
            )
        if (current := _describe(name))["sha256"] != digest:
            raise ValueError(
                f"{owner} uses {name!r} of {file} with sha256 {digest[:12]}, but "
                f"{current['file']} has {current['sha256'][:12]}; restore that version."
            )
