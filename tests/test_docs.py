"""The documents say what the code does: names, defaults, limits, doors, codes, metrics, files, commands, examples.

What a sentence means no test can tell; everything in a table, a box or an example block is compared with the code.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from flask import Flask

from config import PROJECT_ROOT, VERSION, Limits, Settings, display_value, setting_names
from models.parsing import RequestParser
from models.service import ModelService
from responses import STATUS_BY_CODE
from tests.fakes import FakeLoaded

MANUAL = PROJECT_ROOT / "README_PRODUCTION.md"
ARCHITECTURE = PROJECT_ROOT / "ARCHITECTURE.txt"
MARKDOWN = [
    PROJECT_ROOT / name
    for name in (
        "README.md",
        MANUAL.name,
        "QUICKSTART.md",
        "SUMMARY.md",
        "CHANGELOG.md",
        "docs/engine.md",
        "docs/demo-avision.md",
        "docs/openai.md",
        "docs/structured-output.md",
    )
]
DOCUMENTS = [*MARKDOWN, ARCHITECTURE]
MAX_SCREENSHOT_BYTES = 200_000
# Names in documents that begin like a metric and are none: a file in a snapshot.
NO_METRICS = {"avito_demo"}

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
each_markdown = pytest.mark.parametrize("document", MARKDOWN, ids=lambda file: file.name)


def manual() -> str:
    return MANUAL.read_text(encoding="utf-8")


def table(header: str) -> dict[str, list[str]]:
    """The manual's table that begins with this header line: first cell, unquoted -> the other cells."""
    lines = manual().split("\n")
    assert lines.count(header) == 1, f"there must be one table with the header {header}"
    rows = {}
    for line in lines[lines.index(header) + 2 :]:
        if not line.startswith("|"):
            break
        name, *rest = (cell.strip() for cell in line.strip("|").split(" | "))
        assert name not in rows, f"{name} is there twice"
        rows[name.strip("`")] = [cell.strip("` |") for cell in rest]
    return rows


def shape(value: Any) -> Any:
    """The keys of nested objects. Load phases differ between models, so their names do not count."""
    if isinstance(value, dict):
        return {key: None if key == "phases" else shape(inner) for key, inner in value.items()}
    return None


def examples() -> list[Any]:
    """Every JSON block of the manual, parsed."""
    return [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```", manual(), re.MULTILINE | re.DOTALL)]


def assert_shown(answer: Any) -> None:
    """An answer of this very shape is an example in the manual."""
    assert shape(answer) in [shape(example) for example in examples()]


def calls(source: str, name: str) -> list[ast.Call]:
    """The calls of `name(...)` in a module's source."""
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [node for node in nodes if isinstance(node.func, ast.Name) and node.func.id == name]


def heading_anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# Settings and limits.


def test_every_setting_stands_in_the_manual_with_its_default() -> None:
    defaults = Settings.model_validate({})
    expected = {name: display_value(defaults, attribute) or "empty" for name, attribute in setting_names().items()}
    assert {name: cells[0] for name, cells in table("| Name | Default | Meaning |").items()} == expected


@each_document
def test_no_document_names_a_setting_that_there_is_not(document: Path) -> None:
    named = re.findall(r"\b(?:AVITO|AVIBE|AVISION)_[A-Z0-9_]+", document.read_text(encoding="utf-8"))
    assert set(named) <= set(setting_names())


def test_every_fixed_limit_stands_in_the_manual_with_its_value() -> None:
    (build,) = (call for call in calls((PROJECT_ROOT / "config.py").read_text(), "Limits") if call.keywords)
    settable = {keyword.arg for keyword in build.keywords}
    expected = {
        field.name: str(field.default) if isinstance(field.default, int) else f"{field.default:g}"
        for field in dataclasses.fields(Limits)
        if field.name not in settable
    }
    assert {name: cells[0] for name, cells in table("| Limit | Value | Meaning |").items()} == expected


# Doors, codes, metrics.


def test_every_door_is_documented_and_every_documented_one_exists(app: Flask) -> None:
    doors = {
        f"{method} {rule.rule}"
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) & {"GET", "POST"}
        if rule.endpoint != "static"
    }
    assert set(re.findall(r"`((?:GET|POST) /[\w./<>]*)`", manual())) == doors
    drawn = re.findall(r"(GET|POST) +(/[\w./<>]*)", ARCHITECTURE.read_text(encoding="utf-8"))
    assert {f"{method} {path}" for method, path in drawn} == doors


@each_document
def test_documents_name_no_other_address(document: Path, app: Flask) -> None:
    text = document.read_text(encoding="utf-8")
    paths = {rule.rule for rule in app.url_map.iter_rules()}
    assert set(re.findall(r"\b(?:GET|POST) +(/[\w./<>]*)", text)) <= paths
    # With a host, or under /api: "/api/v1" alone names the group.
    named = re.findall(r"(?:localhost:\d+|(?<![\w./-]))(/api/[\w./]*\w)", text)
    assert {path for path in named if path != "/api/v1"} <= paths


def test_every_error_code_stands_in_the_manual_with_its_status() -> None:
    documented = {code: int(cells[0]) for code, cells in table("| Code | Status | When |").items()}
    assert documented == dict(STATUS_BY_CODE)


def known_metrics(app: Flask) -> dict[str, str]:
    """Name as Prometheus shows it -> type."""
    service: ModelService = app.extensions["avito_service"]
    return {
        metric.name + ("_total" if metric.type == "counter" else ""): metric.type
        for metric in service.metrics.registry.collect()
    }


def test_every_metric_stands_in_the_manual_with_its_type(app: Flask) -> None:
    documented = {name: cells[0] for name, cells in table("| Metric | Type | Meaning |").items()}
    assert documented == {name: kind for name, kind in known_metrics(app).items() if name.startswith("avito_")}


@each_document
def test_no_document_names_a_metric_that_there_is_not(document: Path, app: Flask) -> None:
    named = set(re.findall(r"\bavito_[a-z0-9_]+", document.read_text(encoding="utf-8")))
    assert named <= known_metrics(app).keys() | NO_METRICS


def test_every_field_of_a_request_is_documented() -> None:
    parser = RequestParser(Limits())
    text = set(table("| Field | | Meaning |"))
    assert text == set(parser.text_body.model_fields) == set(parser.image_fields.model_fields)
    assert text | set(table("| Field | Meaning |")) == set(parser.image_body.model_fields)


# Examples: an answer has the shape of one that the manual shows.


def test_examples_of_health_and_metrics_have_the_shape_of_the_answers(
    make_service: Callable[..., ModelService], make_app: Callable[..., Flask]
) -> None:
    token = "0123456789abcdef"
    client = make_app(make_service({"avibe": FakeLoaded()}, is_demo=True), AVITO_OPS_TOKEN=token).test_client()
    for path in ("/api/health", "/api/health/live", "/api/metrics"):
        assert_shown(client.get(path).get_json())
    for path in ("/api/metrics/reset", "/api/drain"):
        done = client.post(path, headers={"Authorization": f"Bearer {token}"})
        assert done.status_code == 200
        assert_shown(done.get_json())
    not_ready = client.get("/api/health/ready")
    assert not_ready.status_code == 503
    assert_shown(not_ready.get_json())


def test_examples_of_answers_and_errors_have_the_shape_of_the_answers(app: Flask) -> None:
    client = app.test_client()
    answer = client.post("/api/v1/text/generate", json={"prompt": "a"})
    refusal = client.post("/api/v1/text/generate", json={"prompt": "a", "max_tokens": 10**6})
    assert (answer.status_code, refusal.status_code) == (200, 400)
    assert_shown(answer.get_json())
    assert_shown(refusal.get_json())
    (shown,) = re.findall(r"^```json\n(.*?)^```", (PROJECT_ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert shape(json.loads(shown)) == shape(answer.get_json())


# Commands, links, files.


@each_document
def test_commands_in_documents_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    commands = set(re.findall(r"^cmd_(\w+)\(\)", (PROJECT_ROOT / "deploy.sh").read_text(), re.MULTILINE))
    targets = set(re.findall(r"^(\w+):", (PROJECT_ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\./deploy\.sh (\w+)", text)) <= commands
    assert set(re.findall(r"(?:`|^|• )make (\w+)", text, re.MULTILINE)) <= targets


def test_the_readme_shows_both_commands() -> None:
    text = (PROJECT_ROOT / "README.md").read_text(encoding="utf-8")
    assert "\n./deploy.sh development " in text
    assert "\nmake test " in text


@each_markdown
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if urlsplit(target).scheme:
            continue
        name, _, anchor = target.partition("#")
        file = document.parent / name if name else document
        assert file.is_file(), f"{target}: there is no such file"
        assert not anchor or anchor in heading_anchors(file), f"{target}: there is no such heading"


@each_document
def test_scripts_and_documents_that_are_named_exist(document: Path) -> None:
    """By path or by bare name, as it would be found in the project."""
    tops = [entry for entry in PROJECT_ROOT.iterdir() if entry.name not in (".git", ".venv", "run")]
    files = [file.relative_to(PROJECT_ROOT) for top in tops for file in (top, *top.rglob("*"))]
    paths, names = {file.as_posix() for file in files}, {file.name for file in files}
    for named in re.findall(r"(?<![\w./-])[\w./-]*\w\.(?:py|sh|md|txt)\b", document.read_text(encoding="utf-8")):
        assert named.removeprefix("./") in paths | names, f"{named} does not exist"


def test_the_screenshot_is_a_small_png() -> None:
    data = (PROJECT_ROOT / "docs" / "screenshot.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert len(data) < MAX_SCREENSHOT_BYTES


def test_versions_in_documents_are_that_of_the_service() -> None:
    assert re.findall(r"^## (\S+)", (PROJECT_ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == VERSION
    for document in (MANUAL, PROJECT_ROOT / "SUMMARY.md"):
        assert f"Version {VERSION}" in document.read_text(encoding="utf-8")
    assert f"API {VERSION} " in ARCHITECTURE.read_text(encoding="utf-8")


@each_document
def test_documents_are_about_the_project_only(document: Path) -> None:
    """No trace of the machine they were written on: its folders, or hosts that a reader cannot reach."""
    text = document.read_text(encoding="utf-8")
    assert not re.findall(r"/tmp\b|/opt\b(?!/avito-ai\b)|/home\b|/root\b|(?i:\bsession)", text)
    hosts = {urlsplit(url).hostname for url in re.findall(r"https?://[\w.:\-]+", text)}
    assert hosts <= {"localhost"}


# The drawing.


def drawn_files() -> list[str]:
    return re.findall(r"[├└]── (\S+)", ARCHITECTURE.read_text(encoding="utf-8"))


def test_the_file_structure_names_every_module_and_nothing_else() -> None:
    drawn = drawn_files()
    missing = [name for name in drawn if not (PROJECT_ROOT / name).exists()]
    assert missing == []
    modules = [*PROJECT_ROOT.glob("*.py"), *PROJECT_ROOT.glob("models/**/*.py"), *PROJECT_ROOT.glob("tools/*.py")]
    named = {file.relative_to(PROJECT_ROOT).as_posix() for file in modules if file.name != "__init__.py"}
    assert named <= set(drawn)
    assert len(drawn) == len(set(drawn))


def test_the_file_structure_names_every_folder() -> None:
    made_here = {"run", "htmlcov", "node_modules"}
    folders = {
        entry.name
        for entry in PROJECT_ROOT.iterdir()
        if entry.is_dir() and not entry.name.startswith((".", "__")) and entry.name not in made_here
    }
    assert folders <= {name.split("/")[0] for name in drawn_files()}


def test_lines_of_boxes_have_one_width() -> None:
    lines = ARCHITECTURE.read_text(encoding="utf-8").split("\n")
    boxed = [line for line in lines if line.startswith(("┌", "│", "├", "└"))]
    assert not [c for line in boxed for c in line if unicodedata.east_asian_width(c) in "WF"]
    assert len({len(line) for line in boxed}) == 1
    assert not [line for line in boxed if line[-1] not in "┐│┤┘"]


def test_sides_of_inner_boxes_line_up() -> None:
    """Below the corner of a box there is its side, down to the lower corner."""
    lines = ARCHITECTURE.read_text(encoding="utf-8").split("\n")
    num_boxes = 0
    for top, line in enumerate(lines):
        for corner in re.finditer(r"┌─+┐", line):
            num_boxes += 1
            left, right = corner.start(), corner.end() - 1
            for below in lines[top + 1 :]:
                sides = below[left], below[right]
                assert sides in {("│", "│"), ("├", "┤"), ("└", "┘")}, below
                if sides == ("└", "┘"):
                    break
    assert num_boxes > 20
