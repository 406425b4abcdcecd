"""A dump of Wikipedia: its XML to pages, a page to the prose of its article.

Source: https://www.mediawiki.org/xml/export-0.11.xsd. Dumps in one stream or many, whole or in
parts, are read alike, in constant memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree import ElementTree

from lm.sources import documents, formats, wiki_names, wikitext

PAGE_START, PAGE_END, DUMP_END = b"<page>", b"</page>", b"</mediawiki>"
TRUNCATED = "it is cut short: it ends without </mediawiki>"

# A link to one of these namespaces shows a picture in an article, or nothing.
HIDDEN_NAMESPACES = {"-2": "media", "6": "file", "14": "category"}
NAMESPACE = re.compile(r'<namespace key="(-?\d+)"[^>]*>([^<]*)<')

REDIRECT = re.compile(r"\s*#\s*redirect\b", re.IGNORECASE)

# A disambiguation page has one of these templates, or says so in its title.
PREFIXED_TEMPLATE = rf"(?:[\w–-][\w –-]*[ _])?(?:{'|'.join(wiki_names.PREFIXED_DISAMBIGUATION_TEMPLATES)})(?:[ _]cleanup)?"
DISAMBIGUATION_TEMPLATE = re.compile(
    rf"__DISAMBIG__|\{{\{{\s*(?:{'|'.join(wiki_names.DISAMBIGUATION_TEMPLATES)}|{PREFIXED_TEMPLATE})\s*(?:\||\}}\}})",
    re.IGNORECASE,
)
IGNORED_MARKUP = re.compile(
    r"<!--.*?(?:-->|\Z)|<nowiki>.*?(?:</nowiki>|\Z)", re.DOTALL | re.IGNORECASE
)
DISAMBIGUATION_TITLE = re.compile(
    rf"[(（](?:{'|'.join(wiki_names.DISAMBIGUATION_TITLES)})[)）]$", re.IGNORECASE
)


def read_pages(part) -> Iterator[dict]:
    """The pages of a dump: {"page": its XML, "hidden": prefixes of links that show no text}.

    A file may hold several dumps, one after the other. Inside a page "<" is escaped, so that a
    search for its tags finds nothing else.
    Raises EOFError for a dump that was cut short, ValueError for XML of another kind.
    """
    with formats.open_decompressed(part.name) as stream:
        held = bytearray()
        _skip_space(stream, held)
        while True:
            if b"<mediawiki" not in held:
                raise ValueError(
                    f"{part.name} is not an XML export of MediaWiki from {bytes(held[:60])!r} on; "
                    f"give a dump of pages, and nothing else in its file."
                )
            yield from _read_dump(stream, held, part.name)
            _skip_space(stream, held)
            if not held:
                return


def _skip_space(stream, held: bytearray) -> None:
    """Drop white space, and hold a chunk of what follows it; of an archive's end, nothing."""
    held[:] = held.lstrip()
    while len(held) < formats.CHUNK_BYTES and (chunk := stream.read(formats.CHUNK_BYTES)):
        held += chunk
        held[:] = held.lstrip()


def _read_dump(stream, held: bytearray, name: str) -> Iterator[dict]:
    """The pages up to </mediawiki>."""
    header = bytearray(tag := _read_until(stream, held, b">"))
    while not tag.endswith((PAGE_START, DUMP_END)) and len(header) <= documents.MAX_RECORD_BYTES:
        header += (tag := _read_until(stream, held, b">"))
    hidden, mark = _hidden_prefixes(bytes(header)), tag[tag.rfind(b"<") :]
    while mark == PAGE_START:
        page = PAGE_START + _read_until(stream, held, PAGE_END)
        long = len(page) > documents.MAX_RECORD_BYTES
        yield documents.oversized_record(page) if long else {"page": page, "hidden": hidden}
        mark = _read_until(stream, held, b">").strip()
    if mark != DUMP_END:
        raise ValueError(f"{name} has {mark[:60]!r} between pages; give a dump of pages.")


def _read_until(stream, held: bytearray, mark: bytes) -> bytes:
    """What comes up to the mark, and the mark; of more than LIMIT bytes, LIMIT + 1 of them."""
    start, searched = b"", 0
    while (found := held.find(mark, searched)) < 0:
        searched = max(0, len(held) - len(mark) + 1)
        if searched > documents.MAX_RECORD_BYTES:
            start = start or bytes(held[: documents.MAX_RECORD_BYTES + 1])
            del held[:searched]
            searched = 0
        chunk = stream.read(formats.CHUNK_BYTES)
        if not chunk:
            raise EOFError(TRUNCATED)
        held += chunk
    text = start or bytes(held[: found + len(mark)])
    del held[: found + len(mark)]
    return text


def _hidden_prefixes(header: bytes) -> tuple[str, ...]:
    """The prefixes of media, files and categories: English ones hold in every wiki."""
    local = NAMESPACE.findall(header.decode("utf-8", errors="ignore"))
    names = {name.casefold() for key, name in local if key in HIDDEN_NAMESPACES and name}
    return tuple(sorted({*HIDDEN_NAMESPACES.values(), "image", *names}))


def parse_page(part, raw: dict) -> documents.Document:
    """The prose of a page, without its title, or the rule that drops the page.

    namespace: not an article; redirect; content: an article that is not wikitext;
    disambiguation; empty: no prose is left. Of several revisions the last counts.
    """
    try:
        page = ElementTree.fromstring(documents.decode_utf8(raw["page"]))
    except ElementTree.ParseError as error:
        raise documents.BadRecord(f"XML: {error}") from None
    revisions = page.findall("revision")
    if page.find("ns") is None or not revisions:
        raise documents.BadRecord("XML: a page without <ns> or <revision>")
    text = revisions[-1].findtext("text") or ""
    if page.findtext("ns").strip() != "0":
        return documents.Document("", "namespace")
    if page.find("redirect") is not None or REDIRECT.match(text):
        return documents.Document("", "redirect")
    if revisions[-1].findtext("model", "wikitext") != "wikitext":
        return documents.Document("", "content")
    if DISAMBIGUATION_TITLE.search(
        page.findtext("title", "").strip()
    ) or DISAMBIGUATION_TEMPLATE.search(IGNORED_MARKUP.sub("", text)):
        return documents.Document("", "disambiguation")
    return documents.to_document(wikitext.prose(text, raw["hidden"]))
