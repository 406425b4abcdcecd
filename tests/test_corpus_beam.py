"""The Beam runner writes the bytes of local processes; its errors are one line.

Tests that run Beam use its own environment (`make beam`), and are skipped without it.
"""

from __future__ import annotations

import collections
import json
import pathlib
import random
import re
import subprocess

import numpy as np
import pytest

from lm import cli
from lm.corpus import beam, build, dedupe, documents, runners
from tests import dump

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
PYTHON = ROOT / ".venv" / "beam" / "bin" / "python"
SIZES = {"vocab_size": 500, "heldout_fraction": 0.2}
PROCESSES = "--direct_num_workers=2 --direct_running_mode=multi_processing"

needs_beam = pytest.mark.skipif(
    not (PYTHON.parents[1] / ".ready").exists(), reason="needs `make beam`"
)


def contents(directory) -> dict[str, bytes]:
    paths = (path for path in pathlib.Path(directory).rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def run(*commands: list[str]) -> list[tuple[int, str, str]]:
    """(exit code, output, errors) of commands run in sequence in one process."""
    code = (
        "import contextlib, io, json, os, sys\n"
        "from apache_beam.runners.portability import prism_runner\n"
        "prism_runner.PrismRunner = lambda *_: os._exit(9)\n"  # it would be downloaded
        "from lm import cli\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    out, err = io.StringIO(), io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):\n"
        "        code = cli.main(command)\n"
        "    print(json.dumps([code, out.getvalue(), err.getvalue()]))\n"
    )
    actual = subprocess.run(
        [PYTHON, "-c", code, json.dumps(commands)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert actual.returncode == 0 and "INFO:apache_beam" not in actual.stderr, actual.stderr
    return [tuple(json.loads(line)) for line in actual.stdout.splitlines()]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """A mini-dump twice, and JSON lines with records that are dropped for every reason."""
    folder, rng = tmp_path_factory.mktemp("source"), random.Random(0)
    words = ["".join(rng.choices("aeiouklmnrst", k=2 + i // 40)) for i in range(300)]
    texts = [" ".join(rng.choices(words, k=60)) + "." for _ in range(60)]
    near = [text.replace(text.split()[9], "other", 1) for text in texts[:8]]
    texts += [*near, *(text.upper() for text in texts[20:28]), "short", " "]
    rng.shuffle(texts)
    for number in range(3):
        lines = [json.dumps({"text": text}) for text in texts[number::3]]
        lines.insert(3 + number, ["{no JSON", '{"other": 1}', '{"text": 3}'][number])
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    dump.write_dump(folder / "pages.xml.bz2", 2, streams=3)
    return str(folder)


def flags_of(source: str, out, **changes) -> list[str]:
    options = {"source": source, "out": out, "shards": 3} | SIZES | changes
    return ["corpus", *(f"--{name}={value}" for name, value in options.items())]


@pytest.fixture(scope="module")
def local(source, tmp_path_factory) -> dict[str, bytes]:
    """The files that one local process writes."""
    out = tmp_path_factory.mktemp("local") / "corpus"
    config = documents.CorpusConfig(source=source, shards=3, **SIZES)
    manifest, _ = build.build(config, out, workers=1)
    records = manifest["records"]
    assert records["duplicates"]["near"] >= 4 and records["duplicates"]["exact"] >= 8
    assert records["quarantined"] == 3 and records["dropped"]["redirect"] >= 2
    return contents(out)


@needs_beam
def test_beam_writes_the_bytes_of_local_processes_and_its_errors_are_one_line(
    source, local, tmp_path
):
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(bytes.fromhex("1f8b0800000000000003"))
    out, temp = tmp_path / "made", tmp_path / "temp"
    temp.mkdir()
    direct = {"runner": "DirectRunner"}
    answers = run(
        flags_of(source, out, temp=temp, **direct),
        flags_of(source, out, **direct),
        flags_of(source, tmp_path / "wrong", column="txet", **direct),
        flags_of(cut, tmp_path / "wrong", **direct),
        flags_of(source, tmp_path / "wrong", **direct, runner_flags="--direct_num_worker=2"),
        flags_of(source, tmp_path / "wrong", **direct, runner_flags="--direct_num_workers=two"),
        flags_of(source, tmp_path / "wrong", runner="DirectRuner", temp=temp),
    )
    assert [code for code, _, _ in answers] == [0, 0, 2, 2, 2, 2, 2], answers
    assert contents(out) == local
    assert "is already there" in answers[1][1]
    assert "INFO" not in answers[0][2] and "WARNING" not in answers[0][2]
    sentences = [
        "txet",
        re.escape(str(cut)),
        "does not take --direct_num_worker; did you mean 'direct_num_workers'",
        "cannot be read: argument --direct_num_workers: invalid int value: 'two'",
        "DirectRuner",
    ]
    for (_, _, output), sentence in zip(answers[2:], sentences, strict=True):
        (line,) = [line for line in output.splitlines() if line.startswith("lm: ")]
        assert re.search(sentence, line) and "while running" not in line
        assert "Traceback" not in output
    # Failed builds and workers leave no files.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.jsonl.gz", "made", "temp"]
    assert not list(temp.iterdir())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--x='open", "--runner_flags=--x='open cannot be read: No closing quotation"),
        ("--y=1 --runner=FlinkRunner", "names a runner; name it with --runner=... alone"),
        ("--runner FlinkRunner", "names a runner"),
    ],
)
def test_unreadable_runner_flags_are_one_error_line(flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        runners._split_flags(flags)
    assert runners._split_flags("--runner_x=1 --a='b c'") == ["--runner_x=1", "--a=b c"]


@needs_beam
@pytest.mark.parametrize(
    "changes", [{"dedupe": "exact", "rules": "c4", "tokenizer": "bytes", "shards": 1}], ids=str
)
def test_several_processes_write_the_bytes_of_one(source, changes, tmp_path):
    (code, _, output), *_ = run(
        flags_of(
            source, tmp_path / "beam", runner="DirectRunner", runner_flags=PROCESSES, **changes
        )
    )
    assert code == 0, output
    options = {"source": source} | SIZES | changes
    build.build(documents.CorpusConfig(**options), tmp_path / "local", workers=1)
    assert contents(tmp_path / "beam") == contents(tmp_path / "local")


# The functions that Beam calls, without Beam. ----------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_near_duplicates_by_bucket_equal_those_of_the_whole_collection(seed):
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 1 << 16, (6, dedupe.NUM_HASHES)).astype(np.uint16)
    signatures = base[rng.integers(0, 6, 80)]
    changed = rng.random(signatures.shape) < rng.choice([0.0, 0.05, 0.15, 0.25], 80)[:, None]
    signatures[changed] = rng.integers(0, 1 << 16, int(changed.sum()))
    signatures[7] = signatures[33] = 0
    expected = dedupe.near_earlier(signatures, np.arange(80))
    assert 0 < expected.sum() < 80
    batch = [((i // 9, i), b"%d" % i, row.tobytes()) for i, row in enumerate(signatures)]
    rng.shuffle(batch)
    batch = [
        ((int(file_number), int(record)), key, row) for (file_number, record), key, row in batch
    ]
    groups: dict[bytes, list] = {}
    for start in range(0, 80, 7):
        for bucket, document in beam._band_buckets(batch[start : start + 7]):
            groups.setdefault(bucket, []).append(document)
    actual_duplicates = {
        (record, key, kind) for g in groups.items() for (_, record), key, kind in beam._near(g)
    }
    assert actual_duplicates == {(int(i), b"%d" % i, "near") for i in np.flatnonzero(expected)}


def test_the_first_document_of_equal_keys_remains_in_any_order():
    members = [((file_number, record), b"") for file_number in range(3) for record in range(3)]
    random.Random(0).shuffle(members)
    assert beam._first((b"key", members)) == ((0, 0), b"key", b"")
    later = beam._all_but_first((b"key", members))
    assert {position for position, _, _ in later} == {position for position, _ in members} - {
        (0, 0)
    }
    assert {(key, kind) for _, key, kind in later} == {(b"key", "exact")}


def test_a_text_file_is_in_source_order_without_duplicates(tmp_path):
    rng = random.Random(0)
    positions = [(file_number, record) for file_number in range(3) for record in range(12)]
    texts = [(position, rng.randbytes(16), f"text {position}") for position in positions]
    repeated = [(positions[5], "near"), (positions[30], "exact"), (positions[5], "near")]
    rng.shuffle(texts)
    group = (7, {"texts": texts, "duplicates": repeated})
    counts = collections.Counter()
    for name, count in beam._write_texts(group, str(tmp_path), 0.3):
        counts[name] += count
    lines = [json.loads(line) for line in (tmp_path / "texts-00007.jsonl").open()]
    remaining = [
        position for position in positions if position not in (positions[5], positions[30])
    ]
    assert [text for _, _, text in lines] == [f"text {position}" for position in remaining]
    split = lambda key: documents.is_heldout(np.frombuffer(key, dedupe.KEY), 0.3)[0]
    packages = {text: documents.SPLITS[int(split(key))] for _, key, text in texts}
    assert all(split == packages[text] for split, _, text in lines)
    splits = collections.Counter(("splits", split) for split, _, _ in lines)
    assert len(splits) == 2
    assert counts == splits | {("duplicates", "near"): 1, ("duplicates", "exact"): 1}


def test_counts_of_records_list_every_rule_and_kind():
    results = [
        documents.RecordResult((0, 0), "a", b"k" * 16, lines={"min_words": 2}),
        documents.RecordResult((0, 1), "b", b"l" * 16),
        documents.RecordResult((0, 2), dropped="redirect"),
        documents.RecordResult((0, 3), dropped="max_word", lines={"min_words": 1, "citations": 3}),
        documents.RecordResult((1, 0), dropped="redirect"),
        documents.RecordResult((1, 1), reason="no JSON", excerpt="{"),
    ]
    counts = sum(map(documents.record_counts, results), collections.Counter())
    assert counts["read", ""] == 6 and counts["kept", ""] == 2
    for kind in dedupe.KINDS:
        config = documents.CorpusConfig(source="", rules="min_words,lorem_ipsum", dedupe=kind)
        duplicates = {"none": {}, "exact": {"exact": 0}, "near": {"exact": 0, "near": 0}}[kind]
        assert documents.manifest_counts(config, counts) == {
            "read": 6,
            "dropped": {"lorem_ipsum": 0, "max_word": 1, "min_words": 0, "redirect": 2},
            "duplicates": duplicates,
            "quarantined": 1,
            "lines": {"citations": 3, "min_words": 3},
        }


def test_a_corpus_with_a_document_missing_is_not_finished(source, tmp_path, monkeypatch):
    def write_shards(config, shared_dir, num_shards, tokens, options):
        path = shared_dir / f"train-{documents.file_name(0, 1)}"
        return {"train": [documents.write_shard(path, ["a"] * 3, tokens)]}

    counts = collections.Counter({("splits", "train"): 4})
    monkeypatch.setattr(runners, "pipeline_options", lambda *_: None)
    monkeypatch.setattr(beam, "_read_sources", lambda *_: counts)
    monkeypatch.setattr(beam, "_write_shards", write_shards)
    options = {"tokenizer": "bytes", "shards": 1, "heldout_fraction": 0}
    with pytest.raises(ValueError, match="wrote 3 of the 4 documents of train; set --temp to"):
        beam.build(documents.CorpusConfig(source, **options), tmp_path / "out", "DirectRunner")
    assert not list(tmp_path.iterdir())


TRACE = "Traceback (most recent call last):\n  File 'x', line 1, in f\n"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("a.gz is cut; fetch it [while running 'records']"), "a.gz is cut; fetch it"),
        (RuntimeError(f"{TRACE}ValueError: no {{ x: 1 }} [while running 'r']\n\n"), "no { x: 1 }"),
        (RuntimeError(f"{TRACE}KeyError: 1\n{TRACE}OSError: full [while running 'r']"), "full"),
        (RuntimeError(f"{TRACE}ValueError: bad\n{TRACE}KeyError: 1 [while running 'r']"), ""),
        (RuntimeError("no job server at localhost:1"), "no job server at localhost:1"),
        (ImportError("install apache_beam[gcp]"), "install apache_beam[gcp]"),
    ],
    ids=str,
)
def test_the_last_error_of_a_traceback_is_reported_and_bugs_are_not_hidden(error, sentence):
    assert runners.user_error(error) == sentence


# The command. ------------------------------------------------------------------------------------


def test_without_beam_the_error_names_the_fix(capsys, tmp_path, source, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(flags_of(source, tmp_path / "out", runner="DirectRunner")) == 2
    output = capsys.readouterr().err
    assert "needs Apache Beam" in output and "make beam" in output and output.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"runner": "DirectRunner", "workers": 2}, "--workers are local processes"),
        ({"runner": "FlinkRunner"}, "--runner=FlinkRunner needs --temp="),
        ({"temp": "gs://bucket"}, "--temp=gs://bucket needs a --runner"),
        ({"runner_flags": "--x"}, "--runner_flags=--x needs a --runner"),
        ({"overlap": "x", "dry_run": True}, "takes no --dry_run"),
        ({"runner": "DirectRuner"}, "--runner='DirectRuner' is unknown; choose one of Dataflow"),
        ({"runner": "DirectRuner"}, "; did you mean 'DirectRunner'"),
    ],
    ids=str,
)
def test_flags_that_contradict_each_other_are_refused(changes, sentence, capsys, tmp_path):
    assert cli.main(flags_of("nothing", tmp_path / "out", **changes)) == 2
    assert sentence in capsys.readouterr().err


def test_the_environment_of_beam_has_bounds_and_no_jax():
    lines = (ROOT / "requirements-beam.txt").read_text().splitlines()
    packages = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w-]+>=[\d.]+,<[\d.]+", line) for line in packages)
    assert not {"jax", "flax", "torch", "tensorflow"} & {
        re.match(r"[\w-]+", n)[0] for n in packages
    }


@needs_beam
def test_packages_that_decide_the_bytes_have_one_version_in_both_environments():
    code = "import importlib.metadata as m, json, sys; sys.path.pop(0)\n"
    code += "print(json.dumps({d.name.lower(): d.version for d in m.distributions()}))"
    read_versions = lambda python: json.loads(
        subprocess.check_output([python, "-c", code], text=True)
    )
    core_versions, beam_versions = (
        read_versions(ROOT / ".venv" / "bin" / "python"),
        read_versions(PYTHON),
    )
    packages = re.findall(r"^[\w-]+", (ROOT / "requirements-beam.txt").read_text(), re.M)
    shared = [name.lower() for name in packages if name != "apache-beam"]
    assert {name: core_versions[name] for name in shared} == {
        name: beam_versions[name] for name in shared
    }
    assert "jax" not in beam_versions
