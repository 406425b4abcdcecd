"""Every program of experiments/ runs at toy size, or prints commands whose flags and keys exist."""

from __future__ import annotations

import re
import shlex

import pytest

from experiments import (
    claims,
    conversation,
    decode_speed,
    distillation,
    input_speed,
    preflight_table,
    records,
    save_cost,
    stages,
    step_speed,
    summarization,
    translation,
    wikipedia_speed,
)
from lm import cli
from tests import tiny_data


def check_commands(text: str) -> int:
    """Parses printed commands: an unknown flag or config key raises. Returns their number.

    A run's folder after the colon of --config does not exist yet, and is left out.
    """
    lines = [line for line in text.splitlines() if line.startswith("python -m lm ")]
    for line in lines:
        command, *arguments = shlex.split(re.sub(r"(--config=\S+\.py):\S*/\S*", r"\1", line))[3:]
        cli.parse_flags(command, cli.COMMANDS[command][1], arguments)
    return len(lines)


def test_the_studies_of_tasks_print_commands_that_parse(capsys):
    for program in (conversation, summarization, translation):
        words = ["--workdir=runs/none", "--data_dir=none", "--dry_run"]
        assert program.main(stages.arguments(program.__doc__, "runs/tasks", words)) == 0
        assert check_commands(capsys.readouterr().out) >= 8, program.__name__


def test_the_other_studies_print_commands_that_parse(capsys):
    assert claims.main(["--config=configs/demo.py:minute", "--dry_run"]) == 0
    assert check_commands(capsys.readouterr().out) > 40
    for task in distillation.TASKS:
        flags = distillation.arguments([f"--task={task}", "--dry_run"])
        assert distillation.main(flags) == 0
        assert check_commands(capsys.readouterr().out) > len(distillation.METHODS)


def check_record(out, name: str) -> list[dict]:
    """The rows of a record that a program has written, beside a page with a table."""
    assert (out / f"{name}.md").read_text().count("| --- |") >= 1
    return records.read(out, name)


@pytest.mark.slow
def test_step_speed_runs_at_toy_size(tmp_path):
    flags = ["--sizes=toy", "--arms=ours,eager", "--repeats=1", "--seconds=0"]
    step_speed.main([*flags, f"--out={tmp_path}"])
    rows = check_record(tmp_path, "step_speed")
    assert [row["arm"] for row in rows] == ["ours", "eager"]
    assert rows[0]["parameters"] == rows[1]["parameters"]


@pytest.mark.slow
def test_decode_speed_runs_at_toy_size(tmp_path):
    captions = [{"en": "A dog runs over the grass .", "de": "Ein Hund"}] * 4
    tiny_data.write_tfds(tmp_path / "tfds", "multi30k", {"test": captions})
    flags = [f"--data_dir={tmp_path / 'tfds'}", f"--out={tmp_path}", "--sizes=toy"]
    decode_speed.main([*flags, "--batches=2", "--turns=1"])
    rows = check_record(tmp_path, "decode_speed")
    assert [row["method"] for row in rows] == ["greedy", "beam"]
    assert all(row["equal"] == row["compared"] > 0 for row in rows)


@pytest.mark.slow
def test_input_speed_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(input_speed, "ROUNDS", 1)
    monkeypatch.setattr(input_speed, "BATCH", 4)
    monkeypatch.setattr(input_speed, "STORED", 400_000)
    input_speed.main(["masking", "pipeline", "--repeats=1", f"--out={tmp_path}"])
    sections = {row["section"] for row in check_record(tmp_path, "input_speed")}
    assert sections == {"masking", "pipeline"}


@pytest.mark.slow
def test_save_cost_runs(tmp_path):
    save_cost.main(["--repeats=1", f"--out={tmp_path}"])
    assert len(check_record(tmp_path, "save_cost")) == 6


@pytest.mark.slow
def test_wikipedia_speed_runs_without_wikiextractor(tmp_path, monkeypatch):
    monkeypatch.setattr(wikipedia_speed, "stranger", lambda: str.upper)
    monkeypatch.setattr(wikipedia_speed, "COPIES", 2)
    wikipedia_speed.main(["--repeats=1", f"--out={tmp_path}"])
    assert len(check_record(tmp_path, "wikipedia_speed")) == 5


def test_preflight_table_compiles_nothing_without_a_budget(tmp_path):
    flags = ["--only=t5_1_1_small@v5e", "--max_programs=0", f"--out={tmp_path}"]
    preflight_table.main(flags)
    (row,) = check_record(tmp_path, "preflight_table")
    assert (row["slice"], row["programs"], row["parameters"]) == ("", 0, 76_961_152)
