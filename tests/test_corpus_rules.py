"""Rules work in any script, together equal C4's on ASCII, and drop nothing else."""

from __future__ import annotations

import itertools
import random
import re
import time

import pytest

from lm.corpus import rules

PAGES = (  # lines that C4's rules change, and near misses
    "A line that ends with a mark.",
    "A line that ends without one",
    'He said that it was "so"',
    "Too short.",
    "It trails off in the end...",
    "Please enable JavaScript in your browser settings.",
    "By using this you accept our cookie policy now.",
    "One has read[3] that this is so[citation needed].",
    "Is this not a question? Yes, it is one! Surely.",
    "function f() { return 1 } is some code.",
    "Lorem ipsum dolor sit amet, and so on.",
    f"This has a word {'x' * 1001} of many letters.",
    "This ends in a bracket (as one may.)",
    "",
    "[edit]",
    "    An indented line of enough words.",
)


def cleaned(text: str, spec: str) -> rules.CleanResult:
    return rules.clean(text, rules.parse_rules(spec))


@pytest.fixture(scope="module")
def c4():
    """TFDS's clean_page and its length filter as text -> text or None; sentences by our count."""
    c4_utils = pytest.importorskip("tensorflow_datasets.text.c4_utils")
    patch = pytest.MonkeyPatch()
    patch.setattr(c4_utils, "_get_sentences", rules.SENTENCE.findall)
    patch.setattr(c4_utils, "get_counter_inc_fn", lambda _: lambda *_: None)
    clean = c4_utils.get_clean_page_fn()

    def reference(text: str) -> str | None:
        page = c4_utils.PageFeatures(text=text)
        if not c4_utils.is_valid_length(page, 190_000):
            return None
        pages = list(clean(page))
        return pages[0].text if pages else None

    yield reference
    patch.undo()


def test_on_ascii_the_rules_equal_c4s(c4):
    rng = random.Random(0)
    texts = ["\n".join(rng.choices(PAGES, k=rng.randint(1, 9))) for _ in range(1500)]
    texts += ["A sentence of five words.\n" * n for n in (2, 3, 7307, 7308)]
    actual = [cleaned(text, "c4").text or None for text in texts]
    assert actual == [c4(text) for text in texts]
    passed = [text for text in actual if text]
    assert 100 < len(passed) < len(texts) - 100


@pytest.mark.parametrize(
    "text",
    [
        "東京は日本の首都です。",
        "你今天好吗？",
        "「今日は天気がいい」",
        "هل هذا هو البيت الكبير؟",
        "यह एक बहुत बड़ा घर है।",
        "Կայ մեկ մեծ գեղեցիկ տուն։",
    ],
)
def test_sentences_of_any_script_pass_the_line_rules(text):
    assert cleaned(text, "terminal_mark,min_words").text == text
    assert cleaned(text, "min_sentences=1").text == text or text.endswith("」")
    assert cleaned(text + " " + text, "min_sentences=3").dropped == "min_sentences"


def test_a_long_run_of_marks_takes_linear_time():
    start = time.process_time()
    for run in ("." * 300_000 + "x", ".)" * 150_000 + "x", "." + ")" * 300_000 + "x"):
        assert not rules.SENTENCE.findall(run)
    assert time.process_time() - start < 1  # quadratic time would be more than a minute


def test_a_character_is_a_word_only_in_scripts_without_spaces():
    assert rules.split_words("two words") == ["two", "words"]
    assert rules.split_words("東京 is กข") == [
        "東",
        "京",
        "is",
        "ก",
        "ข",
    ]
    for text in ("a  b\tc\nd", "über-all x", " lead", ""):
        assert rules.split_words(text) == text.split()


@pytest.mark.parametrize("name", sorted(rules.RULES))
def test_a_single_rule_keeps_edits_or_drops_lines_and_adds_nothing(name):
    rng = random.Random(1)
    changes = {"strip": str.strip, "citations": lambda line: rules.CITATION.sub("", line)}
    for _ in range(200):
        lines = [line for line in rng.choices(PAGES, k=6) if line] or ["x"]
        text, dropped, counts = cleaned("\n".join(lines), name)
        assert bool(text) != bool(dropped) and dropped in ("", name)
        whole = [changes.get(name, str)(line) for line in "\n".join(lines).strip().split("\n")]
        remaining = iter(whole)
        assert all(
            any(line == original.strip() or line == original for original in remaining)
            for line in text.split("\n")
            if text
        )
        if rules.RULES[name].scope == "text":
            assert not counts
        elif text:
            assert len(text.split("\n")) + counts.get(name, 0) >= len(whole) - whole.count("")


@pytest.mark.parametrize(
    ("name", "limit", "passes", "fails"),
    [
        ("min_characters", 5, "12345", "1234"),
        ("max_characters", 5, "12345", "123456"),
        ("min_sentences", 2, "One. Two.", "One. 2.5"),
        ("max_word", 4, "four of four", "fours of"),
        ("min_words", 3, "a b c", "a b"),
    ],
)
def test_a_value_at_the_limit_passes(name, limit, passes, fails):
    assert cleaned(passes, f"{name}={limit}") == (passes, "", {})
    assert cleaned(fails, f"{name}={limit}").dropped == name


def test_a_document_is_dropped_by_the_first_rule_that_empties_it():
    text = "No mark\nNone here either"
    assert cleaned(text, "terminal_mark,min_characters").dropped == "terminal_mark"
    assert cleaned(text, "min_characters,terminal_mark").dropped == "min_characters"
    assert cleaned(text, "terminal_mark").lines == {"terminal_mark": 2}
    assert cleaned(text, "max_word,terminal_mark,min_words").dropped == "terminal_mark"
    assert cleaned(" \n ", "none") == ("", "empty", {})


def test_a_limit_counts_the_text_after_the_earlier_rules():
    text = "This line is about javascript.\n\n12345"
    assert cleaned(text, "javascript,min_characters=5") == ("12345", "", {"javascript": 1})
    assert cleaned(text, "javascript,min_characters=6").dropped == "min_characters"
    assert cleaned(text, "min_characters=6,javascript").text == "12345"


def test_without_rules_only_surrounding_space_is_removed():
    text = "  if x {\n\n    y  =  1\t\n}\u2028z"
    assert cleaned(f"\n{text}\n ", "none").text == text.strip()
    assert cleaned(text * 10, "default").text == (text * 10).strip()


def test_cleaning_twice_is_cleaning_once():
    for page in itertools.permutations(PAGES[:6], 4):
        once = cleaned("\n".join(page), "c4")
        if once.text:
            assert cleaned(once.text, "c4") == (once.text, "", {})


def test_rules_parse_with_limits_and_the_last_limit_counts():
    assert rules.parse_rules("none") == ()
    assert rules.parse_rules("min_words=3, curly_bracket") == (
        ("min_words", 3),
        ("curly_bracket", None),
    )
    assert dict(rules.parse_rules("c4,min_words=9")) == dict(rules.parse_rules("c4")) | {
        "min_words": 9
    }
    assert rules.parse_rules("max_word") == (("max_word", rules.RULES["max_word"].limit),)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("min_word=3", "--rules='min_word' is unknown; choose one of .*did you mean 'min_words'"),
        (
            "min_words=0",
            "'min_words=0' is not valid; write min_words=N with N from 1, as min_words=5.",
        ),
        ("min_words=two", "'min_words=two' is not valid"),
        ("curly_bracket=1", "write curly_bracket alone"),
        ("c4=1", "write c4 alone"),
    ],
)
def test_an_invalid_rule_is_an_error(spec, sentence):
    with pytest.raises(ValueError, match=sentence):
        rules.parse_rules(spec)


def test_each_rule_describes_its_effect():
    for name, rule in rules.RULES.items():
        assert rule.scope in ("line", "text") and re.match("drop|remove", rule.meaning), name
