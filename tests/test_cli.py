"""Laws of the command line: from text to a report by commands, one sentence for every error."""

from __future__ import annotations

import json
import pathlib
import re
import shutil

import jax
import pytest

from lm import cli
from lm.cli import commands, flags
from tests import tiny_runs


def lm(command: str, *flags: str) -> int:
    return cli.main([command, *flags])


@pytest.fixture(scope="module")
def pretrained(tiny_config, tmp_path_factory):
    """A workdir pre-trained by the command line."""
    workdir = tmp_path_factory.mktemp("cli") / "pretrain"
    flags = tiny_runs.as_flags(tiny_config(**{"parallel.data": 1}))
    assert lm("train", "--config=configs/base.py", *flags, f"--workdir={workdir}") == 0
    return workdir


@pytest.fixture(scope="module")
def finetuned(pretrained, tiny_config):
    """A workdir fine-tuned from it, on pairs."""
    workdir = pretrained.parent / "finetune"
    changes = {"stage": "finetune", "init_from": str(pretrained), "data.task": "docstring_summary"}
    flags = tiny_runs.as_flags(
        tiny_config(**changes | {"parallel.data": 1, "model.dropout_rate": 0.1})
    )
    assert lm("train", "--config=configs/base.py", *flags, f"--workdir={workdir}") == 0
    return workdir


def test_a_run_is_evaluated_once_for_a_checkpoint(pretrained, capsys):
    assert lm("evaluate", f"--workdir={pretrained}") == 0
    first = json.loads(capsys.readouterr().out)
    written = (pretrained / "evaluate.json").stat().st_mtime_ns
    assert lm("evaluate", f"--workdir={pretrained}") == 0
    assert json.loads(capsys.readouterr().out) == first
    assert (pretrained / "evaluate.json").stat().st_mtime_ns == written


def test_a_run_is_evaluated_again_on_more_examples(pretrained, tmp_path, capsys):
    copy = shutil.copytree(pretrained, tmp_path / "run")
    config = json.loads((copy / "config.json").read_text())
    tokens = []
    for examples in (8, 16):
        config["evaluate"]["max_examples"] = examples
        (copy / "config.json").write_text(json.dumps(config))
        assert lm("evaluate", f"--workdir={copy}") == 0
        tokens.append(json.loads(capsys.readouterr().out)["tokens"])
    assert tokens[0] < tokens[1]


def test_evaluation_repeats_the_last_held_out_loss_of_training(pretrained):
    lm("evaluate", f"--workdir={pretrained}")
    rows = [json.loads(line) for line in (pretrained / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["split"] == "heldout"][-1]
    scores = json.loads((pretrained / "evaluate.json").read_text())
    assert scores["step"] == last["step"] == 6
    assert scores["nats"] == pytest.approx(last["nats"], rel=1e-6)


def test_every_checkpoint_can_be_evaluated(pretrained, tmp_path, capsys):
    copy = shutil.copytree(pretrained, tmp_path / "run")
    for step, number in {"3": 3, "newest": 6}.items():
        assert lm("evaluate", f"--workdir={copy}", f"--step={step}") == 0
        assert json.loads(capsys.readouterr().out)["step"] == number
    for step, sentence in {"4": "there is no checkpoint 4 .* 3, 6", "bets": "mean 'best'"}.items():
        assert lm("evaluate", f"--workdir={copy}", f"--step={step}") == 2
        assert re.search(sentence, capsys.readouterr().err)


def test_answers_keep_the_order_and_number_of_inputs(finetuned, tmp_path, capsys):
    source, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    inputs = [f"summarize: kilo lima {i}" for i in range(11)]
    source.write_text("\n".join(inputs) + "\n")
    assert lm("predict", f"--workdir={finetuned}", f"--input={source}", f"--out={out}") == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["inputs"] for row in rows] == inputs
    capsys.readouterr()
    assert lm("predict", f"--workdir={finetuned}", f"--text={inputs[7]}") == 0
    assert json.loads(capsys.readouterr().out) == rows[7], "an answer depends on its input alone"


def test_only_newlines_separate_inputs(finetuned, tmp_path, capsys):
    source = tmp_path / "lines.txt"
    inputs = ["a\u2028b", "", "\x0c form", "caf\u00e9"]
    source.write_bytes("\n".join(inputs).encode() + b"\n")
    assert lm("predict", f"--workdir={finetuned}", f"--input={source}") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]
    assert [row["inputs"] for row in rows] == inputs


def test_a_run_is_not_read_with_another_tokenizer(pretrained, tiny_config, tmp_path, capsys):
    copy = shutil.copytree(pretrained, tmp_path / "run")
    from lm import tokenizer

    texts = ["other words make other pieces " * 20, "and yet as many of them " * 20]
    tokenizer.train(texts, tmp_path / "other", vocab_size=280, num_extra_ids=10)
    facts = (tmp_path / "other" / "tokenizer.json").read_text()
    for name in ("tokenizer.model", "tokenizer.json"):
        shutil.copy(tmp_path / "other" / name, copy / "tokenizer" / name)
    assert facts != (pretrained / "tokenizer" / "tokenizer.json").read_text()
    for command in (["evaluate"], ["predict", "--text=x"]):
        assert lm(*command, f"--workdir={copy}") == 2
        assert "was trained with another tokenizer" in capsys.readouterr().err


def test_a_run_trained_on_one_device_is_read_on_eight(finetuned, capsys):
    assert len(jax.devices()) == 8
    assert json.loads((finetuned / "config.json").read_text())["parallel"]["data"] == 1
    assert lm("predict", f"--workdir={finetuned}", "--text=kilo") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_report_shows_every_run(pretrained, finetuned, tmp_path):
    page = tmp_path / "page.html"
    lm("evaluate", f"--workdir={finetuned}")
    lm("evaluate", f"--workdir={pretrained}")
    assert lm("report", f"--runs={pretrained.parent}/*", f"--out={page}") == 0
    scores = json.loads((finetuned / "evaluate.json").read_text())
    text = page.read_text()
    assert f"{scores['nats']:.3f}" in text and "pretrain" in text
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", text), "not self-contained"


def test_show_prints_inputs_and_targets_with_matching_sentinels(tiny_config, tmp_path, capsys):
    flags = tiny_runs.as_flags(tiny_config())
    command = ("--config=configs/base.py", *flags, f"--workdir={tmp_path}", "--rows=2")
    assert lm("show", *command) == 0
    output = capsys.readouterr().out
    assert output.count("encoder sees") == output.count("decoder must say") == 2
    encoder, decoder = re.split(r"--- .*\n", output)[1:3]
    blanks = re.findall(r"<extra_id_\d+>", encoder)
    assert blanks and blanks == re.findall(r"<extra_id_\d+>", decoder)


def test_show_uses_the_config_of_a_claimed_workdir_and_refuses_another(
    pretrained, tiny_config, capsys
):
    assert lm("show", f"--workdir={pretrained}", "--step=2", "--rows=1") == 0
    output = capsys.readouterr().out
    command = ["show", "--config=configs/base.py", f"--workdir={pretrained}", "--step=2"]
    assert lm(*command, "--rows=1", *tiny_runs.as_flags(tiny_config(**{"parallel.data": 1}))) == 0
    assert capsys.readouterr().out == output and "encoder sees" in output
    assert lm(*command, *tiny_runs.as_flags(tiny_config(seed=5))) == 2
    assert "seed (here 5, there 0)" in capsys.readouterr().err


def test_the_counts_of_show_model_add_up(tiny_config, tmp_path, capsys):
    flags = tiny_runs.as_flags(tiny_config())
    lm("show", "--config=configs/base.py", *flags, f"--workdir={tmp_path}", "--model")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    *parameters, total = [row for row in rows if row[-1].endswith("%")]
    counts = [int(row[-2].replace(",", "")) for row in parameters]
    assert sum(counts) == int(total[1].replace(",", ""))


@pytest.mark.parametrize(
    ("length", "plan"),
    [(dict(steps=7), 7), ({"steps": 0, "duration.epochs": 2.0}, 0)],
    ids=str,
)
def test_dry_run_prints_the_config_and_the_plan_and_writes_nothing(
    length, plan, tiny_config, tmp_path, capsys
):
    flags = tiny_runs.as_flags(tiny_config(**{"steps": 0} | length))
    workdir = tmp_path / "dry"
    assert lm("train", "--config=configs/base.py", *flags, f"--workdir={workdir}", "--dry_run") == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["steps"] == length.get("steps", 0)
    assert json.loads(output.err or '{"planned_updates": 0}')["planned_updates"] == plan
    assert not workdir.exists()


@pytest.mark.parametrize(("name", "code"), [("Unfinished", 75), ("Diverged", 3)])
def test_an_unfinished_run_has_a_message_and_an_exit_code(
    name, code, tiny_config, tmp_path, capsys, monkeypatch
):
    from lm import train

    def stop(*arguments, **options):
        raise getattr(train, name)("the reason.")

    monkeypatch.setattr(train, "train", stop)
    flags = tiny_runs.as_flags(tiny_config())
    assert lm("train", "--config=configs/base.py", *flags, f"--workdir={tmp_path}") == code
    assert capsys.readouterr().err == "lm: the reason.\n"


PRETRAIN = "train --config=configs/pretrain.py --workdir={w}"
MISTAKES = {
    "trian": "'trian' is unknown; .* did you mean 'train'?",
    "train --workdir={w}": "`train` needs --config=",
    "train --config=configs/nothing.py --workdir={w}": "No such file .*configs/nothing.py",
    "train --config=configs/pretrain.py:tny --workdir={w}": "'tny' is unknown; .* 'tiny'",
    f"{PRETRAIN} --config.model.num_head=3": "no key 'num_head'; did you mean 'num_heads'?",
    f"{PRETRAIN} --config.steps=1.5": "--config.steps=1.5 is not a whole number; write",
    f"{PRETRAIN} --config.guard=5": "--config.guard=5 is a whole section; set one of its keys",
    f"{PRETRAIN} --profile=9:3": "--profile=9:3 is not a range of updates; write it as 10:15.",
    f"{PRETRAIN} --hosts=2": "pass all of --coordinator, --hosts and --host, or none",
    f"{PRETRAIN} --workdri=x": "'workdri'. Did you mean: workdir",
    f"{PRETRAIN} stray": "does not take 'stray'",
    f"{PRETRAIN} --config.model.num_kv_heads=3": "num_heads=4 is not a multiple of .*=3; use",
    f"{PRETRAIN} --config.model.vocab_size=300": "300 is smaller than .* 3968 .* use 4096",
    f"{PRETRAIN} --config.tokenizer.num_extra_ids=3": "needs \\d+ sentinels, .*num_extra_ids=3",
    f"{PRETRAIN} --config.optimizer.learning_rate=nan": "learning_rate=nan is out of bounds",
    f"{PRETRAIN} --config.steps=0": "steps=0 and duration=.* set no length",
    f"{PRETRAIN} --config.objective.name=mlm": "'mlm' is unknown; choose one of deshuffling",
    f"{PRETRAIN} --config.parallel.fsdp=2": "use parallel.strategy='mesh'",
    f"{PRETRAIN} --config.data.tfds_dir={{w}}": "pydocs is not in .*python -m lm corpus",
    "train --config=configs/distill.py --workdir={w}": "needs a teacher; set teacher.workdir",
    "train --config=configs/finetune.py --workdir={w} --config.init_from={w}": "holds no run",
    "train --config=configs/demo.py --workdir={w}": "the config has .* key",
    "predict --workdir={w} --text=x": "holds no run",
    "report --runs={w}/*": "names no run folder",
}


def test_a_user_error_is_one_sentence_and_leaves_no_file(tmp_path, capsys):
    workdir, faults = tmp_path / "run", []
    for line, sentence in MISTAKES.items():
        code = cli.main(line.format(w=workdir).split())
        errors = capsys.readouterr().err.strip().splitlines()
        is_sentence = len(errors) == 1 and errors[0].startswith("lm: ")
        if code != 2 or not is_sentence or not re.search(sentence, errors[0]) or workdir.exists():
            faults.append((line, code, errors))
    assert not faults


def test_training_in_the_workdir_of_another_config_names_the_keys_that_differ(
    pretrained, tiny_config, capsys
):
    flags = tiny_runs.as_flags(
        tiny_config(**{"parallel.data": 1, "seed": 5, "optimizer.learning_rate": 0.5})
    )
    assert lm("train", "--config=configs/base.py", *flags, f"--workdir={pretrained}") == 2
    error = capsys.readouterr().err
    assert "optimizer.learning_rate (here 0.5, there 0.01), seed (here 5, there 0)" in error


def test_lm_traceback_keeps_the_traceback(monkeypatch, tmp_path):
    monkeypatch.setenv("LM_TRACEBACK", "1")
    with pytest.raises(ValueError, match="holds no run"):
        lm("predict", f"--workdir={tmp_path}", "--text=x")


def test_every_command_has_help(capsys):
    for name, (_, takes) in cli.COMMANDS.items():
        assert lm(name, "--help") == 0
        text = capsys.readouterr().out.lower()
        assert [flag for flag in takes if flag.strip("?") not in text] == [], name
        assert f"  {name} " in cli.overview()


def test_readme_lists_the_commands_of_the_help():
    readme = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
    (line,) = re.findall(r"^python -m lm --help +# (.*)$", readme, re.M)
    assert line.split() == list(cli.COMMANDS)


def test_a_renamed_flag_is_refused_with_its_new_name(capsys):
    assert {"examples", "heldout", "pieces"} <= flags.RENAMED.keys()
    for old, new in flags.RENAMED.items():
        takers = [
            command
            for command, (_, names) in commands.COMMANDS.items()
            if new in {name.removesuffix("?") for name in names}
        ]
        for command in takers:
            assert cli.main([command, f"--{old}=1"]) == 2
            assert f"does not take --{old}; it is now --{new}." in capsys.readouterr().err
        assert takers, old
