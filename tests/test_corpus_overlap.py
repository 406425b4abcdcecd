"""N-gram overlap: only planted passages are found, and counts equal those of Python sets."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import tracemalloc

import pytest

from lm import cli, shards, sources, tokenizer
from lm.corpus import build, documents, overlap
from lm.shards import finished_corpus

N = 5
CHINESE = "今天的天气非常好我们一起去公园里散步吧然后回家吃饭"


@dataclasses.dataclass(frozen=True)
class MemoryFile:
    """Documents in memory with the interface of a SourceFile; non-strings are unreadable."""

    texts: tuple
    name: str = "memory"

    def raw_records(self):
        return iter(self.texts)

    def document(self, raw):
        if not isinstance(raw, str):
            raise sources.BadRecord("no text")
        return sources.Document(raw) if raw else sources.Document("", "empty")


def random_texts(seed: int, count: int, vocabulary=60, length=40) -> list[str]:
    """Texts over a small vocabulary, so that some n-grams repeat."""
    rng = random.Random(seed)
    return [
        " ".join(f"w{rng.randrange(vocabulary)}" for _ in range(rng.randrange(length)))
        for _ in range(count)
    ]


def overlap_counts(training: list[MemoryFile], evaluation: MemoryFile, n=N, workers=1) -> dict:
    table = overlap.unique_ngrams(evaluation.texts, n)
    found_ngrams, _ = overlap.search(training, table, n, workers)
    return overlap.count_overlap([evaluation], found_ngrams, n)


def overlap_by_sets(training: list[str], evaluation: list[str], n: int) -> dict:
    """Reference: sets of tuples of words in memory."""
    runs = lambda text: list(zip(*(text.split()[i:] for i in range(n)), strict=False))
    seen = set(itertools.chain.from_iterable(map(runs, training)))
    hits = [[run in seen for run in runs(text)] for text in evaluation]
    facts = {"runs": sum(map(len, hits)), "found": sum(map(sum, hits))}
    facts |= {"touched": sum(map(any, hits)), "whole": sum(bool(row) and all(row) for row in hits)}
    return facts


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("vocabulary", [3, 12, 1000])
def test_counts_equal_those_of_sets_of_words(n, vocabulary):
    training, evaluation = (random_texts(seed, 60, vocabulary) for seed in (n, n + 1))
    facts, expected = (
        overlap_counts([MemoryFile(tuple(training))], MemoryFile(tuple(evaluation)), n),
        overlap_by_sets(training, evaluation, n),
    )
    assert {key: facts[key] for key in expected} == expected
    assert facts["documents"] + facts["skipped"] == 60
    assert facts["share"] == expected["found"] / max(1, expected["runs"])


def test_every_planted_passage_is_found():
    rng = random.Random(0)
    for case in range(100):
        passage = [f"p{case}x{i}" for i in range(rng.randrange(N, 30))]
        before, after = (random_texts(case + s, 1, 1000)[0].split() for s in (1000, 2000))
        evaluation = " ".join([*before, *passage, *after])
        host = " ".join(["other", *passage, "text"])
        facts = overlap_counts([MemoryFile(("nothing of it", host))], MemoryFile((evaluation,)))
        assert facts["found"] == len(passage) - N + 1


def test_texts_without_common_ngrams_have_no_overlap():
    training = [" ".join(f"a{i}" for i in range(k, k + 50)) for k in range(0, 500, 50)]
    evaluation = [text.replace("a", "b") for text in training]
    # All words in common, but no n-gram.
    evaluation += [" ".join(reversed(text.split())) for text in training]
    facts = overlap_counts([MemoryFile(tuple(training))], MemoryFile(tuple(evaluation)))
    assert facts["runs"] and not facts["found"] and not facts["touched"]


def test_the_result_depends_neither_on_order_nor_on_files_nor_on_processes():
    training, evaluation = random_texts(1, 300, 8), MemoryFile(tuple(random_texts(2, 30, 8)))
    whole = overlap_counts([MemoryFile(tuple(training))], evaluation)
    assert 0 < whole["found"] < whole["runs"]
    random.Random(3).shuffle(training)
    pieces = [MemoryFile(tuple(training[start : start + 90])) for start in range(0, 300, 90)]
    assert overlap_counts(pieces, evaluation) == whole
    assert overlap_counts(pieces[::-1], evaluation, workers=2) == whole


@pytest.mark.parametrize(
    "variant",
    [
        "THE QUICK brown fox jumps",
        "the  quick\nbrown\tfox  jumps",
        "the “quick”, brown fox: jumps!",
        "ｔｈｅ quick brown ｆｏｘ jumps",
    ],
)
def test_case_spacing_width_and_punctuation_are_ignored(variant):
    training = [MemoryFile(("the quick brown fox jumps",))]
    assert overlap_counts(training, MemoryFile((variant,)))["whole"] == 1


def test_a_script_without_spaces_is_compared_by_characters():
    facts = overlap_counts([MemoryFile((f"前言{CHINESE[5:17]}后记",))], MemoryFile((CHINESE,)))
    assert facts["runs"] == len(CHINESE) - N + 1 and facts["found"] == 12 - N + 1


def test_the_order_of_words_in_an_ngram_matters():
    hashes = {int(*overlap.ngrams(" ".join(order), 4)) for order in itertools.permutations("abcd")}
    assert len(hashes) == 24
    assert not len(overlap.ngrams("a b", 3)) and len(overlap.ngrams("a b", 2)) == 1


def test_every_record_is_counted():
    training = [MemoryFile(("a b c d e", 7, "", "x y")), MemoryFile((None,))]
    table = overlap.unique_ngrams(["a b c d e"], N)
    found_ngrams, counts = overlap.search(training, table, N)
    assert (found_ngrams == table).all() and counts == {"documents": 2, "skipped": 3}
    facts = overlap.count_overlap([MemoryFile(("a b c d e f", 3, "", "short"))], found_ngrams, N)
    assert [facts[name] for name in overlap.COUNTS] == [2, 2, 1, 0, 2, 1]


def test_memory_does_not_grow_with_the_training_data():
    table = overlap.unique_ngrams(random_texts(0, 20), N)

    @dataclasses.dataclass(frozen=True)
    class Endless(MemoryFile):
        count: int = 0

        def raw_records(self):
            return (f"w{i % 97} " * 300 for i in range(self.count))

    def peak(count):
        tracemalloc.start()
        overlap.search([Endless((), count=count)], table, N)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(overlap.BATCH_DOCUMENTS)
    assert peak(16 * overlap.BATCH_DOCUMENTS) < 1.2 * peak(2 * overlap.BATCH_DOCUMENTS)


# Finished corpora. -------------------------------------------------------------------------------


def write_corpus(directory, tokens: tokenizer.Tokenizer, splits: dict[str, list[list[str]]]):
    """Write a finished corpus: splits -> files -> documents."""
    tokenizer.write(directory / "tokenizer", *tokenizer.read(tokens.directory))
    gap = tokens.encode("\n\n")
    for split, files in splits.items():
        (directory / split).mkdir()
        written = {}
        for number, texts in enumerate(files):
            name = f"shard-{number}.array_record"
            encoded = map(tokens.encode, texts)
            path = directory / split / name
            written[name] = shards.write_text(path, encoded, gap, tokens.size)
        shards.write_manifest(directory / split, {}, written, {})
    (directory / shards.MANIFEST).write_text('{"identity": {}}')
    return str(directory)


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    """A byte tokenizer; its empty line is two ids."""
    return tokenizer.write_byte_tokenizer(tmp_path_factory.mktemp("bytes"), 10)


@pytest.mark.parametrize("block", [1, 40, 1 << 16])
@pytest.mark.parametrize("kind", ["byte_tokenizer", "tiny_tokens"])
def test_a_corpus_reads_back_as_its_documents(kind, block, request, tmp_path, monkeypatch):
    monkeypatch.setattr(finished_corpus, "READ_TOKENS", block)
    texts = ["One, two.", "\nthree\n", "Größe 日本 🙂", "x" * 99, "", "a\n\nb\n\n\n", "\n\nend"]
    files = [texts[:2], texts[2:4], [], texts[4:]]
    tokens = request.getfixturevalue(kind)
    directory = write_corpus(tmp_path, tokens, {"train": files})
    pieces = finished_corpus.list_files(directory, "train")
    assert [piece.name for piece in pieces] == [
        f"{directory}/train/shard-{number}.array_record" for number in range(4)
    ]
    read = [[piece.document(raw).text for raw in piece.raw_records()] for piece in pieces]
    plain = lambda text: tokens.decode([*tokens.encode(text), *tokens.encode("\n\n")])
    assert read == [list(map(plain, file)) for file in files]


@pytest.mark.parametrize("unit", ["file", "paragraph", "line"])
def test_a_corpus_overlaps_as_its_source_does_for_any_empty_lines(unit, tmp_path):
    rng, first, second = random.Random(4), tmp_path / "here", tmp_path / "there"
    for directory, seed in ((first, 1), (second, 2)):
        directory.mkdir()
        lines = random_texts(seed, 90, 4, 12)  # few words a paragraph: most runs cross their bounds
        for number in range(9):
            joined = (line + rng.choice(["\n", "\n\n", "\n\n\n "]) for line in lines[number::9])
            (directory / f"{number}.txt").write_text("".join(joined))
    corpus_dir = tmp_path / "made"
    options = {"rules": "none", "dedupe": "none", "tokenizer": "bytes", "unit": unit}
    options |= {"heldout_fraction": 0}
    build.build(documents.CorpusConfig(source=str(first), shards=2, **options), corpus_dir, 1)
    compare = lambda source, evaluation: overlap.measure_overlap(
        source, evaluation, n=5, unit=unit, workers=1
    )
    keys = [key for key in overlap.COUNTS if key != "skipped"]  # a corpus has no empty lines
    facts = lambda report: [[row[key] for key in keys] for row in report["evaluation"].values()]
    for evaluation in (str(first), str(second)):
        actual, expected = compare(str(corpus_dir), evaluation), compare(str(first), evaluation)
        assert facts(actual) == facts(expected)
        assert actual["training"]["documents"] == expected["training"]["documents"]
    assert 0 < facts(actual)[0][-1] < facts(actual)[0][-2]
    (corpus_dir / "train").rename(corpus_dir / "validation")
    ((actual,), (corpus_facts,)) = (
        facts(compare(str(second), str(corpus_dir))),
        facts(compare(str(second), str(first))),
    )
    assert actual == corpus_facts


def test_a_missing_split_of_a_corpus_is_an_error(byte_tokenizer, tmp_path):
    corpus_dir = write_corpus(tmp_path, byte_tokenizer, {"train": [["a b c d e f"]]})
    with pytest.raises(
        ValueError,
        match="has no validation; remove it and build it again with a --heldout",
    ):
        overlap.measure_overlap(corpus_dir, corpus_dir, n=2, workers=1)


def test_a_corpus_path_may_start_with_a_tilde(byte_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "made").mkdir()
    write_corpus(tmp_path / "made", byte_tokenizer, {"train": [["a b c"]], "validation": [["b c"]]})
    report = overlap.measure_overlap("~/made", " ~/made", n=2, workers=1)
    assert report["evaluation"][" ~/made"]["whole"] == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_a_finished_corpus_is_compared_with_itself_and_with_files(tiny_tokens, tmp_path, workers):
    lines = random_texts(5, 40, 1000)
    (tmp_path / "made").mkdir()
    splits = {"train": [lines[:15], lines[15:30]], "validation": [[*lines[30:], lines[3]]]}
    corpus_dir = write_corpus(tmp_path / "made", tiny_tokens, splits)
    extra_file = tmp_path / "more.txt"
    extra_file.write_text(f"{lines[20]}\nnothing like it in the corpus at all, not at all\n")
    n = next(k for k in range(5, 20) if k <= min(len(lines[i].split()) for i in (3, 20)))
    report = overlap.measure_overlap(
        corpus_dir, f"{corpus_dir},{extra_file}", n=n, unit="line", workers=workers
    )
    corpus_facts, file_facts = (
        report["evaluation"][corpus_dir],
        report["evaluation"][str(extra_file)],
    )
    assert corpus_facts["touched"] == corpus_facts["whole"] == 1 and file_facts["touched"] == 1
    assert file_facts["documents"] == 2
    assert json.loads(json.dumps(report)) == report
    shown = overlap.format_report(report)
    assert all(name in shown for name in (corpus_dir, str(extra_file), "touched"))


@pytest.mark.parametrize(
    ("evaluation", "n", "sentence"),
    [
        ("a b c", 0, "--ngram=0 is below 1; use 13"),
        ("a b c", 9, "none of its 1 documents has 9 words; use a smaller --ngram"),
    ],
)
def test_evaluation_data_without_ngrams_are_an_error(evaluation, n, sentence, tmp_path):
    (tmp_path / "a.txt").write_text(evaluation)
    with pytest.raises(ValueError, match=sentence):
        overlap.measure_overlap(str(tmp_path / "a.txt"), str(tmp_path / "a.txt"), n=n, workers=1)


def test_training_data_without_documents_are_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("a b c d e")
    (tmp_path / "b.txt").write_text("\n")
    with pytest.raises(ValueError, match="has no documents; name another"):
        overlap.measure_overlap(str(tmp_path / "b.txt"), str(tmp_path / "a.txt"), n=N, workers=1)


def test_the_command_prints_the_table_and_writes_the_report(tmp_path, capsys):
    train, evaluation, out = (tmp_path / name for name in ("train.txt", "eval.txt", "report.json"))
    lines = random_texts(7, 30, 1000)
    train.write_text("\n".join(lines))
    evaluation.write_text("\n".join([*random_texts(8, 5, 1000), max(lines, key=len)]))
    flags = [f"--source={train}", f"--overlap={evaluation}", "--unit=line"]
    assert cli.main(["corpus", *flags, "--ngram=5", f"--out={out}"]) == 0
    report = json.loads(out.read_text())
    assert report["ngram"] == 5 and report["evaluation"][str(evaluation)]["whole"] == 1
    assert overlap.format_report(report) == capsys.readouterr().out.strip()
    assert cli.main(["corpus", *flags[1:]]) == 2
    assert "--overlap needs --source=..." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--rules=c4", "--dry_run"], "--overlap takes no --dry_run, --rules; leave that out"),
        (["--config=configs/demo.py"], "--overlap takes no --config;"),
        (["--out=."], "--out=. must be a file in an existing folder"),
        (["--out=none/such"], "--out=none/such must be a file"),
    ],
)
def test_unused_flags_and_bad_outputs_are_refused_before_the_work(
    flags, sentence, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(overlap, "measure_overlap", None)
    (tmp_path / "a.txt").write_text("a b c")
    assert cli.main(["corpus", f"--source={tmp_path}", f"--overlap={tmp_path}", *flags]) == 2
    assert sentence in capsys.readouterr().err
