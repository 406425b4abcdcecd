"""Laws of predict: answers in order, resumption after interruptions, inputs, errors."""

from __future__ import annotations

import io
import json
import os
import re
import sys
import types

import pytest

from lm import cli, exits, inference, parallel, tasks
from lm.inference import generate
from tests import untrained

ROWS = [{"inputs": f"summarize: {'kilo ' * (i % 9)}lima {i}", "id": i} for i in range(37)]
OWN = {"source": "own.jsonl", "inputs": "translate: {en}", "targets": "{de}", "metrics": ["bleu"]}
TURNS = {
    "source": "own.jsonl",
    "inputs": "reply: {output}",
    "targets": "{output}",
    "turns": "output",
}
CHUNK = 16  # of a batch of 2


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    with pytest.MonkeyPatch.context() as patch:
        strategy = lambda config: parallel.make_strategy(parallel.ParallelConfig(data=2))
        patch.setattr(parallel, "reading_strategy", strategy)
        yield


@pytest.fixture(scope="module")
def make_workdir(tiny_config, tmp_path_factory):
    """A function of (task, custom tasks, config changes) -> workdir of an untrained run; cached."""
    workdirs = {}

    def make(task="docstring_summary", own=None, **changes):
        defaults = {"data.task": "docstring_summary", "stage": "finetune", "data.batch_size": 2}
        config = tiny_config(**defaults | {"data.target_length": 8} | changes)
        config["data"] |= {"task": task, "custom_tasks": own or {}}
        if "," in task:
            mixture = tuple((name, None) for name in task.split(","))
            config["data"] |= {"task": "", "mixture": mixture}
        key = json.dumps([task, own, changes])
        if key not in workdirs:
            workdirs[key] = tmp_path_factory.mktemp("predict") / "run"
            untrained.write(config, workdirs[key])
        return workdirs[key]

    return make


@pytest.fixture(scope="module")
def workdir(make_workdir):
    return make_workdir()


@pytest.fixture(scope="module")
def narrow(make_workdir):
    """The workdir of a run with one bucket of lengths."""
    return make_workdir(**{"data.input_length": 16})


@pytest.fixture
def echo(monkeypatch):
    """Replaces the model: answers are numbers of ids. Returns the numbers of the decoded inputs."""
    numbers = []

    def count_ids(self, ids, first=0, on_batch=lambda count: None):
        numbers.extend(range(first, first + len(ids)))
        return [([f"{len(row)} ids"], [0.0]) for row in ids]

    monkeypatch.setattr(generate.Generator, "generate", count_ids)
    return numbers


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_lines_are_rows_with_answers_in_order(narrow, tmp_path):
    out = tmp_path / "out.jsonl"
    inference.predict(narrow, ROWS, str(out))
    rows = rows_of(out)
    assert [(row["inputs"], row["id"]) for row in rows] == [(r["inputs"], r["id"]) for r in ROWS]
    assert all(row.keys() == {"inputs", "prediction", "id"} for row in rows)
    alone = tmp_path / "alone.jsonl"
    inference.predict(narrow, ROWS[20:21], str(alone))
    assert rows_of(alone) == rows[20:21], "an answer depends on its input only"
    assert sorted(os.listdir(tmp_path)) == ["alone.jsonl", "out.jsonl"]


def test_several_answers_have_scores_and_are_sorted(narrow, capsys):
    inference.predict(narrow, ROWS[:3], decoding="beam num_beams=3 num_return_sequences=3")
    for row in map(json.loads, capsys.readouterr().out.splitlines()):
        assert row["prediction"] == row["predictions"][0]
        assert len(row["predictions"]) == 3 and row["scores"] == sorted(row["scores"])[::-1]


def test_samples_depend_on_the_seed_and_not_on_the_call(narrow, capsys):
    outputs = []
    for rows, seed in ((ROWS[:3], 0), (ROWS[:5], 0), (ROWS[:3], 1)):
        inference.predict(narrow, rows, decoding="sample", seed=seed)
        outputs.append(capsys.readouterr().out.splitlines())
    assert outputs[0] == outputs[1][:3] and not set(outputs[0]) & set(outputs[2])


# Interruptions. ----------------------------------------------------------------------------------


class Killed(BaseException):
    """Simulates a killed process."""


prediction = sys.modules["lm.inference.prediction"]


def interrupt(monkeypatch, when: int, *, torn: bool) -> None:
    """Kill the next call when it writes chunk `when`, within a line if torn."""
    add, calls = prediction.ResumableWriter.add, []

    def add_or_kill(self, rows):
        calls.append(1)
        if len(calls) == when:
            if torn:
                with open(self._temporary, "ab") as file:
                    file.write(b'{"inputs": "x"}\n' * 3 + b'{"inputs": "torn')
            raise Killed
        add(self, rows)

    monkeypatch.setattr(prediction.ResumableWriter, "add", add_or_kill)


@pytest.mark.parametrize("when", [1, 2, 3])
@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_call_resumes_and_ends_with_the_same_bytes(when, torn, workdir, tmp_path, echo):
    expected, out = tmp_path / "expected.jsonl", tmp_path / "out.jsonl"
    inference.predict(workdir, ROWS, str(expected))
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, when, torn=torn)
        with pytest.raises(Killed):
            inference.predict(workdir, ROWS, str(out))
    assert not out.exists()
    echo.clear()
    inference.predict(workdir, ROWS, str(out))
    assert echo == list(range(CHUNK * (when - 1), len(ROWS))), "no input is decoded twice"
    assert out.read_bytes() == expected.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["expected.jsonl", "out.jsonl"]


def test_an_existing_file_is_replaced_only_at_the_end(workdir, tmp_path, echo, monkeypatch):
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    interrupt(monkeypatch, 3, torn=False)
    with pytest.raises(Killed):
        inference.predict(workdir, ROWS, str(out))
    assert out.read_text() == "old"
    assert len(rows_of(tmp_path / "out.jsonl.part")) == 2 * CHUNK


def test_two_calls_cannot_write_the_same_file(workdir, tmp_path, echo, capsys):
    out, expected = tmp_path / "out.jsonl", tmp_path / "expected.jsonl"
    inference.predict(workdir, ROWS, str(expected))

    class Rows(list):
        """Inputs that start a second call while they are read."""

        def __iter__(self):
            for number, row in enumerate(ROWS):
                if number == 2 * CHUNK and out.with_name("out.jsonl.part").exists():
                    with pytest.raises(ValueError, match="is being written by another process"):
                        inference.predict(workdir, ROWS, str(out))
                    echo.append("again")
                yield row

    inference.predict(workdir, Rows(), str(out))
    assert "again" in echo and out.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(
    ("change", "dependency"),
    [
        ({"rows": [*ROWS[:-1], ROWS[0]]}, "input"),
        ({"rows": ROWS[:-1]}, "input"),
        ({"decoding": "greedy min_length=2"}, "decoding"),
        ({"seed": 1}, "seed"),
        ({"step": 7}, "checkpoint"),
    ],
    ids=["another_row", "fewer_rows", "decoding", "seed", "step"],
)
def test_a_call_with_other_dependencies_does_not_resume(
    change, dependency, make_workdir, tiny_config, tmp_path, echo
):
    changes = {"seed": 7} if "step" in change else {}  # a workdir that no other test uses
    workdir, out = make_workdir(**changes), str(tmp_path / "out.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 2, torn=False)
        with pytest.raises(Killed):
            inference.predict(workdir, ROWS, out)
    before = (tmp_path / "out.jsonl.part").read_bytes()
    if step := change.get("step"):
        config = json.loads((workdir / "config.json").read_text())
        untrained.write(config, workdir, seed=1, step=step)
    options = {name: value for name, value in change.items() if name in ("decoding", "seed")}
    with pytest.raises(ValueError, match=f"part has 16 answers of another {dependency}; remove it"):
        inference.predict(workdir, change.get("rows", ROWS), out, **options)
    assert (tmp_path / "out.jsonl.part").read_bytes() == before


def test_memory_holds_one_chunk_of_rows(workdir, tmp_path, echo, monkeypatch):
    num_read, num_written = [0], [0]
    add = prediction.ResumableWriter.add

    class Rows:
        def __iter__(self):
            num_read[0] = 0
            for row in ROWS * 5:
                num_read[0] += 1
                yield row

    def count(self, rows):
        assert num_read[0] <= num_written[0] + CHUNK
        num_written[0] += CHUNK
        add(self, rows)

    monkeypatch.setattr(prediction.ResumableWriter, "add", count)
    inference.predict(workdir, Rows(), str(tmp_path / "out.jsonl"))
    assert len(rows_of(tmp_path / "out.jsonl")) == 5 * len(ROWS) == num_read[0]


# Inputs. -----------------------------------------------------------------------------------------


def test_a_row_without_inputs_fills_the_template_of_the_task(make_workdir, echo, capsys):
    workdir = make_workdir("own", {"own": OWN})
    rows = [{"en": "kilo", "de": "x"}, {"inputs": "translate: lima"}, {"en": "mike"}]
    inference.predict(workdir, rows)
    output = capsys.readouterr()
    lines = [json.loads(line) for line in output.out.splitlines()]
    assert [row["inputs"] for row in lines] == [f"translate: {w}" for w in ("kilo", "lima", "mike")]
    assert lines[0]["de"] == "x" and not output.err


def test_a_row_names_its_task_if_there_are_several(make_workdir, echo, capsys):
    workdir = make_workdir("own,docstring_summary", {"own": OWN})
    rows = [{"task": "docstring_summary", "body": "kilo"}, {"task": "own", "en": "kilo"}]
    inference.predict(workdir, rows)
    lines = [json.loads(line)["inputs"] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["summarize: kilo", "translate: kilo"]
    with pytest.raises(ValueError, match="input 1: .*no 'task': one of own, docstring_summary"):
        inference.predict(workdir, [{"en": "kilo"}])


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"eng": "kilo"}, "input 2: it has no column 'en', .* it has eng; did you mean 'eng'"),
        ({"inputs": 7}, "input 2: its 'inputs' are int, not text"),
        ({}, "input 2: it has no column 'en'"),
    ],
)
def test_a_row_without_an_input_raises_before_anything_is_written(
    row, sentence, make_workdir, tmp_path, echo
):
    workdir = make_workdir("own", {"own": OWN})
    with pytest.raises(ValueError, match=sentence):
        inference.predict(workdir, [{"en": "a"}, row], str(tmp_path / "out.jsonl"))
    assert not echo and not os.listdir(tmp_path)


def test_long_inputs_are_counted_in_one_warning_or_refused(workdir, tmp_path, echo, capsys):
    rows = [{"inputs": f"summarize: {'kilo ' * n}"} for n in (1, 90, 2, 80)]
    inference.predict(workdir, rows, str(tmp_path / "out.jsonl"))
    actual = capsys.readouterr().err.strip()
    expected = "2 of 4 inputs were longer than the model's 32 tokens and were truncated."
    assert actual == f"lm: warning: {expected}"
    assert [row["prediction"] for row in rows_of(tmp_path / "out.jsonl")][1] == "32 ids"
    echo.clear()
    (tmp_path / "out.jsonl").unlink()
    with pytest.raises(ValueError, match="input 2: it is longer than the model's 32 tokens"):
        inference.predict(workdir, rows, str(tmp_path / "out.jsonl"), strict=True)
    assert not echo and not os.listdir(tmp_path)


def test_empty_inputs_and_missing_prefixes_are_counted_in_warnings(make_workdir, echo, capsys):
    rows = [{"inputs": "kilo"}, {"en": " "}, {"inputs": "translate: x"}]
    inference.predict(make_workdir("own", {"own": OWN}), rows)
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 3
    assert "1 of 3 inputs have an empty column" in output.err
    assert "1 of 3 inputs do not begin with 'translate: '" in output.err


@pytest.mark.parametrize(
    ("decoding", "nearest", "count", "names"),
    [
        ("greedy", "", 2, "prediction"),
        ("beam num_beams=2 num_return_sequences=2", "", 3, "prediction, predictions or scores"),
        ("beam num_beams=2 num_return_sequences=2", "chrf", 2, "prediction"),
    ],
)
def test_columns_that_the_answers_replace_are_counted_in_a_warning(
    decoding, nearest, count, names, workdir, echo, capsys
):
    columns = (
        {"prediction": "mine"},
        {"scores": "mine"},
        {},
        {"prediction": None, "scores": "mine"},
    )
    rows = [{"inputs": "summarize: kilo", "targets": "kilo"} | row for row in columns]
    inference.predict(workdir, rows, decoding=decoding, nearest=nearest)
    output = capsys.readouterr()
    sentence = f"{count} of 4 inputs have a column {names}, which is replaced"
    assert output.err == f"lm: warning: {sentence}.\n"
    lines = [json.loads(line) for line in output.out.splitlines()]
    scores = "mine" if names == "prediction" else [0.0]
    assert [row["prediction"] for row in lines] == [lines[0]["prediction"]] * 4
    assert lines[1]["scores"] == scores


def test_a_long_dialogue_keeps_its_latest_turns(make_workdir, monkeypatch, capsys, tiny_tokens):
    inputs = []
    record = lambda self, ids, *_: inputs.extend(ids) or [(["x"], [0.0])] * len(ids)
    monkeypatch.setattr(generate.Generator, "generate", record)
    turns = [f"{word} {n}" for n, word in enumerate(["kilo", "lima"] * 12)]
    inference.predict(make_workdir("own", {"own": TURNS}), [{"output": turns}])
    dialogue = tasks.task_from_config("own", TURNS).format_dialogue(turns)
    assert json.loads(capsys.readouterr().out)["inputs"] == dialogue
    text = tiny_tokens.decode(inputs[0])
    assert text.startswith(("reply: user: ", "reply: system: "))
    assert dialogue.endswith(text.removeprefix("reply: ")) and len(inputs[0]) <= 32


@pytest.mark.parametrize("suffix", [".jsonl", ".tsv", ".txt", ".jsonl.gz"])
def test_all_kinds_of_files_give_the_same_answers(suffix, workdir, tmp_path, echo):
    import gzip

    source, out = tmp_path / f"in{suffix}", tmp_path / "out.jsonl"
    if suffix == ".tsv":
        lines = ["inputs\tid", *(f"{row['inputs']}\t{row['id']}" for row in ROWS)]
    else:
        lines = [row["inputs"] if suffix == ".txt" else json.dumps(row) for row in ROWS]
    data = "".join(f"{line}\n" for line in lines).encode()
    source.write_bytes(gzip.compress(data) if suffix == ".jsonl.gz" else data)
    assert cli.main(["predict", f"--workdir={workdir}", f"--input={source}", f"--out={out}"]) == 0
    rows = rows_of(out)
    assert [row["inputs"] for row in rows] == [row["inputs"] for row in ROWS]
    ids = [row.get("id") for row in rows]
    assert ids == ([None] * 37 if suffix == ".txt" else [type(ids[0])(n) for n in range(37)])


# The command line. -------------------------------------------------------------------------------


def test_standard_input_is_read_as_lines(workdir, echo, monkeypatch, capsys):
    lines = "summarize: kilo\n\nsummarize: caf\u00e9\u2028"
    stdin = types.SimpleNamespace(buffer=io.BytesIO(lines.encode()), isatty=lambda: False)
    monkeypatch.setattr("sys.stdin", stdin)
    assert cli.main(["predict", f"--workdir={workdir}"]) == 0
    actual = [json.loads(line)["inputs"] for line in capsys.readouterr().out.split("\n") if line]
    assert actual == lines.split("\n")


def test_after_ctrl_c_the_same_command_resumes(workdir, tmp_path, echo, monkeypatch, capsys):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = ["predict", f"--workdir={workdir}", f"--input={source}", f"--out={out}"]
    with pytest.MonkeyPatch.context() as patch:
        decode = generate.Generator.generate
        patch.setattr(
            generate.Generator, "generate", lambda *a: decode(*a) if len(echo) < 32 else stop()
        )
        assert cli.main(command) == exits.UNFINISHED
    assert "run the same command again" in capsys.readouterr().err
    echo.clear()
    assert cli.main(command) == 0
    assert echo == list(range(32, 37)) and len(rows_of(out)) == 37


def stop():
    raise KeyboardInterrupt


@pytest.fixture
def pipe():
    """The path of a pipe with a line in it."""
    read_end, write_end = os.pipe()
    os.write(write_end, b"summarize: kilo\n")
    os.close(write_end)
    yield f"/dev/fd/{read_end}"
    os.close(read_end)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--text=x --input=y", "--text and --input exclude each other"),
        ("--input={t}/none.jsonl", "none.jsonl cannot be read"),
        ("--input={t}/none.txt", "none.txt cannot be read"),
        ("--input={t}/bad.jsonl", "line 2 of .*bad.jsonl cannot be read: invalid JSON"),
        ("--text=x --decoding=gready", "'gready' is unknown.*mean 'greedy'"),
        ("--input={t}/none.csv", "none.csv is neither JSONL nor TSV; .* ends in .jsonl or .tsv"),
        ("--input={t}/none.CSV.gz", "none.CSV.gz is neither JSONL nor TSV; use"),
        ("--input={t}/none.parquet", "none.parquet is neither JSONL nor TSV; use"),
        (
            "--text=x --out={t}/no/out.jsonl",
            "--out=.* is in a folder that does not exist; create it",
        ),
        (
            "--text=x --out={t}/bad.jsonl/o",
            "--out=.* is in a folder that does not exist; create it",
        ),
        ("--text=x --out={t}", "--out=.* is a folder; name a file"),
        (
            "--input={t}/bad.jsonl --out={t}/../{n}/bad.jsonl",
            "is the input file and would replace it",
        ),
        ("--input={t}", "not a regular file and .* pipe its lines into standard input"),
        ("--input={p}", "not a regular file and .* pipe its lines into standard input"),
        ("--text=x --decoding='greedy min_length=9'", "min_length=9 is more than"),
    ],
)
def test_an_error_is_one_sentence_and_leaves_no_files(
    line, sentence, workdir, tmp_path, pipe, capsys
):
    (tmp_path / "bad.jsonl").write_text('{"inputs": "summarize: x"}\n{\n')
    line = line.format(t=tmp_path, n=tmp_path.name, p=pipe)
    flags = [flag.replace("='", "=").strip("'") for flag in re.split(r" (?=--)", line)]
    if not any("--out" in flag for flag in flags):
        flags.append(f"--out={tmp_path}/out.jsonl")
    assert cli.main(["predict", f"--workdir={workdir}", *flags]) == 2
    errors = [row for row in capsys.readouterr().err.splitlines() if "warning" not in row]
    assert len(errors) == 1 and re.search(sentence, errors[0]), errors
    assert os.listdir(tmp_path) == ["bad.jsonl"]
