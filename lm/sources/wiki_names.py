"""Tables for reading wikitext: names of templates, sections and switches in several languages."""

from __future__ import annotations

import re


def _split_names(text: str) -> tuple[str, ...]:
    """Names separated by | or line ends, case-folded."""
    return tuple(name.casefold() for name in re.split(r"[|\n]", text) if name)


# Templates that mark a disambiguation page; the PREFIXED ones may have other words before them.
PREFIXED_DISAMBIGUATIONS = _split_names("disambiguation|disambig")
DISAMBIGUATIONS = PREFIXED_DISAMBIGUATIONS + _split_names("""
disamb|dab|hndis|geodis|numberdis|schooldis|roaddis|callsigndis|mathdab
begriffsklärung|homonymie|desambiguación|desambiguacion|desambigua|disambigua|desambiguação
doorverwijspagina|неоднозначность|многозначность|ujednoznacznienie|förgrening|flertydig
täsmennyssivu|rozcestník|egyértelműsítő|消歧义|消歧義|消歧义页|曖昧さ回避|aimai|동음이의|توضيح|פירושונים
""")

# Markers in parentheses at the end of a disambiguation page's title.
DISAMBIGUATION_TITLES = _split_names("""
disambiguation|begriffsklärung|homonymie|desambiguación|disambigua|doorverwijspagina
desambiguação|значения|ujednoznacznienie|rozcestník|egyértelműsítő|消歧义|消歧義|曖昧さ回避
동음이의|توضيح|פירושונים
""")

# Behaviour switches, written between two pairs of underscores.
MAGIC_WORDS = _split_names("""
notoc|forcetoc|toc|noeditsection|newsectionlink|nonewsectionlink|nogallery|hiddencat|index|noindex
expectunusedcategory|expectunusedtemplate|nocontentconvert|nocc|notitleconvert|notc|start|end
staticredirect|noglobal|disambig|expected_unconnected_page|archivedtalk|notalk|expectwithoutscans
kein_inhaltsverzeichnis|keininhaltsverzeichnis|inhaltsverzeichnis_erzwingen|inhaltsverzeichnis
keine_galerie|keinegalerie|abschnitte_nicht_bearbeiten
aucunsommaire|aucunetdm|forcersommaire|forcertdm|sommaire|tdm|aucunegalerie|sectionnoneditable
без_оглавления|без_огл|обязательное_оглавление|обяз_огл|оглавление|огл|без_галереи
""")

# Titles of sections that hold references and links but no prose.
REFERENCE_SECTIONS = frozenset(
    _split_names("""
see also|references|external links|further reading|notes|footnotes|citations|bibliography|sources
works cited|notes and references|references and notes|general references
siehe auch|einzelnachweise|weblinks|literatur|quellen|anmerkungen|fußnoten
voir aussi|références|notes et références|liens externes|bibliographie|articles connexes
véase también|referencias|enlaces externos|bibliografía|notas|notas y referencias
voci correlate|note|collegamenti esterni|altri progetti|bibliografia
zie ook|bronnen|referenties|externe links|literatuur|bronnen, noten en/of referenties
ver também|referências|ligações externas|przypisy|linki zewnętrzne|zobacz też
примечания|ссылки|литература|см. также
参考文献|参考资料|參考文獻|參考資料|外部链接|外部連結|参见|參見|注释|註釋
脚注|関連項目|外部リンク|出典|같이 보기|각주|외부 링크
""")
)

# Templates that display one of their arguments as words of the sentence: the number of that
# positional argument. Arguments named as in TEXT_ARGUMENTS may take its place.
DISPLAYED_ARGUMENT = {"lang": 2, "langx": 2, "transliteration": 2, "transl": 2, "color": 2}
DISPLAYED_ARGUMENT |= dict.fromkeys(
    _split_names("""
abbr|nowrap|nobr|small|big|sic|ill|mvar|val|smallcaps|sc|em|nihongo|interlanguage link|small caps
quote|blockquote|cquote|flag|circa|as of|us$
"""),
    1,
)
TEXT_ARGUMENTS = ("text", "quote")
TEXT_BEFORE_ARGUMENT = {"circa": "c. ", "as of": "As of ", "us$": "US$"}
REPLACING_ARGUMENT = {"as of": "alt"}  # displayed alone if given
# Further arguments displayed after it, each with the text before it.
FURTHER_ARGUMENTS = {"val": {"e": "×10^", "u": " ", "ul": " "}, "circa": {"2": " – c. "}}

# Templates that display a number and its unit, and the words between the numbers of a range.
MEASURE_TEMPLATES = frozenset({"convert", "cvt"})
RANGE_SEPARATORS = dict.fromkeys(("-", "–", "−"), "–") | {"+/-": " ± ", "±": " ± ", "*": " × "}
RANGE_SEPARATORS |= {"×": " × ", "xx": " × ", "x": " × ", "to(-)": " to ", "and(-)": " and "}
RANGE_SEPARATORS |= {",": ", "}

# Templates that display fixed characters.
CHARACTER_TEMPLATES = dict.fromkeys(("snd", "spnd", "spaced ndash"), " – ")
CHARACTER_TEMPLATES |= {"ndash": "–", "en dash": "–", "mdash": "—", "dot": " · ", "·": " · "}
CHARACTER_TEMPLATES |= {"nbsp": " ", "'": "'", "!": "|", "=": "="}
