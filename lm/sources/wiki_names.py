"""What the wikis of several languages call things that an article is read without."""

from __future__ import annotations

import re


def _split_names(text: str) -> tuple[str, ...]:
    """Names to compare with what was folded likewise."""
    return tuple(name.casefold() for name in re.split(r"[|\n]", text) if name)


# Templates that mark a disambiguation page; those of MIXED may have other words before them.
PREFIXED_DISAMBIGUATION_TEMPLATES = _split_names("disambiguation|disambig")
DISAMBIGUATION_TEMPLATES = PREFIXED_DISAMBIGUATION_TEMPLATES + _split_names("""
disamb|dab|hndis|geodis|numberdis|schooldis|roaddis|callsigndis|mathdab
begriffsklärung|homonymie|desambiguación|desambiguacion|desambigua|disambigua|desambiguação
doorverwijspagina|неоднозначность|многозначность|ujednoznacznienie|förgrening|flertydig
täsmennyssivu|rozcestník|egyértelműsítő|消歧义|消歧義|消歧义页|曖昧さ回避|aimai|동음이의|توضيح|פירושונים
""")

# What stands in parentheses at the end of a disambiguation page's title.
DISAMBIGUATION_TITLES = _split_names("""
disambiguation|begriffsklärung|homonymie|desambiguación|disambigua|doorverwijspagina
desambiguação|значения|ujednoznacznienie|rozcestník|egyértelműsítő|消歧义|消歧義|曖昧さ回避
동음이의|توضيح|פירושונים
""")

# Words between two pairs of underscores that say how a page is shown.
MAGIC_WORDS = _split_names("""
notoc|forcetoc|toc|noeditsection|newsectionlink|nonewsectionlink|nogallery|hiddencat|index|noindex
expectunusedcategory|expectunusedtemplate|nocontentconvert|nocc|notitleconvert|notc|start|end
staticredirect|noglobal|disambig|expected_unconnected_page|archivedtalk|notalk|expectwithoutscans
kein_inhaltsverzeichnis|keininhaltsverzeichnis|inhaltsverzeichnis_erzwingen|inhaltsverzeichnis
keine_galerie|keinegalerie|abschnitte_nicht_bearbeiten
aucunsommaire|aucunetdm|forcersommaire|forcertdm|sommaire|tdm|aucunegalerie|sectionnoneditable
без_оглавления|без_огл|обязательное_оглавление|обяз_огл|оглавление|огл|без_галереи
""")

# Sections of an article that hold references and links and no prose.
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
