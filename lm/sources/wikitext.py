"""Wikitext to prose: what a reader of the article reads, without what stands beside the text.

Kept: paragraphs, titles of sections, items of lists as lines, the text of links.
Left out: templates (but for those that stand for a word of the sentence), tables, references,
files, galleries, formulas, listings, categories, languages, comments, addresses, magic words, and
the sections of references and links at an article's end.
"""

from __future__ import annotations

import collections
import html
import re

from lm.sources import documents, wiki_names

# None can occur in XML: where something was left out, an item of a list or a paragraph begins.
GAP, ITEM, PARAGRAPH = "\1", "\2", "\3"

HIDDEN = ("category", "file", "image", "media")
PICTURE = re.compile(r"\.(jpe?g|png|gif|svg|tiff?|webp|xcf|djvu|pdf|og[agv]|webm|midi?|wav|mp3)$")
LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-z]+)*|simple|zh-min-nan")
MAGIC = re.compile(rf"__(?:{'|'.join(wiki_names.MAGIC_WORDS)})__", re.IGNORECASE)
# References and comments are most of the markup, and quicker to find than to parse.
BESIDE = re.compile(
    r"<!--.*?-->|<ref\b[^<>]*/>|<ref\b[^<>]*>(?:[^<]|<(?!/?ref\b))*</ref\s*>",
    re.DOTALL | re.IGNORECASE,
)
# A <p> whose end is left out, as it may be: the parser would search the rest of the text for it.
ENDLESS = re.compile(
    r"<p(?:\s[^<>]*|/)?>(?=(?:[^<]|<(?!/?(?:p|nowiki)[\s/>]))*+(?!</(?:p|nowiki)[\s>]))",
    re.IGNORECASE,
)
SPECIAL = re.compile(r"[\[\]{}'<]")  # what all of MARKUP begins with
MARKUP = re.compile(  # what is unbalanced stays text to the parser
    r"\[\[|\]\]|\{\{|\}\}|'{2,}"
    r"|</?(?:ref|references|div|span|small|big|center|b|i|u|s|p|sub|sup|font|blockquote|table|t[drh]"
    r"|li|[uod]l|gallery|math|nowiki|(?:no|only)?include(?:only)?|code|tt|poem)\b[^<>\n]*>",
    re.IGNORECASE,
)
# Of a table without end, or whose start is a template's; no absolute value, as |x|.
ROWS = re.compile(r"^[ \t]*(?:\{\||\|(?![ \t]*[\w-]+[ \t]*\|(?!\|))).*$", re.MULTILINE)

TAGS = """ref references gallery math chem ce table timeline score syntaxhighlight source pre graph
 imagemap hiero inputbox templatedata categorytree mapframe maplink style section includeonly del
 indicator templatestyles"""
LEFT_OUT = frozenset(TAGS.split())
ITEMS = frozenset({"li", "dt", "dd"})
BLOCKS = frozenset({"p", "div", "blockquote", "center", "poem", "ul", "ol", "dl"})

# Templates that stand for words of the sentence: the number of the argument that is read, which
# may have the name of TEXT instead.
ARGUMENT = {"lang": 2, "langx": 2, "transliteration": 2, "transl": 2, "color": 2, "abbr": 1}
FIRST = """nowrap|nobr|small|big|sic|ill|mvar|val|smallcaps|sc|em|nihongo|interlanguage link
small caps|quote|blockquote|cquote|flag|circa|as of|us$"""
ARGUMENT |= dict.fromkeys(re.split(r"[|\n]", FIRST), 1)
TEXT = ("text", "quote")
BEFORE = {"circa": "c. ", "as of": "As of ", "us$": "US$"}  # shown before the argument
INSTEAD = {"as of": "alt"}  # the argument that is shown alone where it is given
AFTER = {"val": {"e": "×10^", "u": " ", "ul": " "}, "circa": {"2": " – c. "}}  # between arguments
MEASURES = frozenset({"convert", "cvt"})
RANGES = dict.fromkeys(("-", "–", "−"), "–") | {"+/-": " ± ", "±": " ± ", "*": " × ", "×": " × "}
RANGES |= {"xx": " × ", "x": " × ", "to(-)": " to ", "and(-)": " and ", ",": ", "}
CHARACTERS = {"snd": " – ", "spaced ndash": " – ", "ndash": "–", "mdash": "—", "nbsp": " "}
CHARACTERS |= {"'": "'", "!": "|", "=": "=", "dot": " · ", "·": " · "}
CHARACTERS |= {"spnd": " – ", "en dash": "–"}

RUN = re.compile(r"[ \t,;:\x01]+")
EMPTY = re.compile(r" ?[(（]\x01[)）]")
ONLY_GAPS = re.compile(r"^[ \t]*\x01[ \t\x01]*\n", re.MULTILINE)
SPACES = re.compile(r"[ \t\u00a0\u2007\u2009\u202f]+")

# What is opened and never closed makes the parser search the rest of the text for each.
VERBATIM = "math|chem|ce|nowiki|pre|source|syntaxhighlight|score"
OPENED = re.compile(
    rf"<({VERBATIM})\b[^<>]*>[^<]*</\1\s*>|\{{\{{|\}}\}}|^[ \t]*(?:\{{\||\|\}}(?!\}}))|<!--|-->"
    r"|\[\[|\]\]|\[(?=(?:[a-z]+:)?//)|\]"
    rf"|<(?P<closes>/?)(?P<tag>[a-z][a-z0-9]*)(?:[^<>{{]|\{{\{{[^{{}}<>]*\}}\}})*>?",
    re.IGNORECASE | re.MULTILINE,
)
OPENER = {"}}": "{{", "|}": "{|", "-->": "<!--", "]]": "[[", "]": "["}
SINGLE = frozenset(("br", "hr", "wbr", "meta", "link", "img", "li", "dt", "dd", "th", "td", "tr"))
SEARCHED = 10**7  # characters, at most


def prose(text: str, hidden: tuple[str, ...] = HIDDEN) -> str:
    """The prose of an article's wikitext, paragraphs and titles of sections an empty line apart.

    hidden: prefixes, in lower case, of links to files and categories.
    A title without prose below it goes. Unbalanced markup is left out where it stands.
    Raises BadRecord where the parser gives up, where so much is opened and never closed that it
    would search for minutes, and where things stand too deep within one another.
    """
    text = ENDLESS.sub(PARAGRAPH, text)
    most = sum(map(text.count, ("{{", "{|", "[", "<")))  # tells of nearly all pages, and at once
    if most * len(text) > SEARCHED and (unclosed := _unclosed(text)) * len(text) > SEARCHED:
        raise documents.BadRecord(
            f"wikitext: {unclosed:,} templates, tables, links, comments or tags have no end"
        )
    try:
        sections = _sections(_Reader(BESIDE.sub(GAP, text), hidden))
    except RecursionError:
        raise documents.BadRecord("wikitext: nested too deep") from None
    return "\n\n".join(_told([(level, title, _tidy("".join(t))) for level, title, t in sections]))


def _sections(reader: _Reader) -> list[tuple[int, str, list[str]]]:
    """Level, title and parts of the text of each section; level 0 comes before the first title."""
    sections = [(0, "", [])]
    for token in reader.tokens:
        if type(token).__name__ == "HeadingStart":
            sections.append((token.level, _tidy(reader.until("HeadingEnd")[0]), []))
        else:
            sections[-1][2].append(reader.read(token))
    return sections


def _unclosed(text: str) -> int:
    """How many templates, tables, links, comments and tags do not end where they began."""
    stack, held, unclosed = [], collections.Counter(), 0
    for found in OPENED.finditer(text):
        mark, name = found[0].lstrip(), (found["tag"] or "").lower()
        if found[1] or (mark.endswith("/>") or name in SINGLE) and mark.endswith(">"):
            continue
        if found["closes"] and not mark.endswith(">"):
            continue  # ends nothing
        name = (name if mark.endswith(">") else "<") if name else OPENER.get(mark, mark)
        if not (found["closes"] or mark in OPENER):
            stack.append(name)
            held[name] += 1
        elif held[name]:
            while (last := stack.pop()) != name:
                held[last] -= 1
                unclosed += 1
            held[name] -= 1
    return unclosed + len(stack)


def _told(sections) -> list[str]:
    """Titles and texts of the sections that a reader reads, in order."""
    kept, apparatus = [], 7  # the level of a section whose deeper ones are left out with it
    for level, title, text in sections:
        if level > apparatus:
            continue
        apparatus = level if title.casefold() in wiki_names.REFERENCE_SECTIONS else 7
        if apparatus == 7:
            kept.append((level, title, text))
    told, full = [], set()  # levels of sections with prose below a section, read from the end
    for level, title, text in reversed(kept):
        if text or any(deeper > level for deeper in full):
            told += [part for part in (text, title) if part]
            full.add(level)
        full = {higher for higher in full if higher <= level}
    return told[::-1]


def _tidy(text: str) -> str:
    """The text without gaps, and without the brackets and commas that stood around them."""
    text = ROWS.sub("", text).replace(PARAGRAPH, "\n\n")
    text = re.sub(rf"\n?{ITEM}+", "\n", SPACES.sub(" ", text))
    if GAP in text:
        text = ONLY_GAPS.sub("", text + "\n")
        text = EMPTY.sub("", RUN.sub(_closed_up, text))
        text = SPACES.sub(" ", text.replace(GAP, ""))
    lines = "\n".join(line.strip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines).strip()


def _closed_up(run: re.Match) -> str:
    """Spaces, commas and gaps between words, as they would stand without the gaps."""
    if GAP not in run[0]:
        return run[0]
    before = run.string[run.start() - 1] if run.start() else "\n"
    after = run.string[run.end()] if run.end() < len(run.string) else "\n"
    if before in "(（" and after in ")）":
        return GAP  # for EMPTY to find
    if before in "(（\n" or after in ")）.!?":
        return ""
    marks = run[0].replace(GAP, "")
    return marks.strip()[:1] + (" " if " " in marks else "")


class _Reader:
    """Reads the tokens of a wikitext once, front to back, into the text that they show.

    The parser's own next step, a tree of nodes, takes several times as long as the tokens.
    """

    def __init__(self, text: str, hidden: tuple[str, ...]):
        from mwparserfromhell import parser
        from mwparserfromhell.parser import tokenizer

        make = parser.CTokenizer or tokenizer.Tokenizer  # in C, where it could be compiled
        try:
            self.tokens = iter(make().tokenize(text))
        except parser.ParserError as error:
            raise documents.BadRecord(f"wikitext: {error}") from None
        self.hidden = hidden
        self.verbatim = False

    def read(self, token) -> str:
        """What the markup that begins with this token shows."""
        return READ[type(token).__name__](self, token)

    def until(self, *ends: str) -> tuple[str, str]:
        """What is shown up to a token of one of these names, and the name."""
        parts = []
        for token in self.tokens:
            name = type(token).__name__
            if name in ends:
                return "".join(parts), name
            parts.append(READ[name](self, token))
        raise documents.BadRecord(f"wikitext: the parser lost the end of a {ends[-1]}")


def _text(reader: _Reader, token) -> str:
    text = token["text"]
    if reader.verbatim:
        return text
    text = MARKUP.sub(_unbalanced, text) if SPECIAL.search(text) else text
    return MAGIC.sub(GAP, text) if "__" in text else text


def _unbalanced(markup: re.Match) -> str:
    return ITEM if markup[0].lower().startswith("<li") else ""


def _link(reader: _Reader, token) -> str:
    title, end = reader.until("WikilinkSeparator", "WikilinkClose")
    text = reader.until("WikilinkClose")[0] if end == "WikilinkSeparator" else None
    prefix, colon, name = title.strip().partition(":")
    if colon and prefix:
        key = prefix.strip().replace("_", " ").casefold()
        if key in reader.hidden or PICTURE.search(name.strip().casefold()):
            return GAP
        if text is None and LANGUAGE.fullmatch(prefix):
            return GAP
    return text or title.strip().lstrip(":")


def _address(reader: _Reader, token) -> str:
    end = reader.until("ExternalLinkSeparator", "ExternalLinkClose")[1]
    text = reader.until("ExternalLinkClose")[0] if end == "ExternalLinkSeparator" else ""
    return text or GAP


def _template(reader: _Reader, token) -> str:
    name, end = reader.until("TemplateParamSeparator", "TemplateClose")
    values, number = {}, 0
    while end == "TemplateParamSeparator":
        value, end = reader.until(end, "TemplateParamEquals", "TemplateClose")
        if end == "TemplateParamEquals":
            key = value.strip()
            value, end = reader.until("TemplateParamSeparator", "TemplateClose")
            values[key] = value.strip()
        else:
            number += 1
            values[str(number)] = value
    name = name.replace(GAP, "").strip().replace("_", " ").casefold()
    if name in CHARACTERS:
        return CHARACTERS[name]
    if name in MEASURES and number > 1:
        return _measure([values[str(i + 1)].strip() for i in range(number)])
    if name.startswith("formatnum:"):
        return name.partition(":")[2]
    return _argument(name, values)


def _argument(name: str, values: dict[str, str]) -> str:
    """The argument that a template shows, with what it puts around it."""
    number = 1 if name.startswith("lang-") else ARGUMENT.get(name, 0)
    keys = (str(number), *TEXT) if number else ()
    value = next((values[key] for key in keys if key in values), "")
    if alone := values.get(INSTEAD.get(name)):
        return alone
    if not value:
        return GAP
    before = BEFORE.get(name, "")
    before = before.lower() if "lc" in values else before
    after = AFTER.get(name, {}).items()
    return before + value + "".join(mark + values[key] for key, mark in after if values.get(key))


def _measure(values: list[str]) -> str:
    """Number and unit, or the numbers of a range, or of a measure in parts, as 5 ft 6 in."""
    shown, unit = values[0], 1
    while unit + 2 < len(values) and values[unit + 1].lstrip("+-−.")[:1].isnumeric():
        shown += RANGES.get(values[unit], f" {values[unit]} ") + values[unit + 1]
        unit += 2
    return f"{shown} {values[unit]}"


def _tag(reader: _Reader, token) -> str:
    name, end = reader.until(*TAG_GOES_ON)
    attributes = ""
    while end == "TagAttrStart":
        attribute, end = reader.until(*TAG_GOES_ON)
        attributes += attribute.replace(" ", "").casefold() + " "
    name, contents = name.strip().casefold(), ""
    if end == "TagCloseOpen":
        reader.verbatim = name == "nowiki"
        contents = reader.until("TagOpenClose")[0]
        reader.verbatim = False
        reader.until("TagCloseClose")
    if name in LEFT_OUT or "display:none" in attributes:
        return GAP
    if name in ("br", "hr"):
        return "\n"
    if name in ITEMS:
        return ITEM + contents
    return f"\n\n{contents}\n\n" if name in BLOCKS else contents


def _entity(reader: _Reader, token) -> str:
    reader.verbatim, before = True, reader.verbatim
    text = reader.until("HTMLEntityEnd")[0]
    reader.verbatim = before
    return html.unescape(f"&{text};")


def _left_out(end: str):
    def read(reader: _Reader, token) -> str:
        reader.until(end)
        return GAP

    return read


def _shown_as(text: str):
    return lambda reader, token: text


TAG_GOES_ON = ("TagAttrStart", "TagCloseOpen", "TagCloseSelfclose")
READ = {
    "Text": _text,
    "WikilinkOpen": _link,
    "ExternalLinkOpen": _address,
    "TemplateOpen": _template,
    "TagOpenOpen": _tag,
    "TagAttrEquals": _shown_as("="),
    "TagAttrQuote": _shown_as(""),
    "HTMLEntityStart": _entity,
    "HTMLEntityNumeric": _shown_as("#"),
    "HTMLEntityHex": _shown_as("x"),
    "HeadingStart": lambda reader, token: f"\n\n{reader.until('HeadingEnd')[0]}\n\n",
    "CommentStart": _left_out("CommentEnd"),
    "ArgumentOpen": _left_out("ArgumentClose"),
    "ArgumentSeparator": _shown_as(""),
}
