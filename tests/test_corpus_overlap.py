"""Laws of the overlap: what is planted is found, what is not there is not, as sets have it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import tracemalloc

import numpy as np
import pytest

from lm import cli, shards, sources, tokenizer
from lm.corpus import build, documents, overlap
from lm.shards import finished_corpus

N = 5
CHINESE = "今天的天气非常好我们一起去公园里散步吧然后回家吃饭"


@dataclasses.dataclass(frozen=True)
class Piece:
    """Documents in memory as a part of a source; what is no text cannot be read."""

    texts: tuple
    name: str = "piece"

    def raw_records(self):
        return iter(self.texts)

    def document(self, raw):
        if not isinstance(raw, str):
            raise sources.BadRecord("no text")
        return sources.Document(raw) if raw else sources.Document("", "empty")


def made_up(seed: int, count: int, vocabulary=60, length=40) -> list[str]:
    """Texts of so few words that runs of N of them repeat now and then."""
    rng = random.Random(seed)
    return [
        " ".join(f"w{rng.randrange(vocabulary)}" for _ in range(rng.randrange(length)))
        for _ in range(count)
    ]


def compared(training: list[Piece], evaluation: Piece, n=N, workers=1) -> dict:
    table = overlap.known(evaluation.texts, n)
    found, _ = overlap.search(training, table, n, workers)
    return overlap.measure([evaluation], table, found, n)


def sets(training: list[str], evaluation: list[str], n: int) -> dict:
    """The same by sets of tuples of words, held whole."""
    runs = lambda text: list(zip(*(text.split()[i:] for i in range(n)), strict=False))
    seen = set(itertools.chain.from_iterable(map(runs, training)))
    hits = [[run in seen for run in runs(text)] for text in evaluation]
    facts = {
        "short": sum(bool(text) and not row for text, row in zip(evaluation, hits, strict=True))
    }
    facts |= {"runs": sum(map(len, hits)), "found": sum(map(sum, hits))}
    facts |= {"touched": sum(map(any, hits)), "whole": sum(bool(row) and all(row) for row in hits)}
    return facts | {"half": sum(bool(row) and sum(row) * 2 >= len(row) for row in hits)}


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("vocabulary", [3, 12, 1000])
def test_equals_sets_of_words_held_whole(n, vocabulary):
    training, evaluation = (made_up(seed, 60, vocabulary) for seed in (n, n + 1))
    facts, expected = (
        compared([Piece(tuple(training))], Piece(tuple(evaluation)), n),
        sets(training, evaluation, n),
    )
    assert {key: facts[key] for key in expected} == expected
    assert facts["documents"] + facts["dropped"] == 60
    assert facts["share"] == expected["found"] / max(1, expected["runs"])


def test_every_planted_passage_is_found_where_it_stands():
    rng = random.Random(0)
    for case in range(100):
        passage = [f"p{case}x{i}" for i in range(rng.randrange(N, 30))]
        before, after = (made_up(case + s, 1, 1000)[0].split() for s in (1000, 2000))
        evaluation = " ".join([*before, *passage, *after])
        host = " ".join(["other", *passage, "text"])
        facts = compared([Piece(("nothing of it", host))], Piece((evaluation,)))
        assert facts["found"] == len(passage) - N + 1
        (match,) = facts["worst"]
        assert match["word"] == len(before) and match["words"] == len(passage)
        assert match["text"] == " ".join(passage[: overlap.SHOWN])


def test_data_without_a_common_run_give_zero():
    training = [" ".join(f"a{i}" for i in range(k, k + 50)) for k in range(0, 500, 50)]
    evaluation = [text.replace("a", "b") for text in training]
    # All words in common, no run of N of them.
    evaluation += [" ".join(reversed(text.split())) for text in training]
    facts = compared([Piece(tuple(training))], Piece(tuple(evaluation)))
    assert facts["runs"] and not facts["found"] and not facts["touched"] and not facts["worst"]


def test_order_cut_and_processes_of_the_training_data_change_nothing():
    training, evaluation = made_up(1, 300, 8), Piece(tuple(made_up(2, 30, 8)))
    whole = compared([Piece(tuple(training))], evaluation)
    assert 0 < whole["found"] < whole["runs"]
    random.Random(3).shuffle(training)
    pieces = [Piece(tuple(training[start : start + 90])) for start in range(0, 300, 90)]
    assert compared(pieces, evaluation) == whole
    assert compared(pieces[::-1], evaluation, workers=2) == whole


@pytest.mark.parametrize(
    "other",
    [
        "THE QUICK brown fox jumps",
        "the  quick\nbrown\tfox  jumps",
        "the “quick”, brown fox: jumps!",
        "ｔｈｅ quick brown ｆｏｘ jumps",
    ],
)
def test_case_spacing_width_and_punctuation_do_not_count(other):
    assert compared([Piece(("the quick brown fox jumps",))], Piece((other,)))["whole"] == 1


def test_a_script_without_spaces_is_compared_by_characters():
    facts = compared([Piece((f"前言{CHINESE[5:17]}后记",))], Piece((CHINESE,)))
    assert facts["runs"] == len(CHINESE) - N + 1 and facts["found"] == 12 - N + 1
    assert facts["worst"][0]["word"] == 5


def test_the_order_of_the_words_in_a_run_counts():
    hashes = {int(*overlap.runs(list(order), 4)) for order in itertools.permutations("abcd")}
    assert len(hashes) == 24
    assert not len(overlap.runs(["a", "b"], 3)) and len(overlap.runs(["a", "b"], 2)) == 1


def test_no_record_is_lost_from_the_counts():
    training = [Piece(("a b c d e", 7, "", "x y")), Piece((None,))]
    table = overlap.known(["a b c d e"], N)
    found, counts = overlap.search(training, table, N)
    assert found.all() and counts == {"documents": 2, "dropped": 1, "unreadable": 2}
    facts = overlap.measure([Piece(("a b c d e f", 3, "", "short"))], table, found, N)
    named = ("documents", "dropped", "unreadable", "short", "touched", "whole", "half", "runs")
    assert [facts[name] for name in named] == [2, 1, 1, 1, 1, 0, 1, 2]


def test_the_worst_are_those_of_the_highest_share():
    line = [f"w{i}" for i in range(40)]
    evaluation = [" ".join(line[:k] + [f"n{k}x{i}" for i in range(40 - k)]) for k in range(5, 40)]
    facts = compared([Piece((" ".join(line),))], Piece(tuple(evaluation), "eval"))
    worst = facts["worst"]
    assert [match["record"] for match in worst] == [34, 33, 32, 31, 30][: overlap.WORST]
    assert all(match["part"] == "eval" and match["word"] == 0 for match in worst)
    assert facts["touched"] == 35 and facts["share"] == facts["found"] / facts["runs"]


def test_the_longest_stretch_is_the_first_of_the_longest():
    for marks in itertools.product([False, True], repeat=6):
        stretches = [
            (start - stop, start)
            for start, stop in itertools.combinations(range(7), 2)
            if all(marks[start:stop])
        ]
        size, start = min(stretches, default=(0, 0))
        assert overlap.longest(np.array(marks)) == (start, -size), marks


def test_memory_does_not_grow_with_the_training_data():
    table = overlap.known(made_up(0, 20), N)

    @dataclasses.dataclass(frozen=True)
    class Endless(Piece):
        count: int = 0

        def raw_records(self):
            return (f"w{i % 97} " * 300 for i in range(self.count))

    def peak(count):
        tracemalloc.start()
        overlap.search([Endless((), count=count)], table, N)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(overlap.BATCH)
    assert peak(8 * overlap.BATCH) < 1.2 * peak(overlap.BATCH)


# Finished corpora. -------------------------------------------------------------------------------


def write_corpus(directory, tokens: tokenizer.Tokenizer, splits: dict[str, list[list[str]]]):
    """A finished corpus by hand: splits -> files -> documents."""
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
def spelt(tmp_path_factory):
    """A tokenizer of bytes, whose empty line is two ids."""
    return tokenizer.write_byte_tokenizer(tmp_path_factory.mktemp("bytes"), 10)


@pytest.mark.parametrize("block", [1, 40, 1 << 16])
@pytest.mark.parametrize("kind", ["spelt", "tiny_tokens"])
def test_a_corpus_reads_back_as_its_documents(kind, block, request, tmp_path, monkeypatch):
    monkeypatch.setattr(finished_corpus, "BLOCK", block)
    texts = ["One, two.", "\nthree\n", "Größe 日本 🙂", "x" * 99, "", "a\n\nb\n\n\n", "\n\nend"]
    files = [texts[:2], texts[2:4], [], texts[4:]]
    tokens = request.getfixturevalue(kind)
    directory = write_corpus(tmp_path, tokens, {"train": files})
    pieces = finished_corpus.corpus_or_source_parts(directory, "train", "", "file", "")
    assert [piece.name for piece in pieces] == [
        f"{directory}/train/shard-{number}.array_record" for number in range(4)
    ]
    read = [[piece.document(raw).text for raw in piece.raw_records()] for piece in pieces]
    plain = lambda text: tokens.decode([*tokens.encode(text), *tokens.encode("\n\n")])
    assert read == [list(map(plain, file)) for file in files]


@pytest.mark.parametrize("unit", ["file", "paragraph", "line"])
def test_a_corpus_overlaps_as_its_source_does_whatever_empty_lines_are_in_it(unit, tmp_path):
    rng, here, there = random.Random(4), tmp_path / "here", tmp_path / "there"
    for place, seed in ((here, 1), (there, 2)):
        place.mkdir()
        lines = made_up(seed, 90, 4, 12)  # few words a paragraph: most runs cross their bounds
        for number in range(9):
            joined = (line + rng.choice(["\n", "\n\n", "\n\n\n "]) for line in lines[number::9])
            (place / f"{number}.txt").write_text("".join(joined))
    made = tmp_path / "made"
    options = {"rules": "none", "dedupe": "none", "tokenizer": "bytes", "heldout": 0, "unit": unit}
    build.build(documents.CorpusConfig(source=str(here), shards=2, **options), made, 1)
    compare = lambda source, other: overlap.measure_overlap(
        source, other, n=5, unit=unit, workers=1
    )
    counted = ("documents", "short", "touched", "half", "whole", "runs", "found")
    facts = lambda report: [[one[key] for key in counted] for one in report["evaluation"].values()]
    for other in (str(here), str(there)):
        ours, theirs = compare(str(made), other), compare(str(here), other)
        assert facts(ours) == facts(theirs)
        assert ours["training"]["documents"] == theirs["training"]["documents"]
    assert 0 < facts(ours)[0][-1] < facts(ours)[0][-2]
    (made / "train").rename(made / "validation")
    ((back,), (own,)) = facts(compare(str(there), str(made))), facts(compare(str(there), str(here)))
    assert back == own


def test_a_split_that_a_corpus_has_not_is_refused_and_not_read_as_files(spelt, tmp_path):
    made = write_corpus(tmp_path, spelt, {"train": [["a b c d e f"]]})
    with pytest.raises(
        ValueError, match="has no validation; remove it, and make it anew with a --heldout"
    ):
        overlap.measure_overlap(made, made, n=2, workers=1)


def test_a_corpus_is_found_from_home(spelt, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "made").mkdir()
    write_corpus(tmp_path / "made", spelt, {"train": [["a b c"]], "validation": [["b c"]]})
    report = overlap.measure_overlap("~/made", " ~/made", n=2, workers=1)
    assert report["evaluation"][" ~/made"]["whole"] == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_a_finished_corpus_is_compared_with_itself_and_with_files(tiny_tokens, tmp_path, workers):
    lines = made_up(5, 40, 1000)
    (tmp_path / "made").mkdir()
    splits = {"train": [lines[:15], lines[15:30]], "validation": [[*lines[30:], lines[3]]]}
    made = write_corpus(tmp_path / "made", tiny_tokens, splits)
    more = tmp_path / "more.txt"
    more.write_text(f"{lines[20]}\nnothing like it in the corpus at all, not at all\n")
    n = next(k for k in range(5, 20) if k <= min(len(lines[i].split()) for i in (3, 20)))
    report = overlap.measure_overlap(made, f"{made},{more}", n=n, unit="line", workers=workers)
    own, other = report["evaluation"][made], report["evaluation"][str(more)]
    assert own["touched"] == own["whole"] == 1 and other["touched"] == 1
    assert own["worst"][0]["text"] == " ".join(lines[3].split()[: overlap.SHOWN])
    assert other["worst"][0]["record"] == 0 and other["documents"] == 2
    assert json.loads(json.dumps(report)) == report
    shown = overlap.format_report(report)
    assert all(name in shown for name in (made, str(more), lines[20], "touched"))


@pytest.mark.parametrize(
    ("evaluation", "n", "sentence"),
    [
        ("a b c", 0, "--ngram=0 is no number of words; use 1 or more"),
        ("a b c", 9, "none of its 1 documents has 9 words; use a smaller --ngram"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_the_cure(evaluation, n, sentence, tmp_path):
    (tmp_path / "a.txt").write_text(evaluation)
    with pytest.raises(ValueError, match=sentence):
        overlap.measure_overlap(str(tmp_path / "a.txt"), str(tmp_path / "a.txt"), n=n, workers=1)


def test_training_data_without_a_document_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a b c d e")
    (tmp_path / "b.txt").write_text("\n")
    with pytest.raises(ValueError, match="holds no document to compare with"):
        overlap.measure_overlap(str(tmp_path / "b.txt"), str(tmp_path / "a.txt"), n=N, workers=1)


def test_the_door_prints_the_table_and_writes_the_report(tmp_path, capsys):
    train, evaluation, out = (tmp_path / name for name in ("train.txt", "eval.txt", "report.json"))
    lines = made_up(7, 30, 1000)
    train.write_text("\n".join(lines))
    evaluation.write_text("\n".join([*made_up(8, 5, 1000), max(lines, key=len)]))
    asked = [f"--source={train}", f"--overlap={evaluation}", "--unit=line"]
    assert cli.main(["corpus", *asked, "--ngram=5", f"--out={out}"]) == 0
    report = json.loads(out.read_text())
    assert report["ngram"] == 5 and report["evaluation"][str(evaluation)]["whole"] == 1
    assert overlap.format_report(report) == capsys.readouterr().out.strip()
    assert cli.main(["corpus", *asked[1:]]) == 2
    assert "--overlap needs --source=..." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--heldout=0.5", "--dry_run"], "--overlap takes no --dry_run, --heldout; leave that out"),
        (["--config=configs/demo.py"], "--overlap takes no --config;"),
        (["--out=."], "--out=. is to be a file, in a folder that is there"),
        (["--out=none/such"], "--out=none/such is to be a file"),
    ],
)
def test_what_an_overlap_has_no_use_for_is_refused_before_the_work(
    flags, sentence, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(overlap, "compare", None)
    (tmp_path / "a.txt").write_text("a b c")
    assert cli.main(["corpus", f"--source={tmp_path}", f"--overlap={tmp_path}", *flags]) == 2
    assert sentence in capsys.readouterr().err
