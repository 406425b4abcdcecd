"""One command from a user's own texts and pairs to a page about a distilled student."""

from __future__ import annotations

import json

import pytest

from experiments import pipeline
from lm import runs
from tests.tiny_data import made_up_documents

TASK = """
from configs import own_task

def get_config():
    config = own_task.get_config()
    config.data.custom_tasks.en_de.source = {source!r}
    config.evaluate.max_examples = 8
    return config
"""
TINY = {"d_model": 16, "d_ff": 32, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8}
TINY |= {"vocab_size": 512, "num_encoder_layers": 1, "num_decoder_layers": 2, "scan_layers": True}
STEPS = 4


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder of texts, pairs and a task's config."""
    home = tmp_path_factory.mktemp("own")
    (home / "texts").mkdir()
    documents = made_up_documents(1, 60)
    for number in range(3):
        text = "\n\n".join(row["text"] for row in documents[number::3])
        (home / "texts" / f"{number}.txt").write_text(text)
    words = [row["text"].split()[:6] for row in documents]
    rows = ["\t".join((" ".join(row), " ".join(row[::-1]))) for row in words]
    for split, few in (("train", rows[12:]), ("validation", rows[:12])):
        (home / f"{split}.tsv").write_text("\n".join(["en\tde", *few]) + "\n")
    (home / "task.py").write_text(TASK.format(source=f"{home}/{{split}}.tsv"))
    return home


@pytest.fixture(scope="module")
def flags(home):
    """The command's, with every stage tiny."""
    sizes = {f"model.{key}": value for key, value in TINY.items()}
    sizes |= {
        "data.input_length": 24,
        "data.batch_size": 8,
        "parallel.data": 1,
        "log_every_steps": 1,
    }
    tiny = " ".join(f"--config.{key}={value}" for key, value in sizes.items())
    fewer = "--config.model.num_encoder_layers=1 --config.model.num_decoder_layers=1"
    made = {"workdir": home / "runs", "corpus": home / "texts" / "*.txt", "decode": 4}
    made |= {"clean": "--vocab_size=400 --unit=paragraph --workers=1", "title": "Of our own"}
    made |= {"finetune.file": home / "task.py", "distill.flags": f"{tiny} {fewer}"}
    for stage in ("pretrain", "finetune", "distill"):
        made = {f"{stage}.flags": tiny, f"{stage}.steps": STEPS} | made
    return [
        "--config=configs/pipeline.py",
        *(f"--config.{key}={value}" for key, value in made.items()),
    ]


def test_a_dry_run_prints_the_commands_and_writes_nothing(flags, home, capsys):
    before = sorted(home.rglob("*"))
    assert pipeline.main([*flags, "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    *commands, page = lines
    assert [line.split()[3] for line in commands] == ["corpus", *["train", "evaluate"] * 5]
    assert all(line.startswith("python -m lm ") for line in commands)
    assert page.startswith("python -m experiments.verdicts --runs=")
    assert sorted(home.rglob("*")) == before


@pytest.fixture(scope="module")
def made(flags, home):
    """The folder of all that the command makes."""
    assert pipeline.main(flags) == 0
    return home / "runs"


@pytest.mark.slow
def test_own_texts_and_pairs_become_five_runs_and_a_page(made):
    page = (made / "report.html").read_text()
    assert "<h1>Of our own</h1>" in page
    assert "student beats the same student trained without a teacher, at equal updates (4)" in page
    for name in pipeline.RUNS:
        figures = json.loads((made / name / "evaluate.json").read_text())
        assert f"<th scope=row>{name}, seed 0</th>" in page and repr(figures["nats"]) in page
        taught = "teacher/forward_kl" in (made / name / "metrics.jsonl").read_text()
        assert taught == (name == "distill")


def test_the_student_has_the_same_size_with_its_teacher_and_without(made):
    models = {name: runs.read_run(made / name).model for name in pipeline.RUNS}
    assert models["distill"] == models["alone"] and models["finetune"] == models["scratch"]
    depths = [models[name].num_decoder_layers for name in ("pretrain", "finetune", "distill")]
    assert depths == [2, 2, 1]


def test_a_second_call_makes_nothing_anew(made, flags):
    held = lambda: {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    before = held()
    assert pipeline.main(flags) == 0
    assert held() == before


def test_it_ends_with_the_code_of_the_first_command_that_fails(flags, home, tmp_path, capsys):
    away = [f"--config.corpus={home}/none/*.txt", f"--config.workdir={tmp_path}/runs"]
    assert pipeline.main([*flags, *away]) == 2
    assert "[1/11" in (said := capsys.readouterr().err) and "[2/11" not in said
