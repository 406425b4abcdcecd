"""Laws of predict: a file of inputs to a file of answers, in order, whole, whatever interrupts."""

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
TURNS = {"source": "own.jsonl", "inputs": "reply: {said}", "targets": "{said}", "turns": "said"}
CHUNK = 16  # of a batch of 2


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    with pytest.MonkeyPatch.context() as patch:
        two = lambda config: parallel.make_strategy(parallel.ParallelConfig(data=2))
        patch.setattr(parallel, "reading_strategy", two)
        yield


@pytest.fixture(scope="module")
def make_workdir(tiny_config, tmp_path_factory):
    """(task=, tasks=..) -> the workdir of a run of random parameters, made once."""
    made = {}

    def make(task="docstring_summary", own=None, **changes):
        given = {"data.task": "docstring_summary", "stage": "finetune", "data.batch_size": 2}
        config = tiny_config(**given | {"data.target_length": 8} | changes)
        config["data"] |= {"task": task, "custom_tasks": own or {}}
        if "," in task:
            mixture = tuple((name, None) for name in task.split(","))
            config["data"] |= {"task": "", "mixture": mixture}
        key = json.dumps([task, own, changes])
        if key not in made:
            made[key] = tmp_path_factory.mktemp("predict") / "run"
            untrained.write(config, made[key])
        return made[key]

    return make


@pytest.fixture(scope="module")
def workdir(make_workdir):
    return make_workdir()


@pytest.fixture(scope="module")
def narrow(make_workdir):
    """The workdir of a run with a single bucket of lengths."""
    return make_workdir(**{"data.input_length": 16})


@pytest.fixture
def echo(monkeypatch):
    """A model that says how many ids it was asked; the number of each input it was asked."""
    asked = []

    def ask(self, ids, first=0, tick=lambda count: None):
        asked.extend(range(first, first + len(ids)))
        return [([f"{len(row)} ids"], [0.0]) for row in ids]

    monkeypatch.setattr(generate.Generator, "generate", ask)
    return asked


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_a_line_is_its_row_with_the_answer_in_order(narrow, tmp_path):
    out = tmp_path / "out.jsonl"
    inference.predict(narrow, ROWS, str(out))
    rows = rows_of(out)
    assert [(row["inputs"], row["id"]) for row in rows] == [(r["inputs"], r["id"]) for r in ROWS]
    assert all(row.keys() == {"inputs", "prediction", "id"} for row in rows)
    alone = tmp_path / "alone.jsonl"
    inference.predict(narrow, ROWS[20:21], str(alone))
    assert rows_of(alone) == rows[20:21], "an answer is of its input alone"
    assert sorted(os.listdir(tmp_path)) == ["alone.jsonl", "out.jsonl"]


def test_several_answers_come_with_their_scores_the_best_first(narrow, capsys):
    inference.predict(narrow, ROWS[:3], decoding="beam num_beams=3 num_return_sequences=3")
    for row in map(json.loads, capsys.readouterr().out.splitlines()):
        assert row["prediction"] == row["predictions"][0]
        assert len(row["predictions"]) == 3 and row["scores"] == sorted(row["scores"])[::-1]


def test_what_is_sampled_is_the_same_in_any_call_and_another_by_another_seed(narrow, capsys):
    said = []
    for rows, seed in ((ROWS[:3], 0), (ROWS[:5], 0), (ROWS[:3], 1)):
        inference.predict(narrow, rows, decoding="sample", seed=seed)
        said.append(capsys.readouterr().out.splitlines())
    assert said[0] == said[1][:3] and not set(said[0]) & set(said[2])


# Interruptions. ----------------------------------------------------------------------------------


class Killed(BaseException):
    """The end of a process, midway."""


prediction = sys.modules["lm.inference.prediction"]


def interrupt(monkeypatch, when: int, *, torn: bool) -> None:
    """The next call is killed as it writes chunk `when`, in the middle of a line if torn."""
    add, calls = prediction.ResumableWriter.add, []

    def killed(self, rows):
        calls.append(1)
        if len(calls) == when:
            if torn:
                with open(self._part, "ab") as file:
                    file.write(b'{"inputs": "x"}\n' * 3 + b'{"inputs": "torn')
            raise Killed
        add(self, rows)

    monkeypatch.setattr(prediction.ResumableWriter, "add", killed)


@pytest.mark.parametrize("when", [1, 2, 3])
@pytest.mark.parametrize("torn", [False, True])
def test_a_killed_call_goes_on_where_it_was_and_ends_with_the_same_bytes(
    when, torn, workdir, tmp_path, echo
):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    inference.predict(workdir, ROWS, str(whole))
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, when, torn=torn)
        with pytest.raises(Killed):
            inference.predict(workdir, ROWS, str(out))
    assert not out.exists()
    echo.clear()
    inference.predict(workdir, ROWS, str(out))
    assert echo == list(range(CHUNK * (when - 1), len(ROWS))), "nothing is asked twice"
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["out.jsonl", "whole.jsonl"]


def test_an_older_answer_stays_until_the_new_one_is_whole(workdir, tmp_path, echo, monkeypatch):
    out = tmp_path / "out.jsonl"
    out.write_text("old")
    interrupt(monkeypatch, 3, torn=False)
    with pytest.raises(Killed):
        inference.predict(workdir, ROWS, str(out))
    assert out.read_text() == "old"
    assert len(rows_of(tmp_path / "out.jsonl.part")) == 2 * CHUNK


def test_two_calls_do_not_write_one_file(workdir, tmp_path, echo, capsys):
    out, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    inference.predict(workdir, ROWS, str(whole))

    class Rows(list):
        """The inputs of a call during which the same is called again."""

        def __iter__(self):
            for number, row in enumerate(ROWS):
                if number == 2 * CHUNK and out.with_name("out.jsonl.part").exists():
                    with pytest.raises(ValueError, match="is being written by another process"):
                        inference.predict(workdir, ROWS, str(out))
                    echo.append("again")
                yield row

    inference.predict(workdir, Rows(), str(out))
    assert "again" in echo and out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"rows": [*ROWS[:-1], ROWS[0]]}, "input"),
        ({"rows": ROWS[:-1]}, "input"),
        ({"decoding": "greedy min_length=2"}, "decoding"),
        ({"seed": 1}, "seed"),
        ({"step": 7}, "checkpoint"),
    ],
    ids=["another_row", "fewer_rows", "decoding", "seed", "step"],
)
def test_a_call_of_something_else_does_not_go_on_with_the_answers_of_another(
    change, what, make_workdir, tiny_config, tmp_path, echo
):
    own = {"seed": 7} if "step" in change else {}  # whose checkpoints no other test has
    workdir, out = make_workdir(**own), str(tmp_path / "out.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 2, torn=False)
        with pytest.raises(Killed):
            inference.predict(workdir, ROWS, out)
    before = (tmp_path / "out.jsonl.part").read_bytes()
    if step := change.get("step"):
        config = json.loads((workdir / "config.json").read_text())
        untrained.write(config, workdir, seed=1, step=step)
    given = {name: value for name, value in change.items() if name in ("decoding", "seed")}
    with pytest.raises(ValueError, match=f"part has 16 answers of another {what}; remove it"):
        inference.predict(workdir, change.get("rows", ROWS), out, **given)
    assert (tmp_path / "out.jsonl.part").read_bytes() == before


def test_no_more_rows_are_held_than_a_chunk(workdir, tmp_path, echo, monkeypatch):
    taken, written = [0], [0]
    add = prediction.ResumableWriter.add

    class Rows:
        def __iter__(self):
            taken[0] = 0
            for row in ROWS * 5:
                taken[0] += 1
                yield row

    def counted(self, rows):
        assert taken[0] <= written[0] + CHUNK
        written[0] += CHUNK
        add(self, rows)

    monkeypatch.setattr(prediction.ResumableWriter, "add", counted)
    inference.predict(workdir, Rows(), str(tmp_path / "out.jsonl"))
    assert len(rows_of(tmp_path / "out.jsonl")) == 5 * len(ROWS) == taken[0]


# Inputs. -----------------------------------------------------------------------------------------


def test_a_row_of_columns_is_asked_what_the_task_makes_of_it(make_workdir, echo, capsys):
    workdir = make_workdir("own", {"own": OWN})
    rows = [{"en": "kilo", "de": "x"}, {"inputs": "translate: lima"}, {"en": "mike"}]
    inference.predict(workdir, rows)
    said = capsys.readouterr()
    found = [json.loads(line) for line in said.out.splitlines()]
    assert [row["inputs"] for row in found] == [f"translate: {w}" for w in ("kilo", "lima", "mike")]
    assert found[0]["de"] == "x" and not said.err


def test_of_several_tasks_a_row_names_its_own(make_workdir, echo, capsys):
    workdir = make_workdir("own,docstring_summary", {"own": OWN})
    rows = [{"task": "docstring_summary", "body": "kilo"}, {"task": "own", "en": "kilo"}]
    inference.predict(workdir, rows)
    found = [json.loads(line)["inputs"] for line in capsys.readouterr().out.splitlines()]
    assert found == ["summarize: kilo", "translate: kilo"]
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
def test_a_row_that_cannot_be_asked_is_named_before_anything_is_written(
    row, sentence, make_workdir, tmp_path, echo
):
    workdir = make_workdir("own", {"own": OWN})
    with pytest.raises(ValueError, match=sentence):
        inference.predict(workdir, [{"en": "a"}, row], str(tmp_path / "out.jsonl"))
    assert not echo and not os.listdir(tmp_path)


def test_inputs_too_long_are_counted_in_one_warning_or_refused(workdir, tmp_path, echo, capsys):
    rows = [{"inputs": f"summarize: {'kilo ' * n}"} for n in (1, 90, 2, 80)]
    inference.predict(workdir, rows, str(tmp_path / "out.jsonl"))
    said = capsys.readouterr().err.strip().splitlines()
    cut = "lm: warning: 2 of 4 inputs were longer than the model's 32 tokens and were truncated."
    assert said == [cut]
    assert [row["prediction"] for row in rows_of(tmp_path / "out.jsonl")][1] == "32 ids"
    echo.clear()
    (tmp_path / "out.jsonl").unlink()
    with pytest.raises(ValueError, match="input 2: it is longer than the model's 32 tokens"):
        inference.predict(workdir, rows, str(tmp_path / "out.jsonl"), strict=True)
    assert not echo and not os.listdir(tmp_path)


def test_what_the_model_has_not_learnt_to_answer_is_counted_too(make_workdir, echo, capsys):
    rows = [{"inputs": "kilo"}, {"en": " "}, {"inputs": "translate: x"}]
    inference.predict(make_workdir("own", {"own": OWN}), rows)
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 3
    assert "1 of 3 inputs have an empty column" in said.err
    assert "1 of 3 inputs do not begin with 'translate: '" in said.err


@pytest.mark.parametrize(
    ("how", "nearest", "count", "names"),
    [
        ("greedy", "", 2, "prediction"),
        ("beam num_beams=2 num_return_sequences=2", "", 3, "prediction, predictions or scores"),
        ("beam num_beams=2 num_return_sequences=2", "chrf", 2, "prediction"),
    ],
)
def test_columns_that_the_answers_replace_are_counted_before(
    how, nearest, count, names, workdir, echo, capsys
):
    own = ({"prediction": "mine"}, {"scores": "mine"}, {}, {"prediction": None, "scores": "mine"})
    rows = [{"inputs": "summarize: kilo", "targets": "kilo"} | row for row in own]
    inference.predict(workdir, rows, decoding=how, nearest=nearest)
    said = capsys.readouterr()
    sentence = f"{count} of 4 inputs have their own column {names}, which is replaced"
    assert said.err == f"lm: warning: {sentence}.\n"
    found = [json.loads(line) for line in said.out.splitlines()]
    kept = "mine" if names == "prediction" else [0.0]
    assert [row["prediction"] for row in found] == [found[0]["prediction"]] * 4
    assert found[1]["scores"] == kept


def test_a_dialogue_too_long_keeps_its_latest_turns(make_workdir, monkeypatch, capsys, tiny_tokens):
    asked = []
    ask = lambda self, ids, first=0, tick=None: asked.extend(ids) or [(["x"], [0.0])] * len(ids)
    monkeypatch.setattr(generate.Generator, "generate", ask)
    turns = [f"{word} {n}" for n, word in enumerate(["kilo", "lima"] * 12)]
    inference.predict(make_workdir("own", {"own": TURNS}), [{"said": turns}])
    whole = tasks.task_from_config("own", TURNS).format_dialogue(turns)
    assert json.loads(capsys.readouterr().out)["inputs"] == whole
    text = tiny_tokens.decode(asked[0])
    assert text.startswith(("reply: user: ", "reply: system: "))
    assert whole.endswith(text.removeprefix("reply: ")) and len(asked[0]) <= 32


@pytest.mark.parametrize("suffix", [".jsonl", ".tsv", ".txt", ".jsonl.gz"])
def test_every_kind_of_file_gives_the_same_answers(suffix, workdir, tmp_path, echo):
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


# The door. ---------------------------------------------------------------------------------------


def test_a_pipe_is_read_as_a_file(workdir, echo, monkeypatch, capsys):
    lines = "summarize: kilo\n\nsummarize: caf\u00e9\u2028"
    stdin = types.SimpleNamespace(buffer=io.BytesIO(lines.encode()), isatty=lambda: False)
    monkeypatch.setattr("sys.stdin", stdin)
    assert cli.main(["predict", f"--workdir={workdir}"]) == 0
    found = [json.loads(line)["inputs"] for line in capsys.readouterr().out.split("\n") if line]
    assert found == lines.split("\n")


def test_ctrl_c_keeps_what_is_done_and_the_same_command_ends_it(
    workdir, tmp_path, echo, monkeypatch, capsys
):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = ["predict", f"--workdir={workdir}", f"--input={source}", f"--out={out}"]
    with pytest.MonkeyPatch.context() as patch:
        ask = generate.Generator.generate
        patch.setattr(
            generate.Generator, "generate", lambda *a: ask(*a) if len(echo) < 32 else stop()
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
    end, other = os.pipe()
    os.write(other, b"summarize: kilo\n")
    os.close(other)
    yield f"/dev/fd/{end}"
    os.close(end)


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
        ("--input={t}", "not a regular file, .* pipe its lines into standard input"),
        ("--input={p}", "not a regular file, .* pipe its lines into standard input"),
        ("--text=x --decoding='greedy min_length=9'", "min_length=9 is more than"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    line, sentence, workdir, tmp_path, pipe, capsys
):
    (tmp_path / "bad.jsonl").write_text('{"inputs": "summarize: x"}\n{\n')
    line = line.format(t=tmp_path, n=tmp_path.name, p=pipe)
    flags = [flag.replace("='", "=").strip("'") for flag in re.split(r" (?=--)", line)]
    if not any("--out" in flag for flag in flags):
        flags.append(f"--out={tmp_path}/out.jsonl")
    assert cli.main(["predict", f"--workdir={workdir}", *flags]) == 2
    said = [row for row in capsys.readouterr().err.splitlines() if "warning" not in row]
    assert len(said) == 1 and re.search(sentence, said[0]), said
    assert os.listdir(tmp_path) == ["bad.jsonl"]
