"""Processes of one run on several hosts."""

from __future__ import annotations

from experiments.kill_drill import children

CONFIG = """
import json, pathlib
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(json.loads(pathlib.Path(__file__).with_suffix(".json").read_text()))
"""


def ends(processes: list[children.Child]) -> list[int | None]:
    """The exit codes; a process that hangs is killed."""
    codes = [child.wait(150) for child in processes]
    for child in processes:
        child.end()
    return codes
