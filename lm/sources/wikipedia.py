"""A dump of Wikipedia: its XML to pages, a page to the prose of its article.

Source: https://www.mediawiki.org/xml/export-0.11.xsd. Dumps in one stream or many, whole or in
parts, are read alike, in constant memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree import ElementTree

from lm.sources import documents, formats, wiki_names, wikitext

FIRST, LAST, END = b"<page>", b"</page>", b"</mediawiki>"
CUT = "it is cut short: it ends without </mediawiki>"

# A link to one of these namespaces shows a picture in an article, or nothing.
HIDDEN = {"-2": "media", "6": "file", "14": "category"}
NAMESPACE = re.compile(r'<namespace key="(-?\d+)"[^>]*>([^<]*)<')

REDIRECT = re.compile(r"\s*#\s*redirect\b", re.IGNORECASE)

# A disambiguation page has one of these templates, or says so in its title.
MIXED = rf"(?:[\w–-][\w –-]*[ _])?(?:{'|'.join(wiki_names.MIXED)})(?:[ _]cleanup)?"
MARKED = re.compile(
    rf"__DISAMBIG__|\{{\{{\s*(?:{'|'.join(wiki_names.MARKS)}|{MIXED})\s*(?:\||\}}\}})",
    re.IGNORECASE,
)
UNREAD = re.compile(r"<!--.*?(?:-->|\Z)|<nowiki>.*?(?:</nowiki>|\Z)", re.DOTALL | re.IGNORECASE)
TITLED = re.compile(rf"[(（](?:{'|'.join(wiki_names.TITLES)})[)）]$", re.IGNORECASE)


def pages(part) -> Iterator[dict]:
    """The pages of a dump: {"page": its XML, "hidden": prefixes of links that show no text}.

    A file may hold several dumps, one after the other. Inside a page "<" is escaped, so that a
    search for its tags finds nothing else.
    Raises EOFError for a dump that was cut short, ValueError for XML of another kind.
    """
    with formats.opened(part.name) as stream:
        held = bytearray()
        _skip_space(stream, held)
        while True:
            if b"<mediawiki" not in held:
                raise ValueError(
                    f"{part.name} is not an XML export of MediaWiki from {bytes(held[:60])!r} on; "
                    f"give a dump of pages, and nothing else in its file."
                )
            yield from _dump(stream, held, part.name)
            _skip_space(stream, held)
            if not held:
                return


def _skip_space(stream, held: bytearray) -> None:
    """Drop white space, and hold a chunk of what follows it; of an archive's end, nothing."""
    held[:] = held.lstrip()
    while len(held) < formats.CHUNK and (chunk := stream.read(formats.CHUNK)):
        held += chunk
        held[:] = held.lstrip()


def _dump(stream, held: bytearray, name: str) -> Iterator[dict]:
    """The pages up to </mediawiki>."""
    header = bytearray(tag := _until(stream, held, b">"))
    while not tag.endswith((FIRST, END)) and len(header) <= documents.LIMIT:
        header += (tag := _until(stream, held, b">"))
    hidden, mark = _hidden(bytes(header)), tag[tag.rfind(b"<") :]
    while mark == FIRST:
        page = FIRST + _until(stream, held, LAST)
        long = len(page) > documents.LIMIT
        yield documents.too_long(page) if long else {"page": page, "hidden": hidden}
        mark = _until(stream, held, b">").strip()
    if mark != END:
        raise ValueError(f"{name} has {mark[:60]!r} between pages; give a dump of pages.")


def _until(stream, held: bytearray, mark: bytes) -> bytes:
    """What comes up to the mark, and the mark; of more than LIMIT bytes, LIMIT + 1 of them."""
    start, searched = b"", 0
    while (found := held.find(mark, searched)) < 0:
        searched = max(0, len(held) - len(mark) + 1)
        if searched > documents.LIMIT:
            start = start or bytes(held[: documents.LIMIT + 1])
            del held[:searched]
            searched = 0
        chunk = stream.read(formats.CHUNK)
        if not chunk:
            raise EOFError(CUT)
        held += chunk
    text = start or bytes(held[: found + len(mark)])
    del held[: found + len(mark)]
    return text


def _hidden(header: bytes) -> tuple[str, ...]:
    """The prefixes of media, files and categories: English ones hold in every wiki."""
    local = NAMESPACE.findall(header.decode("utf-8", errors="ignore"))
    names = {name.casefold() for key, name in local if key in HIDDEN and name}
    return tuple(sorted({*HIDDEN.values(), "image", *names}))


def document(part, raw: dict) -> documents.Document:
    """The prose of a page, without its title, or the rule that drops the page.

    namespace: not an article; redirect; content: an article that is not wikitext;
    disambiguation; empty: no prose is left. Of several revisions the last counts.
    """
    try:
        page = ElementTree.fromstring(documents.decoded(raw["page"]))
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
    if TITLED.search(page.findtext("title", "").strip()) or MARKED.search(UNREAD.sub("", text)):
        return documents.Document("", "disambiguation")
    return documents.document(wikitext.prose(text, raw["hidden"]))
