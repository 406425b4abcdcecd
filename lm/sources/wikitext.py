"""Wikitext to prose: the running text of an article, without what stands around it.

Kept: paragraphs, section titles, list items as lines, the text of links.
Removed: templates (except those that stand for a word of the sentence), tables, references, files,
galleries, formulas, listings, categories, language links, comments, addresses, magic words, and the
sections of references and links at the end.
"""

from __future__ import annotations

import collections
import html
import re
from collections.abc import Callable, Iterable

from lm.sources import documents, wiki_names

# Characters that cannot occur in XML mark a removal, a list item and a paragraph start.
GAP, ITEM, PARAGRAPH = "\1", "\2", "\3"

HIDDEN_PREFIXES = ("category", "file", "image", "media")
PICTURE = re.compile(r"\.(jpe?g|png|gif|svg|tiff?|webp|xcf|djvu|pdf|og[agv]|webm|midi?|wav|mp3)$")
LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-z]+)*|simple|zh-min-nan")
MAGIC_WORD = re.compile(rf"__(?:{'|'.join(wiki_names.MAGIC_WORDS)})__", re.IGNORECASE)
# References and comments are most of the markup; a search removes them faster than the parser.
COMMENT_OR_REFERENCE = re.compile(
    r"<!--.*?-->|<ref\b[^<>]*/>|<ref\b[^<>]*>(?:[^<]|<(?!/?ref\b))*</ref\s*>",
    re.DOTALL | re.IGNORECASE,
)
# HTML allows <p> without </p>, but the parser would search the rest of the text for each.
UNCLOSED_PARAGRAPH = re.compile(
    r"<p(?:\s[^<>]*|/)?>(?=(?:[^<]|<(?!/?(?:p|nowiki)[\s/>]))*+(?!</(?:p|nowiki)[\s>]))",
    re.IGNORECASE,
)
MARKUP_START = re.compile(r"[\[\]{}'<]")  # every match of UNBALANCED_MARKUP begins with one
UNBALANCED_MARKUP = re.compile(  # the parser leaves it in the text
    r"\[\[|\]\]|\{\{|\}\}|'{2,}"
    r"|</?(?:ref|references|div|span|small|big|center|b|i|u|s|p|sub|sup|font|blockquote|table|t[drh]"
    r"|li|[uod]l|gallery|math|nowiki|(?:no|only)?include(?:only)?|code|tt|poem)\b[^<>\n]*>",
    re.IGNORECASE,
)
# Rows of a table without end, or whose start comes from a template; absolute values |x| are kept.
TABLE_ROWS = re.compile(r"^[ \t]*(?:\{\||\|(?![ \t]*[\w-]+[ \t]*\|(?!\|))).*$", re.MULTILINE)

TAGS = """ref references gallery math chem ce table timeline score syntaxhighlight source pre graph
    imagemap hiero inputbox templatedata categorytree mapframe maplink style section includeonly del
    indicator templatestyles"""
REMOVED_TAGS = frozenset(TAGS.split())
ITEM_TAGS = frozenset({"li", "dt", "dd"})
BLOCK_TAGS = frozenset({"p", "div", "blockquote", "center", "poem", "ul", "ol", "dl"})

GAPS_AND_COMMAS = re.compile(r"[ \t,;:\x01]+")
EMPTY_BRACKETS = re.compile(r" ?[(（]\x01[)）]")
LINE_OF_GAPS = re.compile(r"^[ \t]*\x01[ \t\x01]*\n", re.MULTILINE)
SPACES = re.compile(r"[ \t\u00a0\u2007\u2009\u202f]+")

# Markup that is opened and never closed makes the parser search the rest of the text each time.
VERBATIM = "math|chem|ce|nowiki|pre|source|syntaxhighlight|score"
OPEN_OR_CLOSE = re.compile(
    rf"<({VERBATIM})\b[^<>]*>[^<]*</\1\s*>|\{{\{{|\}}\}}|^[ \t]*(?:\{{\||\|\}}(?!\}}))|<!--|-->"
    r"|\[\[|\]\]|\[(?=(?:[a-z]+:)?//)|\]"
    rf"|<(?P<closes>/?)(?P<tag>[a-z][a-z0-9]*)(?:[^<>{{]|\{{\{{[^{{}}<>]*\}}\}})*>?",
    re.IGNORECASE | re.MULTILINE,
)
OPENER_OF = {"}}": "{{", "|}": "{|", "-->": "<!--", "]]": "[[", "]": "["}
UNPAIRED_TAGS = frozenset(re.findall(r"\w+", "br hr wbr meta link img li dt dd th td tr"))
MAX_SEARCHED = 10**7  # characters that the parser may search for ends


def prose(text: str, hidden: tuple[str, ...] = HIDDEN_PREFIXES) -> str:
    """The prose of an article's wikitext, paragraphs and section titles separated by empty lines.

    hidden: prefixes, in lower case, of links to files and categories.
    Titles of sections without prose are removed, and so is unbalanced markup.
    Raises BadRecord if the parser fails, if so much is opened and never closed that it would search
    for minutes, and if the nesting is too deep.
    """
    text = UNCLOSED_PARAGRAPH.sub(PARAGRAPH, text)
    openers = sum(map(text.count, ("{{", "{|", "[", "<")))  # a fast upper bound
    if (
        openers * len(text) > MAX_SEARCHED
        and (n := _count_unclosed(text)) * len(text) > MAX_SEARCHED
    ):
        raise documents.BadRecord(
            f"wikitext: {n:,} templates, tables, links, comments or tags have no end"
        )
    try:
        sections = _sections(_Reader(COMMENT_OR_REFERENCE.sub(GAP, text), hidden))
    except RecursionError:
        raise documents.BadRecord("wikitext: nested too deep") from None
    texts = [(level, title, _close_gaps("".join(parts))) for level, title, parts in sections]
    return "\n\n".join(_without_references(texts))


def _sections(reader: _Reader) -> list[tuple[int, str, list[str]]]:
    """Level, title and pieces of text of each section; level 0 comes before the first title."""
    sections = [(0, "", [])]
    for token in reader.tokens:
        if type(token).__name__ == "HeadingStart":
            sections.append((token.level, _close_gaps(reader.until("HeadingEnd")[0]), []))
        else:
            sections[-1][2].append(reader.read(token))
    return sections


def _count_unclosed(text: str) -> int:
    """The number of templates, tables, links, comments and tags that are not closed."""
    stack, num_open, unclosed = [], collections.Counter(), 0
    for match in OPEN_OR_CLOSE.finditer(text):
        mark, tag = match[0].lstrip(), (match["tag"] or "").lower()
        if match[1] or (mark.endswith("/>") or tag in UNPAIRED_TAGS) and mark.endswith(">"):
            continue
        if match["closes"] and not mark.endswith(">"):
            continue  # not a tag
        name = (tag if mark.endswith(">") else "<") if tag else OPENER_OF.get(mark, mark)
        if not (match["closes"] or mark in OPENER_OF):
            stack.append(name)
            num_open[name] += 1
        elif num_open[name]:
            while (last := stack.pop()) != name:
                num_open[last] -= 1
                unclosed += 1
            num_open[name] -= 1
    return unclosed + len(stack)


def _without_references(sections: Iterable[tuple[int, str, str]]) -> list[str]:
    """Titles and texts, in order, without reference sections and titles without prose."""
    deepest = 7  # below every heading level
    remaining, removed_level = [], deepest
    for level, title, text in sections:
        if level > removed_level:
            continue  # a subsection of a reference section
        is_reference = title.casefold() in wiki_names.REFERENCE_SECTIONS
        removed_level = level if is_reference else deepest
        if not is_reference:
            remaining.append((level, title, text))
    blocks, levels = [], set()  # levels of the following sections with prose, read backwards
    for level, title, text in reversed(remaining):
        if text or any(deeper > level for deeper in levels):
            blocks += [block for block in (text, title) if block]
            levels.add(level)
        levels = {higher for higher in levels if higher <= level}
    return blocks[::-1]


def _close_gaps(text: str) -> str:
    """Remove gaps together with the brackets, commas and spaces around them."""
    text = TABLE_ROWS.sub("", text).replace(PARAGRAPH, "\n\n")
    text = re.sub(rf"\n?{ITEM}+", "\n", SPACES.sub(" ", text))
    if GAP in text:
        text = LINE_OF_GAPS.sub("", text + "\n")
        text = EMPTY_BRACKETS.sub("", GAPS_AND_COMMAS.sub(_close_gap, text))
        text = SPACES.sub(" ", text.replace(GAP, ""))
    lines = "\n".join(line.strip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines).strip()


def _close_gap(run: re.Match) -> str:
    """Spaces and commas between words, as they would stand without the gaps among them."""
    if GAP not in run[0]:
        return run[0]
    before = run.string[run.start() - 1] if run.start() else "\n"
    after = run.string[run.end()] if run.end() < len(run.string) else "\n"
    if before in "(（" and after in ")）":
        return GAP  # EMPTY_BRACKETS removes it
    if before in "(（\n" or after in ")）.!?":
        return ""
    marks = run[0].replace(GAP, "")
    return marks.strip()[:1] + (" " if " " in marks else "")


class _Reader:
    """Reads the tokens of a wikitext once, front to back, and returns the text they display.

    Building the parser's own tree of nodes takes several times as long as its tokens.
    """

    def __init__(self, text: str, hidden: tuple[str, ...]):
        from mwparserfromhell import parser
        from mwparserfromhell.parser import tokenizer

        compiled = getattr(parser, "CTokenizer", None)
        make_tokenizer = compiled or tokenizer.Tokenizer
        try:
            self.tokens = iter(make_tokenizer().tokenize(text))
        except parser.ParserError as error:
            raise documents.BadRecord(f"wikitext: {error}") from None
        self.hidden = hidden
        self.verbatim = False

    def read(self, token) -> str:
        """The text displayed by the markup that begins with this token."""
        return READERS[type(token).__name__](self, token)

    def until(self, *ends: str) -> tuple[str, str]:
        """The displayed text up to a token of one of these types, and the type."""
        pieces = []
        for token in self.tokens:
            name = type(token).__name__
            if name in ends:
                return "".join(pieces), name
            pieces.append(READERS[name](self, token))
        raise documents.BadRecord(f"wikitext: the parser lost the end of a {ends[-1]}")


def _read_text(reader: _Reader, token) -> str:
    text = token["text"]
    if reader.verbatim:
        return text
    if MARKUP_START.search(text):
        text = UNBALANCED_MARKUP.sub(lambda m: ITEM if m[0].lower().startswith("<li") else "", text)
    return MAGIC_WORD.sub(GAP, text) if "__" in text else text


def _read_link(reader: _Reader, token) -> str:
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


def _read_address(reader: _Reader, token) -> str:
    end = reader.until("ExternalLinkSeparator", "ExternalLinkClose")[1]
    text = reader.until("ExternalLinkClose")[0] if end == "ExternalLinkSeparator" else ""
    return text or GAP


def _read_template(reader: _Reader, token) -> str:
    name, end = reader.until("TemplateParamSeparator", "TemplateClose")
    arguments, number = {}, 0  # positional ones are named "1", "2", ..
    while end == "TemplateParamSeparator":
        value, end = reader.until(end, "TemplateParamEquals", "TemplateClose")
        if end == "TemplateParamEquals":
            key = value.strip()
            value, end = reader.until("TemplateParamSeparator", "TemplateClose")
            arguments[key] = value.strip()
        else:
            number += 1
            arguments[str(number)] = value
    name = name.replace(GAP, "").strip().replace("_", " ").casefold()
    if name in wiki_names.CHARACTER_TEMPLATES:
        return wiki_names.CHARACTER_TEMPLATES[name]
    if name in wiki_names.MEASURE_TEMPLATES and number > 1:
        return _format_measure([arguments[str(i + 1)].strip() for i in range(number)])
    if name.startswith("formatnum:"):
        return name.partition(":")[2]
    return _displayed_argument(name, arguments)


def _displayed_argument(name: str, arguments: dict[str, str]) -> str:
    """The argument that a template displays, with the text around it; GAP if there is none."""
    if replacing := arguments.get(wiki_names.REPLACING_ARGUMENT.get(name)):
        return replacing
    number = 1 if name.startswith("lang-") else wiki_names.DISPLAYED_ARGUMENT.get(name, 0)
    keys = (str(number), *wiki_names.TEXT_ARGUMENTS) if number else ()
    text = next((arguments[key] for key in keys if key in arguments), "")
    if not text:
        return GAP
    before = wiki_names.TEXT_BEFORE_ARGUMENT.get(name, "")
    text = (before.lower() if "lc" in arguments else before) + text
    for key, separator in wiki_names.FURTHER_ARGUMENTS.get(name, {}).items():
        if arguments.get(key):
            text += separator + arguments[key]
    return text


def _format_measure(values: list[str]) -> str:
    """A number and its unit, a range and its unit, or a measure in parts, as 5 ft 6 in."""
    text, unit = values[0], 1
    while unit + 2 < len(values) and values[unit + 1].lstrip("+-−.")[:1].isnumeric():
        text += (
            wiki_names.RANGE_SEPARATORS.get(values[unit], f" {values[unit]} ") + values[unit + 1]
        )
        unit += 2
    return f"{text} {values[unit]}"


def _read_tag(reader: _Reader, token) -> str:
    name, end = reader.until(*TAG_CONTINUES)
    attributes = ""
    while end == "TagAttrStart":
        attribute, end = reader.until(*TAG_CONTINUES)
        attributes += attribute.replace(" ", "").casefold() + " "
    name, contents = name.strip().casefold(), ""
    if end == "TagCloseOpen":
        reader.verbatim = name == "nowiki"
        contents = reader.until("TagOpenClose")[0]
        reader.verbatim = False
        reader.until("TagCloseClose")
    if name in REMOVED_TAGS or "display:none" in attributes:
        return GAP
    if name in ("br", "hr"):
        return "\n"
    if name in ITEM_TAGS:
        return ITEM + contents
    return f"\n\n{contents}\n\n" if name in BLOCK_TAGS else contents


def _read_entity(reader: _Reader, token) -> str:
    verbatim, reader.verbatim = reader.verbatim, True
    name = reader.until("HTMLEntityEnd")[0]
    reader.verbatim = verbatim
    return html.unescape(f"&{name};")


def _remove_until(end: str) -> Callable[[_Reader, object], str]:
    def read(reader: _Reader, token) -> str:
        reader.until(end)
        return GAP

    return read


def _constant(text: str) -> Callable[[_Reader, object], str]:
    return lambda reader, token: text


TAG_CONTINUES = ("TagAttrStart", "TagCloseOpen", "TagCloseSelfclose")
READERS = {  # by the type of the first token
    "Text": _read_text,
    "WikilinkOpen": _read_link,
    "ExternalLinkOpen": _read_address,
    "TemplateOpen": _read_template,
    "TagOpenOpen": _read_tag,
    "TagAttrEquals": _constant("="),
    "TagAttrQuote": _constant(""),
    "HTMLEntityStart": _read_entity,
    "HTMLEntityNumeric": _constant("#"),
    "HTMLEntityHex": _constant("x"),
    "HeadingStart": lambda reader, token: f"\n\n{reader.until('HeadingEnd')[0]}\n\n",
    "CommentStart": _remove_until("CommentEnd"),
    "ArgumentOpen": _remove_until("ArgumentClose"),
    "ArgumentSeparator": _constant(""),
}
