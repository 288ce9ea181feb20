"""The texts of the pages, and what can be checked about templates and scripts by reading them.

That pages look right and that a browser reports no violation of their policy is looked at in a browser, not here.
"""

import re
from pathlib import Path
from string import Formatter

import pytest

from translations import CATALOGS, DEFAULT_LANGUAGE, ERROR_CODES, LANGUAGES, choose_language, translate

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "templates").glob("*.html"))}
SCRIPTS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "static").glob("*.js"))}
MODELS = ("avibe", "avision")
SAMPLES = ("shapes", "group", "inside")

# A key that a template puts together, `t('state.' ~ state)`: its beginning -> what may follow.
KEY_FAMILIES = {
    "error.": (*ERROR_CODES, "network", "broken"),
    "state.": ("ready", "loading", "not_configured", "failed"),
    "home.": MODELS,
    "note.demo.": MODELS,
    "sample.alt.": SAMPLES,
    "sample.question.": SAMPLES,
    "form.prompt.": MODELS,
    "form.placeholder.": MODELS,
    "form.submit.": MODELS,
    "result.finish.": ("stop", "length"),
}


def placeholders(text):
    return {name for _, name, _, _ in Formatter().parse(text) if name is not None}


def keys_used_by_templates():
    keys = set()
    for text in TEMPLATES.values():
        keys.update(re.findall(r"\bt\('([\w.]+)'\s*[,)]", text))
        for beginning, rest in re.findall(r"\bt\('([\w.]+)' ~ ([^)]+)\)", text):
            end = re.search(r"~ '([\w.]+)'$", rest.strip())
            keys.update(f"{beginning}{middle}{end[1] if end else ''}" for middle in KEY_FAMILIES[beginning])
    return keys


def test_every_language_has_a_catalog():
    assert {code for code, _ in LANGUAGES} == set(CATALOGS)
    assert DEFAULT_LANGUAGE in CATALOGS


@pytest.mark.parametrize("lang", CATALOGS)
def test_catalog_has_the_keys_of_the_default_one(lang):
    assert set(CATALOGS[lang]) == set(CATALOGS[DEFAULT_LANGUAGE])


@pytest.mark.parametrize("lang", CATALOGS)
def test_texts_have_the_placeholders_of_the_default_ones(lang):
    expected = {key: placeholders(text) for key, text in CATALOGS[DEFAULT_LANGUAGE].items()}
    assert {key: placeholders(text) for key, text in CATALOGS[lang].items()} == expected


@pytest.mark.parametrize("lang", CATALOGS)
def test_no_text_is_empty(lang):
    assert [key for key, text in CATALOGS[lang].items() if not text] == []


def test_templates_use_every_key_and_no_other():
    assert keys_used_by_templates() == set(CATALOGS[DEFAULT_LANGUAGE])


@pytest.mark.parametrize("lang", CATALOGS)
@pytest.mark.parametrize("code", ERROR_CODES)
def test_every_error_code_has_a_heading_and_a_hint(lang, code):
    assert translate(lang, f"error.{code}.title")
    assert translate(lang, f"error.{code}.hint")


def test_translate_fills_placeholders():
    assert translate("en", "error.status", status=404) == "Error 404"
    assert translate("ru", "error.status", status=404) == "Ошибка 404"


def test_translate_does_not_read_braces_in_values():
    assert translate("en", "form.image_remove", name="{limit}") == "Remove {limit}"


@pytest.mark.parametrize(("lang", "key"), [("en", "no.such_key"), ("de", "error.status"), ("en", "error.status")])
def test_unknown_language_key_or_missing_value_raises(lang, key):
    with pytest.raises(KeyError):
        translate(lang, key)


@pytest.mark.parametrize(
    ("requested", "cookie", "accept_language", "expected"),
    [
        (None, None, None, "en"),
        ("ru", "en", "en", "ru"),
        ("en", "ru", "ru", "en"),
        (None, "ru", "en", "ru"),
        ("", "ru", "en", "ru"),
        ("de", "ru", "en", "ru"),
        ("RU", None, "en", "en"),
        ("<script>", "../ru", None, "en"),
        (None, "xx", "ru", "ru"),
        (None, None, "", "en"),
        (None, None, "ru-RU,ru;q=0.9,en;q=0.8", "ru"),
        (None, None, "en-GB,en;q=0.9,ru;q=0.8", "en"),
        (None, None, "de-DE,de;q=0.9,ru;q=0.5", "ru"),
        (None, None, "de,fr", "en"),
        (None, None, "en;q=0.3,ru;q=0.7", "ru"),
        (None, None, "ru;q=0", "en"),
        (None, None, "*", "en"),
        (None, None, ";;q=x,,\x00", "en"),
    ],
)
def test_language_is_the_requested_then_the_remembered_then_the_browsers(requested, cookie, accept_language, expected):
    assert choose_language(requested, cookie, accept_language) == expected


# What the pages' Content-Security-Policy forbids.
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "forbidden",
    [
        r"<style\b",
        r"\sstyle\s*=",
        r"\son[a-z]+\s*=",
        r"<script\b(?![^>]*\bsrc=)",
        r"javascript:",
        r"(?:src|href|action)=\"(?:https?:)?//",
        r"\|\s*safe\b",
        r"autoescape\s+false",
    ],
)
def test_template_has_nothing_inline_unescaped_or_from_outside(name, forbidden):
    assert re.findall(forbidden, TEMPLATES[name], re.IGNORECASE) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_makes_no_html_from_strings_and_calls_nobody_outside(name):
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|\beval\(|https?://", SCRIPTS[name]) == []


@pytest.mark.parametrize("path", sorted((ROOT / "static").glob("*.css")), ids=lambda path: path.name)
def test_style_sheet_needs_nothing_from_outside(path):
    assert re.findall(r"@import|url\(", path.read_text(encoding="utf-8")) == []


def test_every_static_file_that_a_template_names_exists():
    named = {path for text in TEMPLATES.values() for path in re.findall(r"static_url\('([^']+)'\)", text)}
    assert named
    assert [path for path in sorted(named) if not (ROOT / "static" / path).is_file()] == []


def test_script_finds_every_text_and_limit_that_it_reads_from_the_page():
    read = set(re.findall(r"\btexts\.(\w+)", "\n".join(SCRIPTS.values())))
    given = re.findall(r"\bdata-((?:text|max)-[a-z-]+)=", TEMPLATES["index.html"])
    assert read == {re.sub(r"-(\w)", lambda match: match[1].upper(), name) for name in given}
