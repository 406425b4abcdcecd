"""Tests of Wikipedia dumps: every page once, prose as a reader sees it, in constant memory."""

from __future__ import annotations

import random
import re
import tracemalloc
from xml.etree import ElementTree

import mwparserfromhell
import pyarrow
import pytest

from lm import sources
from lm.sources import documents, formats, wiki_names, wikipedia, wikitext
from tests import dump

EXPORT = "{http://www.mediawiki.org/xml/export-0.11/}"


def open_dump(path) -> sources.SourceFile:
    (source_file,) = sources.list_files(str(path))
    return source_file


def read(path) -> list[tuple[str, str]]:
    source_file = open_dump(path)
    return [tuple(source_file.document(raw)) for raw in source_file.raw_records()]


def expected(pages=dump.PAGES) -> list[tuple[str, str]]:
    return [(page.prose, page.dropped) for page in pages]


def raw_page(text: str) -> dict:
    """The raw record of a page with this wikitext."""
    page = dump.page_xml(dump.Page("Title", text), 1)
    return {"page": page.strip().encode(), "hidden": wikitext.HIDDEN_PREFIXES}


@pytest.fixture
def source_file(tmp_path) -> sources.SourceFile:
    dump.write_dump(tmp_path / "mini.xml")
    return open_dump(tmp_path / "mini.xml")


@pytest.mark.parametrize("page", dump.PAGES, ids=lambda page: page.title)
def test_a_page_gives_the_prose_written_by_hand(page, source_file):
    raw = {"page": dump.page_xml(page, 1).strip().encode(), "hidden": wikitext.HIDDEN_PREFIXES}
    assert source_file.document(raw) == (page.prose, page.dropped)


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".zst"])
@pytest.mark.parametrize("streams", [1, 2, 5])
def test_compression_and_streams_do_not_change_the_pages(suffix, streams, tmp_path):
    path = tmp_path / f"mini.xml{suffix}"
    assert dump.write_dump(path, copies=2, streams=streams) == 2 * len(dump.PAGES)
    assert read(path) == expected() * 2


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_the_chunk_size_does_not_change_the_pages(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "CHUNK_BYTES", max(chunk, len(dump.header_xml())))
    path = tmp_path / "mini.xml"
    dump.write_dump(path, pages=dump.PAGES[-8:])
    source_file = open_dump(path)
    stream = source_file.raw_records()
    first = next(stream)
    monkeypatch.setattr(formats, "CHUNK_BYTES", chunk)
    assert [source_file.document(raw) for raw in (first, *stream)] == expected(dump.PAGES[-8:])


def test_the_pages_equal_those_of_an_xml_parser(source_file):
    root = ElementTree.parse(source_file.name).getroot()
    pages = [ElementTree.fromstring(raw["page"]) for raw in source_file.raw_records()]
    whole = root.findall(f"{EXPORT}page")
    assert len(pages) == len(whole) == len(dump.PAGES)
    for page, reference in zip(pages, whole, strict=True):
        nodes = lambda page: [(n.tag.removeprefix(EXPORT), n.text, n.items()) for n in page.iter()]
        assert nodes(page) == nodes(reference)


def test_a_german_wiki_has_its_own_prefixes_and_names(tmp_path):
    dump.write_dump(tmp_path / "de.xml", pages=dump.GERMAN_PAGES, namespaces=dump.GERMAN)
    assert read(tmp_path / "de.xml") == expected(dump.GERMAN_PAGES)
    raw = next(open_dump(tmp_path / "de.xml").raw_records())
    assert set(raw["hidden"]) == {
        "category",
        "datei",
        "file",
        "image",
        "kategorie",
        "media",
        "medium",
    }


def test_a_disambiguation_mark_counts_only_as_a_template(source_file):
    faults = []
    for word in wiki_names.DISAMBIGUATIONS:
        for text, drop_reason in {
            f"x {{{{{word}}}}}": "disambiguation",
            f"x {{{{ {word.capitalize()} |y}}}}": "disambiguation",
            f"The word {word}.": "",
            f"x {{{{nota {word[:-1]}}}}}": "",
            f"x {{{{{word} needed}}}}": "",
            f"x {{{{other|{word}}}}}": "",
        }.items():
            if source_file.document(raw_page(text)).drop_reason != drop_reason:
                faults.append(text)
    assert not faults


def test_a_disambiguation_mark_in_the_title_must_be_in_brackets(source_file):
    faults = []
    for word in wiki_names.DISAMBIGUATION_TITLES:
        for title, dropped in ((f"X ({word})", True), (f"X （{word}）", True), (word, False)):
            xml = dump.page_xml(dump.Page(title, "Text."), 1).strip().encode()
            document = source_file.document({"page": xml, "hidden": wikitext.HIDDEN_PREFIXES})
            if document != (("", "disambiguation") if dropped else ("Text.", "")):
                faults.append(title)
    assert not faults


def test_a_reference_section_is_removed_with_its_subsections():
    body = "x\n=== Y ===\ny\n== Z ==\nz"
    texts = [f"A.\n== {title.capitalize()} ==\n{body}" for title in wiki_names.REFERENCE_SECTIONS]
    assert not [text for text in texts if wikitext.prose(text) != "A.\n\nZ\n\nz"]


def test_the_last_of_several_revisions_is_used(source_file):
    raw = raw_page("Later.")
    start, _, end = raw["page"].partition(b"    <revision>")
    earlier = b"    <revision><text>Earlier.</text></revision>\n    <revision>"
    assert source_file.document(raw | {"page": start + earlier + end}).text == "Later."


def test_an_invalid_page_is_bad_with_its_reason(source_file):
    for page, reason in {
        b"<page><title>x</page>": "XML: mismatched tag",
        b"<page><ns>0</ns>&undefined;</page>": "XML: undefined entity",
        b"<page><!DOCTYPE x></page>": "XML: ",
        b"<page>\xff</page>": "invalid UTF-8 at byte 6",
        b"<page><ns>0</ns></page>": "XML: a page without <ns> or <revision>",
        b"<page><revision/></page>": "XML: a page without <ns> or <revision>",
    }.items():
        with pytest.raises(sources.BadRecord, match=reason):
            source_file.document({"page": page, "hidden": ()})


def test_xml_that_is_not_a_dump_is_refused(tmp_path):
    path = tmp_path / "a.xml"
    for text, message in {
        "": "a.xml is not an XML export of MediaWiki from b'' on",
        "<rss><item/></rss>": "a.xml is not an XML export of MediaWiki from b'<rss><item/></rss>'",
        "<mediawiki></mediawiki>\n junk": "is not an XML export of MediaWiki from b'junk' on",
        "<mediawiki><siteinfo/>": "after its first 0 records: it is cut short",
        "<mediawiki><page><ns>0</ns></page><odd/></mediawiki>": "has b'<odd/>' between pages",
        "<mediawiki><page><ns>0</ns></page>": "after its first 1 records: it is cut short",
        "<mediawiki><page><ns>0</ns>": "after its first 0 records: it is cut short",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            list(open_dump(path).raw_records())


@pytest.mark.parametrize("suffix", ["", ".bz2"])
def test_concatenated_dumps_are_read_to_the_end(suffix, tmp_path):
    dump.write_dump(tmp_path / "a.xml")
    dump.write_dump(tmp_path / "de.xml", pages=dump.GERMAN_PAGES, namespaces=dump.GERMAN)
    english, german = ((tmp_path / name).read_bytes() for name in ("a.xml", "de.xml"))
    no_pages = dump.header_xml().encode() + b"</mediawiki>"
    for blocks, pages in {
        (english, german): [*dump.PAGES, *dump.GERMAN_PAGES],
        (no_pages, b"\n", b'<?xml version="1.0"?>' + german): dump.GERMAN_PAGES,
        (no_pages,): [],
    }.items():
        dump.pack(tmp_path / f"both.xml{suffix}", list(blocks))
        assert read(tmp_path / f"both.xml{suffix}") == expected(pages)
    dump.pack(tmp_path / f"both.xml{suffix}", [english, german[:-4]])
    with pytest.raises(ValueError, match=r"after its first \d+ records: it is cut short"):
        read(tmp_path / f"both.xml{suffix}")


def test_an_oversized_page_is_bad_and_the_next_is_read(tmp_path, monkeypatch):
    pages = [dump.Page(str(n), "x" * n) for n in (10, 2000, 30, 200_000, 50)]
    dump.write_dump(tmp_path / "a.xml.bz2", pages=pages)
    sizes = [len(dump.page_xml(page, 1 + i).strip()) for i, page in enumerate(pages)]
    monkeypatch.setattr(documents, "MAX_RECORD_BYTES", sizes[1] - 1)
    source_file, texts = open_dump(tmp_path / "a.xml.bz2"), []
    for raw in source_file.raw_records():
        try:
            texts.append(source_file.document(raw).text)
        except sources.BadRecord as error:
            texts.append(str(error))
            assert raw["excerpt"].startswith(b"<page>")
    reason = f"longer than {sizes[1] - 1:,} bytes"
    assert texts == ["x" * 10, reason, "x" * 30, reason, "x" * 50]
    monkeypatch.setattr(documents, "MAX_RECORD_BYTES", sizes[1])
    assert "unreadable" not in list(source_file.raw_records())[1]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst"])
def test_an_archive_is_read_to_its_end_to_detect_truncation(suffix, tmp_path):
    path = tmp_path / f"a.xml{suffix}"
    dump.write_dump(path)
    dump.pack(tmp_path / f"b{suffix}", [b" " * (3 << 20)])
    whole = path.read_bytes() + (tmp_path / f"b{suffix}").read_bytes()
    path.write_bytes(whole)
    assert read(path) == expected()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"after its first {len(dump.PAGES)} records"):
        read(path)


@pytest.mark.parametrize("suffix", ["", ".bz2"])
def test_memory_does_not_grow_with_the_length_of_a_dump(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_RECORD_BYTES", 1 << 16)
    monkeypatch.setattr(formats, "CHUNK_BYTES", 1 << 16)
    endless = dump.Page("Endless", "x" * (1 << 20))
    dump.write_dump(tmp_path / f"a.xml{suffix}", copies=12, pages=(*dump.PAGES, endless)[-18:])
    source_file = open_dump(tmp_path / f"a.xml{suffix}")
    next(source_file.raw_records())
    tracemalloc.start()
    before = pyarrow.total_allocated_bytes()
    assert sum(1 for _ in source_file.raw_records()) == 12 * 18
    peak = tracemalloc.get_traced_memory()[1] + pyarrow.total_allocated_bytes() - before
    tracemalloc.stop()
    assert peak < 1 << 20


MARKUP = r"""{{ }} [[ ]] {{{ }}} | = '' ''' {| |} |- <ref> </ref> <ref/> <!-- --> == === * # ; :
<nowiki> </nowiki> <div> </div> <math> </math> &amp; &#x41; &bad; &#xFFFFFFF; ( ) , . http://x.y
[http://x a] [ ] __TOC__ File: a b c <br> </br> <p> </p> < > ~~~~ -{ }-"""


def random_markup(rng: random.Random) -> str:
    return "".join(rng.choice([*MARKUP.split(), " ", "\n"]) for _ in range(rng.randrange(60)))


def test_random_markup_never_fails_and_leaves_no_internal_marks():
    rng = random.Random(0)
    for _ in range(1500):
        text = random_markup(rng)
        prose = wikitext.prose(text)
        assert not re.search("[\1\2\3]", prose), text
        assert prose == prose.strip() and "\n\n\n" not in prose, text


def test_prose_without_markup_is_unchanged():
    rng = random.Random(1)
    words = [
        "one",
        "two,",
        "(three)",
        "four;",
        "5.5",
        "f()",
        "a/b",
        "水",
        "é",
        "100%",
        "x_y",
        "“q”",
    ]
    for _ in range(300):
        paragraphs = [" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(3)]
        text = "\n\n".join(paragraphs)
        assert wikitext.prose(text) == text
        assert wikitext.prose(wikitext.prose(text) + "{{stub}}<!-- x -->[[Category:X]]") == text


def test_words_equal_those_of_the_parser_s_own_tree():
    removed = re.compile(r"<ref.*?(/>|</ref>)|\{\|.*?\|\}|\[\[File:.*?\n", re.DOTALL)
    from_templates = {"oter", "kg", "km", "no", *map(str, range(60))}
    for page in (dump.ANATOMY, dump.HEADINGS, dump.RIVERS):
        reference = mwparserfromhell.parse(removed.sub("", page.text)).strip_code()
        words = re.findall(r"\w+", wikitext.prose(page.text))
        assert len(words) > 8
        assert set(words) - from_templates <= set(re.findall(r"\w+", reference))


def test_the_python_and_c_tokenizers_give_the_same_prose(monkeypatch):
    compiled = [wikitext.prose(page.text) for page in dump.PAGES[:11]]
    monkeypatch.setattr(mwparserfromhell.parser, "CTokenizer", None)
    assert [wikitext.prose(page.text) for page in dump.PAGES[:11]] == compiled


def test_convert_displays_the_numbers_up_to_the_first_target_unit():
    for arguments, expected_text in {
        "5|ft|6|in|cm": "5 ft 6 in",
        "5|ft|1": "5 ft",
        "1|and|2|lb": "1 and 2 lb",
        "1|mi|40|chain|km": "1 mi 40 chain",
        "1|mi|300|yd|km": "1 mi 300 yd",
        "3|,|5|and|7|m|ft": "3, 5 and 7 m",
        "3|to about|5|m": "3 to about 5 m",
        "-5|to|−3|C|F|0": "-5 to −3 C",
        "6|ft|½|in": "6 ft ½ in",
        "2|to": "2 to",
    }.items():
        assert wikitext.prose(f"{{{{convert|{arguments}}}}}") == expected_text


def test_a_bar_within_a_line_is_not_a_table():
    for text, prose in {
        "P(''A''|''B'') and [[x]]|y stay": "P(A|B) and x|y stay",
        "a\n| b\n |- c\nd": "a\n\nd",
    }.items():
        assert wikitext.prose(text) == prose


def test_gaps_leave_no_empty_brackets_and_no_doubled_commas():
    for text, prose in {
        "A ({{x}}) b": "A b",
        "A ({{x}}, {{y}}; {{z}}) b": "A b",
        "A ({{x}}; born 1) b": "A (born 1) b",
        "A (born 1, {{x}}) b": "A (born 1) b",
        "A (b {{x}} c) d": "A (b c) d",
        "A, {{x}}, b": "A, b",
        "A {{x}}, b": "A, b",
        "A {{x}}.": "A.",
        "A{{x}} b{{y}}c": "A bc",
        "f() and ( ) stay": "f() and ( ) stay",
        "12:30{{x}}, 1,000": "12:30, 1,000",
        "{{x}}, b": "b",
        "one\n{{x}}\ntwo": "one\ntwo",
        "one\n\n{{x}}\n\ntwo": "one\n\ntwo",
        "（{{x}}）水": "水",
    }.items():
        assert wikitext.prose(text) == prose


NEVER_CLOSED = [
    "<div>",
    "<ref>",
    "<!--",
    "{|\n|\n",
    "{{a|",
    "<br ",
    "{|\n|-\n|a |}\n",
    "<pre></b>",
    "[[a|",
]
NEVER_CLOSED += ["[//", "}}<b>", "<b>[[a|</b>]]", "{{a|<b>}}</b>", '<b a="{{x|">}}</b>']


@pytest.mark.parametrize("opened", NEVER_CLOSED)
def test_markup_that_is_never_closed_is_bad_and_does_not_stall(opened):
    message = "wikitext: 9,000 templates, tables, links, comments or tags have no end"
    with pytest.raises(sources.BadRecord, match=message):
        wikitext.prose(opened * 9_000)


def test_closing_one_kind_of_markup_closes_no_other():
    with pytest.raises(sources.BadRecord, match="wikitext: 7,000 templates"):
        wikitext.prose("<b>" * 7_000 + "{{x|}}" * 7_000)


@pytest.mark.parametrize(
    "text",
    [
        "<br " * 2_000 + "</x " * 2_000,
        "<br {{x|}} " * 1_500,
        "<br {{x " * 3_000,
        "<p></nowiki>" * 3_000,
    ],
    ids=lambda text: text[:12],
)
def test_an_incomplete_tag_neither_closes_nor_is_closed(text):
    with pytest.raises(sources.BadRecord, match="have no end"):
        wikitext.prose(text)  # would take seconds if it were parsed


@pytest.mark.parametrize("opened, closed", ["{}", ("{{{", "}}}"), ("{{{{{", "}}}}}")])
def test_markup_nested_too_deep_is_bad(opened, closed):
    deep = 1_600 // len(opened)
    with pytest.raises(sources.BadRecord, match="wikitext: nested too deep"):
        wikitext.prose(opened * deep + closed * deep)


def test_a_tag_may_have_templates_in_its_attributes():
    cell = '|-\n| <span style="background:{{party color|X}}">X</span> || 12,345 || words\n'
    for times in (1, 300):
        text = "{|\n" + cell * times + "|}\n" + "Prose. " * 9_000
        assert wikitext.prose(text) == ("Prose. " * 9_000).strip()


def test_paragraph_tags_need_no_end():
    line = "word " * 40
    assert wikitext.prose(f"<p>{line}" * 2_000) == "\n\n".join([line.strip()] * 2_000)
    for text in ("<p>" * 90_000, "<p>" * 9_000 + "</p>" * 9_000):
        assert wikitext.prose(text) == ""  # would take minutes if it were quadratic


def test_any_amount_of_closed_markup_is_read():
    pieces = ("{{x|{{y}}}}", "{|\n|a\n|}\n", "<!-- x -->", "<b>b</b>", "<br>", "<br />", "<li>c")
    pieces += ("<ref name=a />", "[[d|e]]", "[http://x f]", "<math>{{{{x</math>", "|}}", "}} ]] g")
    for piece in pieces:
        assert "end" in wikitext.prose(f"\n{piece}" * 2_000 + "\nend")


@pytest.mark.parametrize("run", [" ", "\n", "a ", "a dab ", "_", "<!--", "<nowiki>"])
def test_the_search_for_disambiguation_marks_takes_linear_time(run, source_file):
    text = wikipedia.COMMENT_OR_NOWIKI.sub("", "{{" + run * 200_000)
    assert not wikipedia.DISAMBIGUATION_TEMPLATE.search(
        text
    )  # would take minutes if it were quadratic


def test_long_runs_take_linear_time():
    for piece in ("''", "*", ",", "{{x}}, ", "({{x}},", "\n", "__a", "<br>", " \t"):
        text = piece * 5_000
        wikitext.prose(text + "{{x}}")  # would take seconds if any of it were quadratic


def test_a_document_depends_only_on_the_raw_record(source_file):
    other_file = sources.SourceFile("nowhere.xml", "wikipedia")
    for raw in source_file.raw_records():
        assert other_file.document(raw) == source_file.document(raw)
