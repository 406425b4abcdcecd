"""A Wikipedia dump: its XML to pages, and a page to the prose of its article.

Source: https://www.mediawiki.org/xml/export-0.11.xsd. Single-stream, multistream and partial dumps
are read alike, in constant memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from lm.sources import documents, formats, wiki_names, wikitext

if TYPE_CHECKING:
    from lm.sources.source_files import SourceFile

PAGE_START, PAGE_END, DUMP_END = b"<page>", b"</page>", b"</mediawiki>"

# A link to one of these namespaces shows a picture or nothing.
HIDDEN_NAMESPACES = {"-2": "media", "6": "file", "14": "category"}
NAMESPACE = re.compile(r'<namespace key="(-?\d+)"[^>]*>([^<]*)<')

REDIRECT = re.compile(r"\s*#\s*redirect\b", re.IGNORECASE)

# A disambiguation page contains one of these templates, or has a marker in its title.
PREFIXED_TEMPLATE = (
    rf"(?:[\w–-][\w –-]*[ _])?(?:{'|'.join(wiki_names.PREFIXED_DISAMBIGUATIONS)})(?:[ _]cleanup)?"
)
DISAMBIGUATION_TEMPLATE = re.compile(
    rf"__DISAMBIG__"
    rf"|\{{\{{\s*(?:{'|'.join(wiki_names.DISAMBIGUATIONS)}|{PREFIXED_TEMPLATE})\s*(?:\||\}}\}})",
    re.IGNORECASE,
)
DISAMBIGUATION_TITLE = re.compile(
    rf"[(（](?:{'|'.join(wiki_names.DISAMBIGUATION_TITLES)})[)）]$", re.IGNORECASE
)
COMMENT_OR_NOWIKI = re.compile(
    r"<!--.*?(?:-->|\Z)|<nowiki>.*?(?:</nowiki>|\Z)", re.DOTALL | re.IGNORECASE
)


def read_pages(file: SourceFile) -> Iterator[dict]:
    """The pages of a dump: {"page": XML, "hidden": prefixes of links that show no text}.

    A file may hold several dumps in a row. Page text escapes "<", so searching for tags is exact.
    Raises EOFError for a truncated dump, ValueError for other XML.
    """
    with formats.open_decompressed(file.name) as stream:
        buffer = bytearray()
        _skip_space(stream, buffer)
        while True:
            if b"<mediawiki" not in buffer:
                raise ValueError(
                    f"{file.name} is not an XML export of MediaWiki from {bytes(buffer[:60])!r} "
                    f"on; give a dump of pages, and nothing else in its file."
                )
            yield from _read_dump(stream, buffer, file.name)
            _skip_space(stream, buffer)
            if not buffer:
                return


def _skip_space(stream, buffer: bytearray) -> None:
    """Drop leading white space and fill the buffer to CHUNK_BYTES, or to the end of the stream."""
    buffer[:] = buffer.lstrip()
    while len(buffer) < formats.CHUNK_BYTES and (chunk := stream.read(formats.CHUNK_BYTES)):
        buffer += chunk
        buffer[:] = buffer.lstrip()


def _read_dump(stream, buffer: bytearray, name: str) -> Iterator[dict]:
    """The pages up to </mediawiki>."""
    header = bytearray(tag := _read_until(stream, buffer, b">"))
    while not tag.endswith((PAGE_START, DUMP_END)) and len(header) <= documents.MAX_RECORD_BYTES:
        header += (tag := _read_until(stream, buffer, b">"))
    hidden, tag = _hidden_prefixes(bytes(header)), tag[tag.rfind(b"<") :]
    while tag == PAGE_START:
        page = PAGE_START + _read_until(stream, buffer, PAGE_END)
        yield documents.limit_size(page, {"page": page, "hidden": hidden})
        tag = _read_until(stream, buffer, b">").strip()
    if tag != DUMP_END:
        raise ValueError(f"{name} has {tag[:60]!r} between pages; give a dump of pages.")


def _read_until(stream, buffer: bytearray, mark: bytes) -> bytes:
    """The bytes up to and including the mark, cut to MAX_RECORD_BYTES + 1."""
    start, searched = b"", 0
    while (index := buffer.find(mark, searched)) < 0:
        searched = max(0, len(buffer) - len(mark) + 1)
        if searched > documents.MAX_RECORD_BYTES:
            start = start or bytes(buffer[: documents.MAX_RECORD_BYTES + 1])
            del buffer[:searched]
            searched = 0
        chunk = stream.read(formats.CHUNK_BYTES)
        if not chunk:
            raise EOFError("it is cut short: it ends without </mediawiki>")
        buffer += chunk
    text = start or bytes(buffer[: index + len(mark)])
    del buffer[: index + len(mark)]
    return text


def _hidden_prefixes(header: bytes) -> tuple[str, ...]:
    """The link prefixes of media, files and categories: the wiki's own, and the English ones."""
    namespaces = NAMESPACE.findall(header.decode("utf-8", errors="ignore"))
    names = {name.casefold() for key, name in namespaces if key in HIDDEN_NAMESPACES and name}
    return tuple(sorted({*HIDDEN_NAMESPACES.values(), "image", *names}))


def parse_page(file: SourceFile, raw: dict) -> documents.Document:
    """The prose of a page without its title, or the reason why the page is dropped.

    Reasons: namespace (not an article), redirect, content (an article that is not wikitext),
    disambiguation, empty (no prose). The last of several revisions is used.
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
    ) or DISAMBIGUATION_TEMPLATE.search(COMMENT_OR_NOWIKI.sub("", text)):
        return documents.Document("", "disambiguation")
    return documents.to_document(wikitext.prose(text, raw["hidden"]))
