"""Laws of a dump of Wikipedia: every page once, prose as a reader reads it, in constant memory."""

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


def the_part(path) -> sources.SourceFile:
    (part,) = sources.list_files(str(path))
    return part


def told(path) -> list[tuple[str, str]]:
    part = the_part(path)
    return [tuple(part.document(raw)) for raw in part.raw_records()]


def wanted(pages=dump.PAGES) -> list[tuple[str, str]]:
    return [(page.prose, page.dropped) for page in pages]


def tree(text: str) -> dict:
    """A raw record of a page with this body."""
    page = dump.page_xml(dump.Page("Title", text), 1)
    return {"page": page.strip().encode(), "hidden": wikitext.HIDDEN_PREFIXES}


@pytest.fixture
def part(tmp_path) -> sources.SourceFile:
    dump.write_dump(tmp_path / "mini.xml")
    return the_part(tmp_path / "mini.xml")


@pytest.mark.parametrize("page", dump.PAGES, ids=lambda page: page.title)
def test_a_page_is_told_as_it_is_read_by_hand(page, part):
    raw = {"page": dump.page_xml(page, 1).strip().encode(), "hidden": wikitext.HIDDEN_PREFIXES}
    assert part.document(raw) == (page.prose, page.dropped)


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".zst"])
@pytest.mark.parametrize("streams", [1, 2, 5])
def test_a_dump_is_the_same_pages_whatever_its_compression_and_streams(suffix, streams, tmp_path):
    path = tmp_path / f"mini.xml{suffix}"
    assert dump.write_dump(path, copies=2, streams=streams) == 2 * len(dump.PAGES)
    assert told(path) == wanted() * 2


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_where_a_chunk_ends_makes_no_difference(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "CHUNK_BYTES", max(chunk, len(dump.header_xml())))
    path = tmp_path / "mini.xml"
    dump.write_dump(path, pages=dump.PAGES[-8:])
    part = the_part(path)
    stream = part.raw_records()
    first = next(stream)
    monkeypatch.setattr(formats, "CHUNK_BYTES", chunk)
    assert [part.document(raw) for raw in (first, *stream)] == wanted(dump.PAGES[-8:])


def test_the_pages_are_those_of_the_whole_xml(part):
    root = ElementTree.parse(part.name).getroot()
    pages = [ElementTree.fromstring(raw["page"]) for raw in part.raw_records()]
    whole = root.findall(f"{EXPORT}page")
    assert len(pages) == len(whole) == len(dump.PAGES)
    for ours, theirs in zip(pages, whole, strict=True):
        words = lambda page: [(n.tag.removeprefix(EXPORT), n.text, n.items()) for n in page.iter()]
        assert words(ours) == words(theirs)


def test_a_wiki_of_another_language_has_prefixes_and_words_of_its_own(tmp_path):
    dump.write_dump(tmp_path / "de.xml", pages=dump.GERMAN_PAGES, namespaces=dump.GERMAN)
    assert told(tmp_path / "de.xml") == wanted(dump.GERMAN_PAGES)
    raw = next(the_part(tmp_path / "de.xml").raw_records())
    assert set(raw["hidden"]) == {
        "category",
        "datei",
        "file",
        "image",
        "kategorie",
        "media",
        "medium",
    }


@pytest.mark.parametrize("word", wiki_names.DISAMBIGUATIONS)
def test_every_mark_of_a_disambiguation_is_one_as_a_template_alone(word, part):
    for text in (f"x {{{{{word}}}}}", f"x {{{{ {word.capitalize()} |y}}}}"):
        assert part.document(tree(text)) == ("", "disambiguation")
    for text in (
        f"The word {word}.",
        f"x {{{{nota {word[:-1]}}}}}",
        f"x {{{{{word} needed}}}}",
        f"x {{{{other|{word}}}}}",
    ):
        assert not part.document(tree(text)).drop_reason


@pytest.mark.parametrize("word", wiki_names.DISAMBIGUATION_TITLES)
def test_a_title_says_that_a_page_is_a_disambiguation(word, part):
    for title, dropped in ((f"X ({word})", True), (f"X （{word}）", True), (word, False)):
        xml = dump.page_xml(dump.Page(title, "Text."), 1).strip().encode()
        document = part.document({"page": xml, "hidden": wikitext.HIDDEN_PREFIXES})
        assert document == (("", "disambiguation") if dropped else ("Text.", ""))


@pytest.mark.parametrize("title", sorted(wiki_names.REFERENCE_SECTIONS))
def test_a_section_of_references_goes_with_those_below_it(title):
    text = f"A.\n== {title.capitalize()} ==\nx\n=== Y ===\ny\n== Z ==\nz"
    assert wikitext.prose(text) == "A.\n\nZ\n\nz"


def test_of_several_revisions_the_last_is_told(part):
    raw = tree("Later.")
    start, _, end = raw["page"].partition(b"    <revision>")
    earlier = b"    <revision><text>Earlier.</text></revision>\n    <revision>"
    assert part.document(raw | {"page": start + earlier + end}).text == "Later."


def test_a_page_that_is_no_page_is_bad_with_its_reason(part):
    for page, reason in {
        b"<page><title>x</page>": "XML: mismatched tag",
        b"<page><ns>0</ns>&undefined;</page>": "XML: undefined entity",
        b"<page><!DOCTYPE x></page>": "XML: ",
        b"<page>\xff</page>": "invalid UTF-8 at byte 6",
        b"<page><ns>0</ns></page>": "XML: a page without <ns> or <revision>",
        b"<page><revision/></page>": "XML: a page without <ns> or <revision>",
    }.items():
        with pytest.raises(sources.BadRecord, match=reason):
            part.document({"page": page, "hidden": ()})


def test_xml_that_is_no_dump_is_refused(tmp_path):
    path = tmp_path / "a.xml"
    for text, words in {
        "": "a.xml is not an XML export of MediaWiki from b'' on",
        "<rss><item/></rss>": "a.xml is not an XML export of MediaWiki from b'<rss><item/></rss>'",
        "<mediawiki></mediawiki>\n junk": "is not an XML export of MediaWiki from b'junk' on",
        "<mediawiki><siteinfo/>": "after its first 0 records: it is cut short",
        "<mediawiki><page><ns>0</ns></page><odd/></mediawiki>": "has b'<odd/>' between pages",
        "<mediawiki><page><ns>0</ns></page>": "after its first 1 records: it is cut short",
        "<mediawiki><page><ns>0</ns>": "after its first 0 records: it is cut short",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            list(the_part(path).raw_records())


@pytest.mark.parametrize("suffix", ["", ".bz2"])
def test_dumps_one_after_the_other_are_read_to_the_end_of_the_last(suffix, tmp_path):
    dump.write_dump(tmp_path / "a.xml")
    dump.write_dump(tmp_path / "de.xml", pages=dump.GERMAN_PAGES, namespaces=dump.GERMAN)
    english, german = ((tmp_path / name).read_bytes() for name in ("a.xml", "de.xml"))
    none = dump.header_xml().encode() + b"</mediawiki>"
    for blocks, pages in {
        (english, german): [*dump.PAGES, *dump.GERMAN_PAGES],
        (none, b"\n", b'<?xml version="1.0"?>' + german): dump.GERMAN_PAGES,
        (none,): [],
    }.items():
        dump.pack(tmp_path / f"both.xml{suffix}", list(blocks))
        assert told(tmp_path / f"both.xml{suffix}") == wanted(pages)
    dump.pack(tmp_path / f"both.xml{suffix}", [english, german[:-4]])
    with pytest.raises(ValueError, match=r"after its first \d+ records: it is cut short"):
        told(tmp_path / f"both.xml{suffix}")


def test_a_page_beyond_the_limit_is_bad_and_the_next_is_read(tmp_path, monkeypatch):
    pages = [dump.Page(str(n), "x" * n) for n in (10, 2000, 30, 200_000, 50)]
    dump.write_dump(tmp_path / "a.xml.bz2", pages=pages)
    sizes = [len(dump.page_xml(page, 1 + i).strip()) for i, page in enumerate(pages)]
    monkeypatch.setattr(documents, "MAX_RECORD_BYTES", sizes[1] - 1)
    part, found = the_part(tmp_path / "a.xml.bz2"), []
    for raw in part.raw_records():
        try:
            found.append(part.document(raw).text)
        except sources.BadRecord as error:
            found.append(str(error))
            assert raw["excerpt"].startswith(b"<page>")
    long = f"longer than {sizes[1] - 1:,} bytes"
    assert found == ["x" * 10, long, "x" * 30, long, "x" * 50]
    monkeypatch.setattr(documents, "MAX_RECORD_BYTES", sizes[1])
    assert "unreadable" not in list(part.raw_records())[1]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst"])
def test_an_archive_is_read_to_its_end_which_alone_shows_that_it_is_whole(suffix, tmp_path):
    path = tmp_path / f"a.xml{suffix}"
    dump.write_dump(path)
    dump.pack(tmp_path / f"b{suffix}", [b" " * (3 << 20)])
    whole = path.read_bytes() + (tmp_path / f"b{suffix}").read_bytes()
    path.write_bytes(whole)
    assert told(path) == wanted()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"after its first {len(dump.PAGES)} records"):
        told(path)


@pytest.mark.parametrize("suffix", ["", ".bz2"])
def test_memory_is_bounded_whatever_the_length_of_a_dump(suffix, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_RECORD_BYTES", 1 << 16)
    monkeypatch.setattr(formats, "CHUNK_BYTES", 1 << 16)
    endless = dump.Page("Endless", "x" * (1 << 20))
    dump.write_dump(tmp_path / f"a.xml{suffix}", copies=12, pages=(*dump.PAGES, endless)[-18:])
    part = the_part(tmp_path / f"a.xml{suffix}")
    next(part.raw_records())
    tracemalloc.start()
    held = pyarrow.total_allocated_bytes()
    assert sum(1 for _ in part.raw_records()) == 12 * 18
    peak = tracemalloc.get_traced_memory()[1] + pyarrow.total_allocated_bytes() - held
    tracemalloc.stop()
    assert peak < 1 << 20


PIECES = r"""{{ }} [[ ]] {{{ }}} | = '' ''' {| |} |- <ref> </ref> <ref/> <!-- --> == === * # ; :
<nowiki> </nowiki> <div> </div> <math> </math> &amp; &#x41; &bad; &#xFFFFFFF; ( ) , . http://x.y
[http://x a] [ ] __TOC__ File: a b c <br> </br> <p> </p> < > ~~~~ -{ }-"""


def random_markup(rng: random.Random) -> str:
    return "".join(rng.choice([*PIECES.split(), " ", "\n"]) for _ in range(rng.randrange(60)))


def test_no_markup_makes_the_reading_fail_or_leaves_its_own_marks():
    rng = random.Random(0)
    for _ in range(1500):
        text = random_markup(rng)
        prose = wikitext.prose(text)
        assert not re.search("[\1\2\3]", prose), text
        assert prose == prose.strip() and "\n\n\n" not in prose, text


def test_prose_without_markup_is_itself():
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


def test_words_are_those_of_the_parser_s_own_tree():
    beside = re.compile(r"<ref.*?(/>|</ref>)|\{\|.*?\|\}|\[\[File:.*?\n", re.DOTALL)
    by_templates = {"oter", "kg", "km", "no", *map(str, range(60))}
    for page in (dump.ANATOMY, dump.HEADINGS, dump.RIVERS):
        theirs = mwparserfromhell.parse(beside.sub("", page.text)).strip_code()
        ours = re.findall(r"\w+", wikitext.prose(page.text))
        assert len(ours) > 8
        assert set(ours) - by_templates <= set(re.findall(r"\w+", theirs))


def test_the_tokens_in_python_are_told_as_those_in_c(monkeypatch):
    told = [wikitext.prose(page.text) for page in dump.PAGES[:11]]
    monkeypatch.setattr(mwparserfromhell.parser, "CTokenizer", None)
    assert [wikitext.prose(page.text) for page in dump.PAGES[:11]] == told


def test_convert_shows_all_numbers_up_to_its_first_unit_to_convert():
    for made, shown in {
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
        assert wikitext.prose(f"{{{{convert|{made}}}}}") == shown


def test_a_bar_within_a_line_is_no_table():
    for text, prose in {
        "P(''A''|''B'') and [[x]]|y stay": "P(A|B) and x|y stay",
        "a\n| b\n |- c\nd": "a\n\nd",
    }.items():
        assert wikitext.prose(text) == prose


def test_gaps_leave_no_brackets_and_no_doubled_commas():
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


STALLS = [
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
STALLS += ["[//", "}}<b>", "<b>[[a|</b>]]", "{{a|<b>}}</b>", '<b a="{{x|">}}</b>']


@pytest.mark.parametrize("opened", STALLS)
def test_markup_without_any_end_is_bad_and_not_a_stall(opened):
    words = "wikitext: 9,000 templates, tables, links, comments or tags have no end"
    with pytest.raises(sources.BadRecord, match=words):
        wikitext.prose(opened * 9_000)


def test_what_ends_one_kind_of_markup_ends_no_other():
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
def test_a_tag_without_its_last_bracket_neither_ends_nor_ends_another(text):
    with pytest.raises(sources.BadRecord, match="have no end"):
        wikitext.prose(text)  # seconds, were it parsed


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


def test_paragraphs_need_no_end_however_many_there_are():
    line = "word " * 40
    assert wikitext.prose(f"<p>{line}" * 2_000) == "\n\n".join([line.strip()] * 2_000)
    for text in ("<p>" * 90_000, "<p>" * 9_000 + "</p>" * 9_000):
        assert wikitext.prose(text) == ""  # minutes, were it quadratic


def test_markup_that_ends_is_told_however_much_there_is():
    pieces = ("{{x|{{y}}}}", "{|\n|a\n|}\n", "<!-- x -->", "<b>b</b>", "<br>", "<br />", "<li>c")
    pieces += ("<ref name=a />", "[[d|e]]", "[http://x f]", "<math>{{{{x</math>", "|}}", "}} ]] g")
    for piece in pieces:
        assert "end" in wikitext.prose(f"\n{piece}" * 2_000 + "\nend")


@pytest.mark.parametrize("run", [" ", "\n", "a ", "a dab ", "_", "<!--", "<nowiki>"])
def test_a_mark_is_looked_for_in_the_time_of_one_reading(run, part):
    text = wikipedia.COMMENT_OR_NOWIKI.sub("", "{{" + run * 200_000)
    assert not wikipedia.DISAMBIGUATION_TEMPLATE.search(text)  # minutes, were it quadratic


def test_long_runs_take_no_longer_than_their_length():
    for piece in ("''", "*", ",", "{{x}}, ", "({{x}},", "\n", "__a", "<br>", " \t"):
        text = piece * 5_000
        wikitext.prose(text + "{{x}}")  # seconds, were any of it quadratic


def test_a_page_is_told_alike_by_every_process_from_its_bytes_alone(part):
    lonely = sources.SourceFile("nowhere.xml", "wikipedia")
    for raw in part.raw_records():
        assert lonely.document(raw) == part.document(raw)
