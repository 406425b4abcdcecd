"""Every config file opens with its command, its cost on named hardware and its score."""

from __future__ import annotations

import ast
import pathlib
import re
import shlex

from lm import cli

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
NO_CONFIGS = ("__init__", "models")  # the package, and the table of presets
HARDWARE = r"CPU\s+cores|H100|TPU|GPU"


def docstrings() -> dict[str, str]:
    """The module docstring of every config file, by name."""
    paths = [path for path in CONFIGS.glob("*.py") if path.stem not in NO_CONFIGS]
    return {path.name: ast.get_docstring(ast.parse(path.read_text())) or "" for path in paths}


def commands(docstring: str) -> list[list[str]]:
    """The words of each command in a docstring; a backslash continues a line."""
    lines = docstring.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("python -m ")]


def test_a_config_names_its_command_and_the_command_parses():
    for name, docstring in docstrings().items():
        assert any(f"--config=configs/{name}" in " ".join(c) for c in commands(docstring)), name
        for _, _, module, *words in commands(docstring):
            words = [re.sub(r"^(--config=\S+\.py):\S*/\S*", r"\1", word) for word in words]
            if module == "lm":
                command, *words = words
                cli.parse_flags(command, cli.COMMANDS[command][1], words)
            else:
                assert module == "experiments.pipeline", name
                cli.parse_flags("pipeline", ("config", "dry_run"), words)


def test_a_config_states_its_cost_and_its_score():
    for name, docstring in docstrings().items():
        cost = re.search(r"^Cost: (.*?)(?=^Score: )", docstring, re.M | re.S)
        score = re.search(r"^Score: (.*)", docstring, re.M | re.S)
        assert cost and score, f"configs/{name} lacks a line Cost: or Score:"
        if "depends on your data" not in score[1]:
            assert re.search(HARDWARE, cost[1]), f"configs/{name} names no hardware"
        for text in (cost[1], score[1]):
            assert "not yet measured" in text or re.search(r"\d", text), name


def test_recorded_pages_that_configs_name_exist():
    for name, docstring in docstrings().items():
        for page in re.findall(r"experiments/\w+\.md", docstring):
            assert (CONFIGS.parent / page).exists(), f"configs/{name} names {page}"
