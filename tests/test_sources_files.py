"""Tests of reading text from files: nothing is lost, changed or cut short silently."""

from __future__ import annotations

import csv
import hashlib
import json
import pickle
import sys
import tracemalloc

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python import array_record_module

from lm import sources
from lm.sources import documents, formats
from tests import dump

TEXTS = ["One é\nline.", "Two 水 \u2028 lines.", "Three: 'quoted', \"twice\".", " four ", "V"]
LINES = [text.replace("\n", " ") for text in TEXTS]
SUFFIXES = ("", ".gz", ".bz2", ".zst")


def as_text(texts) -> bytes:
    return "".join(f"{text}\n" for text in texts).encode()


def as_paragraphs(texts) -> bytes:
    return "\n\n \n".join(texts).encode()


def as_jsonl(texts) -> bytes:
    rows = ({"id": i, "text": text} for i, text in enumerate(texts))
    return "".join(json.dumps(row, ensure_ascii=row["id"] % 2 > 0) + "\n" for row in rows).encode()


def as_tsv(texts) -> bytes:
    return "".join(["id\ttext\n", *(f"{i}\t{text}\n" for i, text in enumerate(texts))]).encode()


FILES = {  # file name: (function that serializes the texts, the texts, --unit)
    "lines.txt": (as_text, LINES, "line"),
    "paragraphs.txt": (as_paragraphs, TEXTS, "paragraph"),
    "rows.jsonl": (as_jsonl, TEXTS, "file"),
    "rows.ndjson": (as_jsonl, TEXTS, "file"),
    "rows.JSONL-00000-of-00001": (as_jsonl, TEXTS, "file"),
    "rows.tsv": (as_tsv, LINES, "file"),
}


def write_parquet(path, texts, **options) -> None:
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, path, **options)


def write_array_record(path, records) -> None:
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def read(source, **options) -> list[str]:
    """The texts of a source. Fails if a record is dropped or bad."""
    texts = []
    for source_file in sources.list_files(str(source), **options):
        for raw in source_file.raw_records():
            document = source_file.document(raw)
            assert not document.drop_reason, document
            texts.append(document.text)
    return texts


def reasons(source, **options) -> dict[int, str]:
    """Position -> why the record there is bad or dropped."""
    (source_file,) = sources.list_files(str(source), **options)
    by_position = {}
    for position, raw in enumerate(source_file.raw_records()):
        try:
            by_position[position] = source_file.document(raw).drop_reason
        except sources.BadRecord as error:
            by_position[position] = str(error)
    return {position: reason for position, reason in by_position.items() if reason}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", FILES)
def test_compression_does_not_change_the_documents(name, suffix, tmp_path):
    write, texts, unit = FILES[name]
    dump.pack(tmp_path / (name + suffix), [write(texts)])
    assert read(tmp_path, unit=unit if name.endswith("txt") else "file") == texts


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", FILES)
def test_splitting_into_files_does_not_change_the_documents(name, suffix, tmp_path):
    write, texts, unit = FILES[name]
    for i, text in enumerate(texts):
        dump.pack(tmp_path / f"{i}-{name}{suffix}", [write([text])])
    assert read(tmp_path, unit=unit if name.endswith("txt") else "file") == texts


def test_a_text_file_is_one_document_by_default(tmp_path):
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
    assert read(tmp_path) == TEXTS


@pytest.mark.parametrize(
    "name, kind",
    [
        ("file.array_record-00000-of-00001", "array_record"),
        ("c4-train.00000-of-01024.json.gz", "jsonl"),
        ("c4-train.json-00000-of-01024.zst", "jsonl"),
        ("A.PARQUET", "parquet"),
        ("A.Txt.GZ", "text"),
        ("wiki.XML.bz2", "wikipedia"),
    ],
)
def test_shard_numbers_and_capitals_do_not_change_the_kind(name, kind, tmp_path):
    (tmp_path / name).write_bytes(b"")
    assert [source_file.kind for source_file in sources.list_files(str(tmp_path))] == [kind]


def test_skipped_files_of_a_folder_are_listed(tmp_path):
    make_tree(tmp_path)
    skipped = [str(tmp_path / name) for name in ("notes.md", "w-multistream-index.txt.bz2")]
    assert sources.skipped_files(f"{tmp_path}, tfds:x, {tmp_path}/deep,{tmp_path}/b.txt") == skipped


def test_check_first_records_reports_a_missing_column(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jsonl").write_bytes(as_jsonl(TEXTS))
    (tmp_path / "z.jsonl").write_text('{"body": "x"}\n')
    (tmp_path / "b.txt").write_text("x")
    source_files = sources.list_files(str(tmp_path))
    sources.check_first_records(source_files[:-1])
    with pytest.raises(ValueError, match=r"z\.jsonl has no column 'text'; .* body"):
        sources.check_first_records(source_files)


def test_a_parquet_row_group_is_not_in_memory_as_a_whole(tmp_path):
    write_parquet(tmp_path / "a.parquet", [f"{i} " * 2000 for i in range(5000)])
    (source_file,) = sources.list_files(str(tmp_path))
    before = pyarrow.total_allocated_bytes()
    peaks = [pyarrow.total_allocated_bytes() - before for _ in source_file.raw_records()]
    assert len(peaks) == 5000 and max(peaks) < 24 << 20  # the file has 48 MiB


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_an_archive_of_several_streams_is_read_to_its_end(suffix, tmp_path):
    path = tmp_path / f"a.jsonl{suffix}"
    whole = as_jsonl(TEXTS)
    dump.pack(path, [whole[:31], whole[31:90], whole[90:]])
    assert read(path) == TEXTS


@pytest.mark.parametrize("name", [f"a.{k}{s}" for k in ("jsonl", "xml") for s in SUFFIXES[1:]])
def test_a_truncated_archive_is_refused_with_its_name_and_position(name, tmp_path):
    texts = [f"{i} {text}" for i in range(40) for text in TEXTS]
    blocks = [as_jsonl(texts[:90]), as_jsonl(texts[90:])]
    if ".xml" in name:
        dump.write_dump(tmp_path / name, streams=2)
    else:
        dump.pack(tmp_path / name, blocks)
    whole = (tmp_path / name).read_bytes()
    (source_file,) = sources.list_files(str(tmp_path / name))
    complete = [source_file.document(raw) for raw in source_file.raw_records()]
    for cut in [*range(0, len(whole), len(whole) // 23), len(whole) - 1, len(whole) - 9]:
        (tmp_path / name).write_bytes(whole[:cut])
        documents_read = []
        with pytest.raises(ValueError, match=rf"{name} .*(first \d+ records|not an XML export)"):
            for raw in source_file.raw_records():
                documents_read.append(source_file.document(raw))
        assert documents_read == complete[: len(documents_read)]


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_damage_between_the_streams_of_an_archive_is_refused(suffix, tmp_path):
    path = tmp_path / f"a.jsonl{suffix}"
    dump.pack(path, [as_jsonl(TEXTS)])
    first = path.stat().st_size
    dump.pack(path, [as_jsonl(TEXTS)] * 2)
    damaged = bytearray(path.read_bytes())
    damaged[first : first + 2] = b"??"
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="after its first"):
        read(path)


def test_tsv_equals_the_csv_module_without_quoting(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_bytes(as_tsv(LINES).replace(b"\n", b"\r\n"))
    with path.open(newline="") as file:
        rows = csv.DictReader(file, dialect="excel-tab", quoting=csv.QUOTE_NONE)
        assert read(path) == [row["text"] for row in rows] == LINES
    assert read(path, column="id") == [str(i) for i in range(len(LINES))]


@pytest.mark.parametrize("rows", [1, 2, 1000])
@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "dictionary"])
def test_every_arrow_string_type_is_read_from_parquet(kind, rows, tmp_path):
    types = {"dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string())}
    column = pyarrow.array(TEXTS).cast(types.get(kind) or getattr(pyarrow, kind)())
    table = pyarrow.table({"other": [1] * 5, "text": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=rows)
    assert read(tmp_path / "a.parquet") == TEXTS


def test_a_damaged_parquet_file_is_refused_or_read_unchanged(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"{text} {i}" for i in range(300) for text in TEXTS]
    write_parquet(path, texts, row_group_size=100, write_page_checksum=True)
    whole = path.read_bytes()
    for cut in range(3, len(whole), len(whole) // 29):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"a\.parquet cannot be read after its first \d+ rec"):
            read(path)
        path.write_bytes(whole[:cut] + bytes([whole[cut] ^ 255]) + whole[cut + 1 :])
        try:
            assert read(path) == texts
        except ValueError as error:
            assert "a.parquet" in str(error)


def test_array_record_is_read_as_text_or_json(tmp_path):
    write_array_record(tmp_path / "a.array_record", [text.encode() for text in TEXTS])
    assert read(tmp_path) == TEXTS
    write_array_record(tmp_path / "a.array_record", as_jsonl(TEXTS).splitlines())
    assert read(tmp_path, column="text") == TEXTS
    write_array_record(tmp_path / "a.array_record", [])
    assert read(tmp_path) == []


def test_a_truncated_array_record_file_is_refused(tmp_path):
    path = tmp_path / "a.array_record"
    write_array_record(path, [text.encode() for text in TEXTS])
    whole = path.read_bytes()
    for damaged in (
        *(whole[:cut] for cut in (0, 9, 4096, 70_000, len(whole) - 1)),
        whole + b"more",
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.array_record .*after its first 0 records: \w.*;"):
            read(path)
    damaged = bytearray(whole)
    damaged[damaged.index("水".encode())] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="after its first 1 records"):
        read(path)


def test_a_tfds_split_is_read_like_a_file(tiny_tfds):
    name, root = "wikipedia/20230601.en", str(tiny_tfds)
    (source_file,) = sources.list_files(f"tfds:{name}", data_dir=root)
    for split, column in (("train", "text"), ("validation", "title")):
        records = sources.tfds_records(name, split, root)
        expected = [records[i][column] for i in range(len(records))]
        assert read(f"tfds:{name}@{split}", column=column, data_dir=root) == expected
    assert source_file.name == f"tfds:{name}@train"
    assert source_file.digest() == sources.tfds_fingerprint(name, root)
    half, rest = sources.list_files(
        f"tfds:{name}@train[:50%], tfds:{name}@train[50%:]", data_dir=root
    )
    assert 0 <= source_file.size() - half.size() - rest.size() <= 1 < half.size()
    with pytest.raises(ValueError, match="has no column 'body'; name with --column one of"):
        read(f"tfds:{name}", column="body", data_dir=root)
    with pytest.raises(ValueError, match="did you mean"):
        sources.list_files("tfds:wikpedia/20230601.en", data_dir=root)
    with pytest.raises(ValueError, match="choose one of"):
        sources.list_files(f"tfds:{name}@trian", data_dir=root)


def test_invalid_utf_8_is_bad_and_never_replaced(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\nab\xff\xfec\nfine \xef\xbf\xbd\n")
    assert reasons(path, unit="line") == {1: "invalid UTF-8 at byte 2"}
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": "\xe9"}\n')
    assert reasons(path) == {1: "invalid UTF-8 at byte 10"}
    values = pyarrow.array([b"fine", b"\xe9", None])
    values = pyarrow.Array.from_buffers(pyarrow.string(), 3, values.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "a.parquet")
    expected = {1: "invalid UTF-8 at byte 0", 2: "column 'text' is null"}
    assert reasons(tmp_path / "a.parquet") == expected


def test_a_record_without_text_is_bad_with_its_reason(tmp_path):
    rows = ['{"text": "x"}', "{", "[1]", '{"txt": 1}', '{"text": 7}', '{"text": null}', ""]
    rows += [
        '{"text": "\\ud800x"}',
        '{"text": "a\\u0000"}',
        '{"text": "\\ud83d\\ude00"}',
        "[" * 9**5,
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    actual = reasons(tmp_path / "a.jsonl")
    assert list(actual) == [1, 2, 3, 4, 5, 6, 7, 8, 10]
    assert actual[1].startswith("invalid JSON: ")
    assert actual[2] == "the JSON is list, not an object"
    assert actual[3] == "no column 'text'"
    assert actual[4] == "the value is int, not text"
    assert actual[5] == "the value is NoneType, not text"
    assert actual[6] == "empty"
    assert actual[7] == "half of a surrogate pair at character 0"
    assert actual[8] == "NUL at character 1: binary, or not UTF-8"
    assert actual[10].startswith("invalid JSON: ")
    (tmp_path / "a.tsv").write_text("text\tn\na\t1\nb\n\nc\t2\t3\n \t4\n")
    wrong = "fields where the header has 2"
    assert reasons(tmp_path / "a.tsv") == {1: f"1 {wrong}", 2: "empty", 3: f"3 {wrong}", 4: "empty"}


def test_byte_order_marks_are_removed_and_line_ends_unified(tmp_path):
    mark = "\ufeff".encode()
    (tmp_path / "a.txt").write_bytes(mark + b"one\r\ntwo\rthree\n")
    assert read(tmp_path) == ["one\ntwo\nthree\n"]
    (tmp_path / "a.txt").write_bytes(mark + b"one\r\n\r\n\r\ntwo\r\n")
    assert read(tmp_path, unit="paragraph") == ["one", "two"]
    (tmp_path / "a.txt").unlink()
    (tmp_path / "a.jsonl").write_bytes(mark + b'{"text": "\\ufeffone\\r\\ntwo"}\r\n')
    assert read(tmp_path) == ["one\ntwo"]
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.tsv").write_bytes(mark + b"text\r\none\r\n")
    assert read(tmp_path) == ["one"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl.zst", "a.tsv.bz2", "a.parquet"])
def test_an_oversized_record_is_bad_and_its_neighbours_are_read(name, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_RECORD_BYTES", 1000)
    texts = ["short", "x" * 1000, "y" * 1001, "z" * 90_000, "short again"]
    if name == "a.parquet":
        write_parquet(tmp_path / name, texts)
        longest, unit = {2, 3}, "file"
    else:
        write, unit = {
            "txt": (as_text, "line"),
            "jsonl": (as_jsonl, "file"),
            "tsv": (as_tsv, "file"),
        }[name.split(".")[1]]
        dump.pack(tmp_path / name, [write(texts)])
        longest = {2, 3} if unit == "line" else {1, 2, 3}  # a line is longer than its text
    assert reasons(tmp_path / name, unit=unit) == dict.fromkeys(longest, "longer than 1,000 bytes")
    (source_file,) = sources.list_files(str(tmp_path / name), unit=unit)
    assert [
        len(raw["excerpt"])
        for raw in source_file.raw_records()
        if type(raw) is dict and "excerpt" in raw
    ] == [200 for _ in longest]


def test_oversized_files_and_paragraphs_are_bad(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_RECORD_BYTES", 1000)
    path = tmp_path / "a.txt"
    for text, long in (("x" * 1000, False), ("x" * 1001, True)):
        path.write_text(text)
        assert bool(reasons(path)) == long
    for lines in (
        ["x" * 499, "y" * 500],
        ["x" * 500, "y" * 500],
        ["x", "y" * 1001, "z"],
        ["y" * 2000],
    ):
        path.write_text("first\n\n" + "\n".join(lines) + "\n\nlast\n")
        long = sum(map(len, lines)) + len(lines) - 1 > 1000
        assert bool(reasons(path, unit="paragraph")) == long
        assert sum(1 for _ in sources.list_files(str(path), unit="paragraph")[0].raw_records()) == 3


@pytest.mark.parametrize(
    "name, unit", [("a.txt.gz", "line"), ("a.txt", "paragraph"), ("a.txt", "file")]
)
def test_memory_does_not_grow_with_the_length_of_a_record(name, unit, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_RECORD_BYTES", 1 << 16)
    monkeypatch.setattr(formats, "CHUNK_BYTES", 1 << 16)
    short = b"a short line of text\n"
    dump.pack(tmp_path / name, [short + b"x" * (1 << 23) + b"\n" + short * (1 << 17)])
    (source_file,) = sources.list_files(str(tmp_path / name), unit=unit)
    tracemalloc.start()
    before = pyarrow.total_allocated_bytes()
    count = sum(1 for _ in source_file.raw_records())
    peak = tracemalloc.get_traced_memory()[1] + pyarrow.total_allocated_bytes() - before
    tracemalloc.stop()
    assert count == {"line": 2 + (1 << 17), "paragraph": 1, "file": 1}[unit]
    assert peak < 1 << 20


def test_the_error_for_a_wrong_column_lists_the_columns(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(TEXTS))
    (tmp_path / "a.tsv").write_bytes(as_tsv(LINES))
    write_parquet(tmp_path / "a.parquet", TEXTS)
    write_array_record(tmp_path / "a.array_record", as_jsonl(TEXTS).splitlines())
    for name in ("a.jsonl", "a.tsv", "a.parquet"):
        with pytest.raises(ValueError, match=rf"{name} has no column 'tex'; .* id, text; did you"):
            read(tmp_path / name, column="tex")
    with pytest.raises(ValueError, match=r"'id' of .*a\.parquet is int64, not string"):
        read(tmp_path / "a.parquet", column="id")
    assert set(reasons(tmp_path / "a.array_record", column="tex").values()) == {"no column 'tex'"}
    (tmp_path / "b.tsv").write_text("")
    with pytest.raises(ValueError, match="has no header: .*; write the names of the columns there"):
        read(tmp_path / "b.tsv")
    (tmp_path / "b.tsv").write_text("text\ttext\na\tb\n")
    with pytest.raises(ValueError, match="has the column 'text' more than once in its header"):
        read(tmp_path / "b.tsv")
    (tmp_path / "b.tsv").write_bytes(b"\xff\t\n")
    with pytest.raises(ValueError, match=r"b\.tsv cannot be read: invalid UTF-8"):
        read(tmp_path / "b.tsv")


def make_tree(root) -> None:
    """Write files of known, unknown and hidden names below root."""
    for name in ("b.txt", "a.jsonl", "deep/er/c.txt", ".hidden/d.txt", "deep/.e.txt", "notes.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text('{"text": "x"}\n')
    (root / "w-multistream-index.txt.bz2").write_bytes(b"no text")


def test_a_source_lists_paths_folders_and_globs_each_file_once_and_sorted(tmp_path, monkeypatch):
    make_tree(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = lambda source: [source_file.name for source_file in sources.list_files(source)]
    assert names(".") == ["a.jsonl", "b.txt", "deep/er/c.txt"]
    assert names("**/*.txt") == ["b.txt", "deep/er/c.txt"]
    assert names("b.txt, ./deep,*.txt , a.jsonl") == ["b.txt", "deep/er/c.txt", "a.jsonl"]
    assert names(f"b.txt,{tmp_path}/b.txt") == ["b.txt"]
    assert [source_file.kind for source_file in sources.list_files(".")] == [
        "jsonl",
        "text",
        "text",
    ]
    for name in ("w-pages-articles.xml.bz2", "w-pages-articles1.xml-p1p41242.bz2", "w.xml"):
        (tmp_path / name).write_text("")
        assert [source_file.kind for source_file in sources.list_files(name)] == ["wikipedia"]


def test_a_file_name_may_contain_wildcards(tmp_path):
    names = ["a[1].txt", "b*.txt", "c?d.txt", "e %20#.txt", "f::g.txt", "h{1}.txt", "é.txt"]
    for name in names:
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == names
    for name in names:
        assert read(tmp_path / name) == [name]
        (source_file,) = sources.list_files(str(tmp_path / name))
        assert source_file.size() == len(name.encode())


def test_an_item_without_a_file_is_refused_with_a_message(tmp_path):
    make_tree(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "to").symlink_to("nowhere")
    for source, message in {
        "": "--source is empty",
        f"{tmp_path}/a.jsonll": r"no such file, folder or match; did you mean 'a\.jsonl'\?",
        f"{tmp_path}/*.json": r"no such file, folder or match",
        f"{tmp_path}/empty": "no such file",
        f"{tmp_path}/notes.md": r"notes\.md has none of the suffixes read here: \.txt, \.jsonl",
        f"{tmp_path}/*": "has none of the suffixes",
        f"{tmp_path}/to": r"there is no such file, folder or match\.$",
        "tfds:": "names no dataset; give it as tfds:name@split",
        f"{tmp_path}/w-multistream-index.txt.bz2": "has none of the suffixes",
        "memory://nowhere/*.txt": "no such file",
        "nonsense://a/b.txt": "Protocol not known: nonsense; give a path, or gs://",
    }.items():
        with pytest.raises(ValueError, match=message):
            sources.list_files(source)
    with pytest.raises(ValueError, match=r"--column='x': no file .* has columns"):
        sources.list_files(f"{tmp_path}/b.txt", column="x")
    with pytest.raises(ValueError, match=r"--unit='line': no file .* is plain text"):
        sources.list_files(f"{tmp_path}/a.jsonl", unit="line")
    with pytest.raises(ValueError, match="did you mean 'line'"):
        sources.list_files(f"{tmp_path}/b.txt", unit="lines")


def test_a_remote_file_is_read_as_a_local_one(tmp_path):
    remote = fsspec.filesystem("memory")
    dump.pack(tmp_path / "a.jsonl.gz", [as_jsonl(TEXTS)])
    write_parquet(tmp_path / "b.parquet", TEXTS)
    for file in tmp_path.iterdir():
        remote.pipe(f"/bucket/deep/{file.name}", file.read_bytes())
    remote.pipe("/bucket/deep/c.array_record", b"")
    (source_file,) = sources.list_files("memory://bucket/**/*.gz")
    assert (
        source_file.digest() == hashlib.sha256((tmp_path / "a.jsonl.gz").read_bytes()).hexdigest()
    )
    assert source_file.size() == (tmp_path / "a.jsonl.gz").stat().st_size
    assert read("memory://bucket/deep/*.gz,memory://bucket/deep/b.parquet") == TEXTS * 2
    with pytest.raises(ValueError, match="ArrayRecord is read from local files; copy it"):
        sources.list_files("memory://bucket")
    remote.rm("/bucket", recursive=True)


def test_the_error_for_a_missing_package_names_pip_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(
        ValueError, match=r"--source=gs://bucket/a\.txt: .*install gcsfs .*, with pip install"
    ):
        sources.list_files("gs://bucket/a.txt")


def test_a_source_file_pickles_small_and_reads_the_same(tmp_path):
    dump.pack(tmp_path / "a.jsonl.gz", [as_jsonl(TEXTS * 100)])
    (source_file,) = sources.list_files(str(tmp_path))
    pickled = pickle.dumps(source_file)
    assert len(pickled) < 400 + len(str(tmp_path))
    unpickled = pickle.loads(pickled)
    assert unpickled == source_file
    assert list(unpickled.raw_records()) == list(source_file.raw_records())


def test_a_deleted_file_is_refused_with_a_message(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (source_file,) = sources.list_files(str(tmp_path))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"a\.txt cannot be read after its first 0 records"):
        list(source_file.raw_records())
