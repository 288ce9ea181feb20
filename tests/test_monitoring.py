"""What `ops/` has for Prometheus, Alertmanager and Grafana, checked by promtool, amtool and a real Prometheus."""

from __future__ import annotations

import json
import queue
import re
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from flask import Flask

from tests.proxies import OPS, free_port, need, rewritten, tool
from tests.test_docs import ARCHITECTURE, MANUAL, known_metrics
from tests.test_keys import make as make_key
from tests.test_server import GENEROUS_S, Server, in_threads

RULES = OPS / "prometheus" / "avito-ai.rules.yml"
RULE_TESTS = OPS / "prometheus" / "avito-ai.test.yml"
ALERTMANAGER = OPS / "alertmanager" / "alertmanager.yml"
DASHBOARD = OPS / "grafana" / "avito-ai.json"
# Of Prometheus itself, of the client library's process collector, of the blackbox exporter.
OF_OTHERS = {"up", "process_start_time_seconds", "probe_success", "probe_ssl_earliest_cert_expiry"}


def checked(*command: object) -> str:
    """What the tool prints; the test fails with it if the tool does not approve."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=GENEROUS_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def alerts() -> dict[str, dict[str, Any]]:
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def queries() -> list[tuple[str, str]]:
    """Title and expression of every query of the dashboard, each panel's and each variable's."""
    dashboard = json.loads(DASHBOARD.read_text())
    return [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel.get("targets", [])]


def metrics_in(expression: str) -> set[str]:
    bare = re.sub(r'"[^"]*"', "", re.sub(r"\b(by|without|unless on) ?\([^)]*\)", "", expression))
    names = set(re.findall(r"(?<![\w:$])((?:avito|process|probe)_[a-z0-9_]+|up)\b(?!:)", bare))
    return {re.sub(r"(_seconds)_(bucket|sum|count)$", r"\1", name) for name in names}


# Files.


def test_promtool_approves_of_configuration_and_rules() -> None:
    need("promtool")
    checked(tool("promtool"), "check", "config", OPS / "prometheus" / "prometheus.yml")
    checked(tool("promtool"), "check", "rules", RULES)


def test_each_alert_fires_where_it_should_and_not_elsewhere() -> None:
    need("promtool")
    checked(tool("promtool"), "test", "rules", RULE_TESTS)


def test_each_alert_has_both_tests() -> None:
    expected: dict[str, set[bool]] = {name: set() for name in alerts()}
    for test in yaml.safe_load(RULE_TESTS.read_text())["tests"]:
        for case in test["alert_rule_test"]:
            expected[case["alertname"]].add(bool(case["exp_alerts"]))
    assert {name for name, kinds in expected.items() if kinds != {True, False}} == set()


def test_alerts_and_runbook_belong_together() -> None:
    """Each alert has its entry and links to it; each entry has its alert."""
    text = MANUAL.read_text(encoding="utf-8")
    entries = re.findall(r"^### (Avito\w+)$", text, re.MULTILINE)
    assert sorted(entries) == sorted(alerts())
    drawn = re.findall(r"(\d+) alerts", ARCHITECTURE.read_text(encoding="utf-8"))
    assert {int(number) for number in drawn} == {len(alerts())}
    for name, alert in alerts().items():
        assert alert["annotations"].keys() == {"summary", "description", "runbook"}
        assert alert["annotations"]["runbook"] == f"{MANUAL.name}#{name.lower()}"
        assert alert["labels"]["severity"] in ("critical", "warning")
        entry = re.search(rf"^### {name}\n\n(.*?)(?=^##)", text, re.MULTILINE | re.DOTALL)
        assert entry is not None
        assert all(word in entry[1] for word in ("**Look:**", "**Do:**", "**Within:**")), name


def test_rules_and_dashboard_name_metrics_that_there_are(app: Flask) -> None:
    known = known_metrics(app).keys() | OF_OTHERS
    named = {name for rule in rules() for name in metrics_in(str(rule["expr"]))}
    named |= {name for _, expression in queries() for name in metrics_in(expression)}
    assert len(named) > 30
    assert named <= known


def test_dashboard_shows_every_metric_of_ours(app: Flask) -> None:
    shown = {name for _, expression in queries() for name in metrics_in(expression)}
    assert {name for name in known_metrics(app) if name.startswith("avito_")} <= shown


def test_amtool_approves_and_sends_what_is_critical_to_slack_too() -> None:
    need("amtool")
    checked(tool("amtool"), "check-config", ALERTMANAGER)
    for severity, receiver in {"critical": "mail-and-slack", "warning": "mail"}.items():
        command = ("config", "routes", "test", "--config.file", ALERTMANAGER, f"severity={severity}")
        assert checked(tool("amtool"), *command).strip() == receiver
    receivers = {receiver["name"]: receiver for receiver in yaml.safe_load(ALERTMANAGER.read_text())["receivers"]}
    assert "email_configs" in receivers["mail"]
    assert {"email_configs", "slack_configs"} <= receivers["mail-and-slack"].keys()
    assert set(re.findall(r"Avito[A-Z]\w+", ALERTMANAGER.read_text())) <= alerts().keys(), "inhibitions"


def test_messages_lead_to_the_runbook(tmp_path: Path) -> None:
    need("amtool")
    annotations = {"summary": "It hangs", "description": "No step", "runbook": f"{MANUAL.name}#avitohung"}
    labels = {"severity": "critical", "alertname": "AvitoHung", "instance": "host1"}
    alert = {"status": "firing", "labels": labels, "annotations": annotations}
    data = tmp_path / "alerts.json"
    data.write_text(json.dumps({"status": "firing", "commonLabels": labels, "alerts": [alert]}))
    message = checked(
        tool("amtool"),
        "template",
        "render",
        f"--template.glob={OPS}/alertmanager/*.tmpl",
        '--template.text={{ template "avito.title" . }}: {{ template "avito.text" . }}',
        f"--template.data={data}",
    )
    assert message.startswith("[FIRING] critical: AvitoHung on host1: It hangs\nNo step\n")
    assert f"/{MANUAL.name}#avitohung" in message


# A real Alertmanager.


class Slack(BaseHTTPRequestHandler):
    """Takes messages as Slack's webhook does."""

    messages: queue.Queue[dict[str, Any]] = queue.Queue()

    def do_POST(self) -> None:
        self.messages.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, format: str, *arguments: Any) -> None:
        return


@pytest.fixture
def slack() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slack)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/hook"
    server.shutdown()
    thread.join()
    server.server_close()


def test_critical_alert_reaches_slack_with_its_link_and_what_follows_from_it_does_not(
    tmp_path: Path, slack: str
) -> None:
    need("prometheus-alertmanager")
    (tmp_path / "webhook").write_text(slack)
    (tmp_path / "password").write_text("none")
    places = {
        "/etc/prometheus/secrets/slack-webhook": (str(tmp_path / "webhook"), 1),
        "/etc/prometheus/secrets/smtp-password": (str(tmp_path / "password"), 1),
        "mail.example.org:587": ("127.0.0.1:1", 1),
        "group_wait: 10s": ("group_wait: 1s", 1),
    }
    (tmp_path / "alertmanager.yml").write_text(rewritten(ALERTMANAGER, places))
    shutil.copytree(OPS / "alertmanager", tmp_path / "alertmanager_templates")
    port = free_port()
    command = [tool("prometheus-alertmanager"), f"--config.file={tmp_path}/alertmanager.yml"]
    command += [
        f"--web.listen-address=127.0.0.1:{port}",
        f"--storage.path={tmp_path}/data",
        "--cluster.listen-address=",
    ]
    names = ("AvitoNotReady", "AvitoErrors", "AvitoHung")
    posted = [
        {
            "labels": {"alertname": name, "instance": "host1", "severity": alerts()[name]["labels"]["severity"]},
            "annotations": {"summary": f"{name} it is", "runbook": alerts()[name]["annotations"]["runbook"]},
        }
        for name in names
    ]
    with (tmp_path / "log").open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + GENEROUS_S
        while True:
            url = f"http://127.0.0.1:{port}/api/v2/alerts"
            headers = {"Content-Type": "application/json"}
            try:
                urllib.request.urlopen(urllib.request.Request(url, json.dumps(posted).encode(), headers)).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.05)
        message = Slack.messages.get(timeout=GENEROUS_S)
        (attachment,) = message["attachments"]
        assert attachment["title"] == "[FIRING] critical: AvitoHung on host1"
        assert attachment["title_link"].endswith(f"/{MANUAL.name}#avitohung")
        assert "AvitoHung it is" in attachment["text"]
        with urllib.request.urlopen(url) as response:
            states = json.load(response)
        held_back = {each["labels"]["alertname"] for each in states if each["status"]["state"] == "suppressed"}
        assert held_back == {"AvitoNotReady", "AvitoErrors"}
        assert Slack.messages.empty()
    finally:
        process.kill()
        process.wait(GENEROUS_S)


# A real Prometheus.


class Prometheus:
    """The shipped configuration and rules, against a server on `port`, a scrape every quarter of a second."""

    def __init__(self, folder: Path, port: int) -> None:
        places = {
            "scrape_interval: 15s": ("scrape_interval: 250ms", 1),
            "evaluation_interval: 15s": ("evaluation_interval: 250ms", 1),
            '["127.0.0.1:8085"]': (f'["127.0.0.1:{port}"]', 1),
            '["127.0.0.1:9093"]': ("[]", 1),
            "replacement: 127.0.0.1:9115": ("replacement: 127.0.0.1:1", 1),
        }
        (folder / "prometheus.yml").write_text(rewritten(OPS / "prometheus" / "prometheus.yml", places))
        (folder / RULES.name).write_text(RULES.read_text())
        self.port, self.log = free_port(), folder / "log"
        command = [tool("prometheus"), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                [*command, f"--web.listen-address=127.0.0.1:{self.port}"], stdout=out, stderr=out
            )

    def ask(self, path: str, **parameters: str) -> Any:
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=GENEROUS_S) as response:
            return json.load(response)["data"]

    def query(self, expression: str) -> list[Any]:
        return list(self.ask("query", query=expression)["result"])

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + GENEROUS_S
        while True:
            try:
                if condition():
                    return
            except OSError:
                assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"{what}:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.05)


@pytest.fixture
def loaded(tmp_path: Path) -> Iterator[tuple[Server, Prometheus]]:
    """A service under load, with answers, refusals and an error of each kind, and a Prometheus that scrapes it."""
    need("prometheus")
    key = make_key(tmp_path / "keys.json", "shop")
    settings = {"AVITO_KEYS_FILE": str(tmp_path / "keys.json"), "AVITO_RATE_LIMIT": ""}
    server = Server(tmp_path, "create(step_s=0.01)", settings)
    (tmp_path / "prometheus").mkdir()
    prometheus = Prometheus(tmp_path / "prometheus", server.port)
    try:
        server.wait_ready()
        prometheus.wait(lambda: prometheus.query("avito_ready == 1") != [], "no scrape")
        is_over = False

        def client(index: int) -> int:
            num_ok = 0
            while not is_over:
                num_ok += (
                    ask(server, key, "a prompt that all share, long enough for whole pages of the cache" * 2) == 200
                )
                ask(server, "", "without a key")
            return num_ok

        threads, results = in_threads(4, client)
        prometheus.wait(
            lambda: prometheus.query('sum(rate(avito_requests_total{outcome="ok"}[1m])) > 0.1') != [], "no rate"
        )
        is_over = True
        for thread in threads:
            thread.join(GENEROUS_S)
        assert all(isinstance(result, int) and result for result in results), results
        yield server, prometheus
    finally:
        for process in (server.process, prometheus.process):
            process.kill()
            process.wait(GENEROUS_S)


def ask(server: Server, key: str, prompt: str) -> int:
    body = json.dumps({"prompt": prompt}).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    url = f"http://127.0.0.1:{server.port}/api/v1/text/generate"
    return server._open(urllib.request.Request(url, body, headers))[0]


def test_every_query_of_the_dashboard_and_every_rule_works_on_a_service_under_load(loaded: Any) -> None:
    server, prometheus = loaded
    # The fake model has no ledger.
    without_data = {"avito_memory_planned_bytes"}
    instance = re.escape(f"127.0.0.1:{server.port}")
    for title, expression in queries():
        filled = expression.replace("$instance", instance.replace("\\", "\\\\")).replace("$__rate_interval", "1m")
        assert "$" not in filled, title
        values = {series["value"][1] for series in prometheus.query(filled)}
        if metrics_in(expression) <= without_data:
            continue
        assert values, f"{title}: {expression} gives nothing"
        # Readings of a card that there is not.
        assert values != {"NaN"} or all(name.startswith("avito_gpu") for name in metrics_in(expression)), title
    groups = prometheus.ask("rules")["groups"]
    working = [rule["name"] for group in groups for rule in group["rules"] if rule["health"] == "ok"]
    assert len(working) == len(rules()), groups
    firing = {alert["labels"]["alertname"] for alert in prometheus.ask("alerts")["alerts"]}
    assert firing <= {"AvitoUnreachable", "AvitoDiskFilling", "AvitoDiskFull", "AvitoHostMemory"}, "all else is well"
