"""Container files: linted, valid by their schemas, fitting together; commands and probes tried on the service.

No container runtime is needed, and none is replaced: whether an image builds, and a cluster takes the manifests, is not
shown here.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from docker.utils import exclude_paths
from flask import Flask

from config import PROJECT_ROOT, VERSION, ConfigError, Settings, load_settings
from tests.test_docs import known_metrics
from tests.test_server import GENEROUS_S, Server, in_threads
from tools.service_client import POLL_TIMEOUT_S

BIN = Path(sys.executable).parent
MANIFESTS = sorted((PROJECT_ROOT / "ops" / "kubernetes").glob("*.yaml"))
COMPOSE = PROJECT_ROOT / "ops" / "compose" / "compose.yaml"
TOKEN = "0123456789abcdef"
NUM_MODELS = 2
# What stopping takes besides the drain and the grace time: a Python that starts, and the engine's end.
STOP_MARGIN_S = 10
GIB = 1024**3


def load_yaml(file: Path) -> Any:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def manifest(kind: str) -> dict[str, Any]:
    (found,) = (document for document in map(load_yaml, MANIFESTS) if document["kind"] == kind)
    return dict(found)


POD = manifest("Deployment")["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
PROBES = {name: CONTAINER[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
SERVICES: dict[str, Any] = load_yaml(COMPOSE)["services"]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions in their order, continued lines joined, comments left out."""
    lines = [line for line in (PROJECT_ROOT / "Dockerfile").read_text().split("\n") if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.split("\n") if line)]


def only(name: str) -> str:
    (rest,) = (rest for found, rest in instructions() if found == name)
    return rest


def image_environment() -> dict[str, str]:
    return dict(part.split("=", 1) for part in shlex.split(only("ENV")))


def pod_environment(**more: str) -> dict[str, str]:
    return {**image_environment(), **manifest("ConfigMap")["data"], "AVITO_OPS_TOKEN": TOKEN, **more}


def compose_environment() -> dict[str, str]:
    """Of the service, with every value that .env must give set to a token."""
    given = {**image_environment(), **SERVICES["avito-ai"]["environment"]}
    return {name: re.sub(r"^\$\{\w+:\?.*\}$", TOKEN, value) for name, value in given.items()}


def pod_settings() -> Settings:
    return load_settings(pod_environment(), env_file=None)


def seconds(text: str) -> float:
    return float(text.removesuffix("s"))


def size_bytes(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Gi|g|m)", text).groups()  # type: ignore[union-attr]
    return int(number) * {"Gi": GIB, "g": GIB, "m": 1024**2}[unit]


def budget_s(probe: dict[str, Any]) -> float:
    """How long a probe may fail before it has consequences."""
    return float(probe["failureThreshold"] * probe["periodSeconds"])


# Schemas and linters.


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: file.stem)
def test_manifests_are_valid_for_kubernetes(file: Path) -> None:
    kubernetes_validate.validate(load_yaml(file), "1.37", strict=True)


def test_a_misspelt_field_would_be_found() -> None:
    deployment = manifest("Deployment")
    deployment["spec"]["template"]["spec"]["terminationGracePeriod"] = 180
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        kubernetes_validate.validate(deployment, "1.37", strict=True)


def check_compose(file: Path) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", file]
    return subprocess.run(command, capture_output=True, text=True, timeout=GENEROUS_S, check=False)


def test_compose_file_is_valid_by_the_compose_specification(tmp_path: Path) -> None:
    result = check_compose(COMPOSE)
    assert result.returncode == 0, result.stdout
    misspelt = tmp_path / "compose.yaml"
    misspelt.write_text(COMPOSE.read_text().replace("stop_grace_period", "stop_grace"))
    assert "stop_grace" in check_compose(misspelt).stdout


def test_dockerfile_is_clean_for_hadolint() -> None:
    command: list[str | Path] = [BIN / "hadolint", "Dockerfile"]
    result = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=GENEROUS_S, check=False)
    assert (result.returncode, result.stdout) == (0, "")


# The image.


def build_context(project: Path) -> set[str]:
    """The files that a client of Docker sends, by Docker's own reading of .dockerignore."""
    patterns = (PROJECT_ROOT / ".dockerignore").read_text().split("\n")
    patterns = [line for line in patterns if line and not line.startswith("#")]
    return {path for path in exclude_paths(str(project), patterns) if (project / path).is_file()}


def test_build_context_has_the_code_and_neither_weights_nor_secrets(tmp_path: Path) -> None:
    wanted = {"config.py", "requirements.txt", "models/engine/loop.py", "static/app.js", "templates/index.html"}
    wanted |= {"tools/service_client.py"}
    unwanted = {".env", ".git/config", ".venv/bin/python", "vibe/models/model.safetensors", "vision/demo/config.json"}
    unwanted |= {"run/avito-ai.log", "tests/conftest.py", "models/__pycache__/a.pyc", "keys.json", "ops/compose/.env"}
    for name in wanted | unwanted:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert build_context(tmp_path) == wanted


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What COPY puts into the image's working folder."""
    folder = tmp_path_factory.mktemp("image")
    context = build_context(PROJECT_ROOT)
    for name, rest in instructions():
        if name != "COPY":
            continue
        *sources, target = rest.split()
        for source in (source.removeprefix("./") for source in sources):
            found = {path for path in context if path == source or ("/" not in path and fnmatch(path, source))}
            inside = {path for path in context if path.startswith(f"{source}/")}
            assert found or inside, f"COPY {source}: there is nothing like it in the build context"
            for path in found | inside:
                # A folder's content is copied, not the folder.
                to = folder / target / (Path(path).relative_to(source) if inside else Path(path).name)
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(PROJECT_ROOT / path, to)
    return folder


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(factory: str, project: Path = PROJECT_ROOT, **settings: str) -> Server:
        servers.append(Server(tmp_path, factory, settings, project=project))
        return servers[-1]

    yield start
    for server in servers:
        server.process.kill()
        server.process.wait(GENEROUS_S)


def run(command: list[str], environ: dict[str, str], folder: Path = PROJECT_ROOT) -> subprocess.CompletedProcess[str]:
    """A command of the image, whose python is ours here."""
    assert command[0] == "python"
    return subprocess.run(
        [sys.executable, *command[1:]],
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=GENEROUS_S,
        check=False,
    )


def files_in(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def test_image_starts_as_its_gunicorn_configuration_says() -> None:
    assert json.loads(only("CMD")) == ["python", "-m", "gunicorn", "-c", "gunicorn_config.py"]


def test_files_of_the_image_serve_a_request_and_nothing_is_written_among_them(
    image: Path, serve: Callable[..., Server], tmp_path: Path
) -> None:
    """With the image's environment, the embedded Avision mounted, and the operator's own trial."""
    before = files_in(image)
    (tmp_path / "tmp").mkdir()
    given = image_environment() | {"HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "tmp")}
    given |= {"AVITO_COMPILE_CACHE": str(tmp_path / "cache" / "compile"), "AVITO_ALLOW_DEMO": "true"}
    given |= {"AVIBE_MODEL_PATH": "", "AVISION_MODEL_PATH": str(PROJECT_ROOT / "vision" / "demo")}
    del given["AVITO_PORT"]
    server = serve("", image, AVITO_DEVICE="cpu", **given).wait_ready()
    trial = run(["python", "-m", "tools.service_client", "try"], server.environ, image)
    assert trial.returncode == 0, trial.stderr
    for path in ("/", "/static/app.js"):
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=GENEROUS_S) as response:
            assert response.status == 200
    server.process.terminate()
    assert server.process.wait(GENEROUS_S) == 0, server.log.read_text()
    assert files_in(image) == before


def test_image_runs_as_a_numbered_user_who_owns_its_volumes() -> None:
    user, group = (POD["securityContext"][name] for name in ("runAsUser", "runAsGroup"))
    assert only("USER") == f"{user}:{group}" and user > 0 < group
    (made,) = (rest for name, rest in instructions() if name == "RUN" and "useradd" in rest)
    assert f"useradd --uid {user} --gid {group} " in made
    assert made.endswith(f"install --directory --owner={user} --group={group} {' '.join(json.loads(only('VOLUME')))}")


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (None, 1)], ids=["alive", "dead", "nobody"])
def test_healthcheck_is_the_liveness_door_whatever_proxy_is_set(status: int | None, code: int) -> None:
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status or 500)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            return

    command = json.loads(only("HEALTHCHECK").partition(" CMD ")[2])
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        environ = {**os.environ, "AVITO_PORT": str(server.server_port), "http_proxy": "http://127.0.0.1:1"}
        if status is None:
            server.server_close()
            assert run(command, environ).returncode == code
            return
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert run(command, environ).returncode == code
        thread.join(GENEROUS_S)
    assert asked == [PROBES["liveness"]["httpGet"]["path"]]


def test_versions_of_images_are_that_of_the_service() -> None:
    assert f'org.opencontainers.image.version="{VERSION}"' in only("LABEL")
    for name in (SERVICES["avito-ai"]["image"], CONTAINER["image"]):
        assert name.split("/")[-1] == f"avito-ai:{VERSION}"


# Settings.


def test_settings_of_pod_and_compose_are_sound_and_production() -> None:
    for environ in (pod_environment(), compose_environment()):
        settings = load_settings(environ, env_file=None)
        assert (settings.env, settings.host, settings.trusted_proxies) == ("production", "0.0.0.0", 1)
        assert not settings.allow_demo and settings.device == "cuda"
        # The card that was given is number 0 inside, whatever its number outside.
        assert "CUDA_VISIBLE_DEVICES" not in environ


def test_a_pod_without_the_secret_does_not_start() -> None:
    with pytest.raises(ConfigError, match="needs AVITO_OPS_TOKEN"):
        load_settings(pod_environment(AVITO_OPS_TOKEN=""), env_file=None)


def test_the_port_is_one_number_everywhere() -> None:
    port = pod_settings().port
    assert port == int(only("EXPOSE")) == Settings.model_validate({}).port
    assert CONTAINER["ports"] == [{"name": "http", "containerPort": port}]
    assert {probe["httpGet"]["port"] for probe in PROBES.values()} == {"http"}
    annotations = manifest("Deployment")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(port)
    assert [entry["targetPort"] for entry in manifest("Service")["spec"]["ports"]] == ["http"]
    assert f"127.0.0.1:{port}:{port}" in SERVICES["avito-ai"]["ports"]


def test_compose_opens_ports_to_this_machine_only() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)


# Files and volumes.


def is_under(path: str, folders: set[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)


def test_models_are_mounted_to_be_read_and_all_that_is_written_is_a_volume() -> None:
    assert CONTAINER["securityContext"]["readOnlyRootFilesystem"] and SERVICES["avito-ai"]["read_only"]
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    pod: dict[bool, set[str]] = {True: set(), False: set()}
    for mount in CONTAINER["volumeMounts"]:
        assert mount["name"] in volumes
        pod[mount.get("readOnly", False)].add(mount["mountPath"])
    compose: dict[bool, set[str]] = {True: set(), False: {"/tmp"}}
    assert [entry.split(":")[0] for entry in SERVICES["avito-ai"]["tmpfs"]] == ["/tmp"]
    for entry in SERVICES["avito-ai"]["volumes"]:
        compose[entry.endswith(":ro")].add(entry.removesuffix(":ro").rpartition(":")[2])
    for environ, mounted in ((pod_environment(), pod), (compose_environment(), compose)):
        settings = load_settings(environ, env_file=None)
        models = (settings.avibe_model_path, settings.avibe_tokenizer_path, settings.avision_model_path)
        assert all(is_under(path, mounted[True]) for path in models)
        assert is_under(settings.compile_cache, mounted[False]) and is_under(environ["HOME"], mounted[False])
        assert is_under("/tmp", mounted[False])


def test_names_that_manifests_use_of_each_other_exist() -> None:
    labels = manifest("Deployment")["spec"]["template"]["metadata"]["labels"]
    spread = POD["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"]
    selectors = [manifest(kind)["spec"]["selector"]["matchLabels"] for kind in ("Deployment", "PodDisruptionBudget")]
    for selector in (*selectors, manifest("Service")["spec"]["selector"], spread):
        assert selector and selector.items() <= labels.items()
    claims = [v["persistentVolumeClaim"]["claimName"] for v in POD["volumes"] if "persistentVolumeClaim" in v]
    assert claims == [manifest("PersistentVolumeClaim")["metadata"]["name"]]
    assert CONTAINER["envFrom"] == [{"configMapRef": {"name": manifest("ConfigMap")["metadata"]["name"]}}]
    target = manifest("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", manifest("Deployment")["metadata"]["name"])
    (rule,) = manifest("Ingress")["spec"]["rules"]
    service = {"name": manifest("Service")["metadata"]["name"], "port": {"name": "http"}}
    assert all(path["backend"] == {"service": service} for path in rule["http"]["paths"])
    (secret,) = (entry["valueFrom"]["secretKeyRef"] for entry in CONTAINER["env"])
    command = f"kubectl create secret generic {secret['name']} --from-literal={secret['key']}="
    assert command in (PROJECT_ROOT / "docs" / "containers.md").read_text()


def bind_mounts() -> list[str]:
    entries = [entry for service in SERVICES.values() for entry in service.get("volumes", [])]
    return sorted({entry.split(":")[0] for entry in entries if entry.startswith(".")})


@pytest.mark.parametrize("source", bind_mounts())
def test_what_compose_mounts_of_the_project_exists(source: str) -> None:
    assert (COMPOSE.parent / source).resolve().exists()


def test_grafana_reads_the_prometheus_and_the_dashboards_that_compose_gives_it() -> None:
    prometheus, grafana = SERVICES["prometheus"], SERVICES["grafana"]
    (source,) = load_yaml(COMPOSE.parent / "grafana" / "datasource.yaml")["datasources"]
    host, _, port = source["url"].removeprefix("http://").partition(":")
    assert prometheus["network_mode"] == f"service:{host}" and f"127.0.0.1:{port}:{port}" in SERVICES[host]["ports"]
    (provider,) = load_yaml(COMPOSE.parent / "grafana" / "dashboards.yaml")["providers"]
    assert f"../grafana:{provider['options']['path']}:ro" in grafana["volumes"]


# Numbers that must fit together.


def test_time_to_stop_covers_drain_grace_and_a_margin() -> None:
    settings = pod_settings()
    least_s = POLL_TIMEOUT_S + settings.drain_s + settings.grace_s + STOP_MARGIN_S
    assert POD["terminationGracePeriodSeconds"] >= least_s
    compose = load_settings(compose_environment(), env_file=None)
    assert seconds(SERVICES["avito-ai"]["stop_grace_period"]) >= compose.grace_s + STOP_MARGIN_S


def test_drain_lasts_until_readiness_has_been_seen_to_fail() -> None:
    assert pod_settings().drain_s >= budget_s(PROBES["readiness"]) + PROBES["readiness"]["timeoutSeconds"]


def test_startup_probe_waits_for_both_models_and_the_roll_out_for_it() -> None:
    assert budget_s(PROBES["startup"]) >= NUM_MODELS * pod_settings().load_timeout_s
    rollout = manifest("Deployment")["spec"]
    assert rollout["progressDeadlineSeconds"] > budget_s(PROBES["startup"]) + rollout["minReadySeconds"]
    assert rollout["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


def test_memory_covers_pictures_decoding_and_temporary_files() -> None:
    limits = pod_settings().limits
    pictures = NUM_MODELS * limits.max_picture_bytes
    decoding = NUM_MODELS * limits.max_concurrent_decodes * limits.max_image_px * 3
    (temporary,) = (v["emptyDir"]["sizeLimit"] for v in POD["volumes"] if v.get("emptyDir", {}).get("medium"))
    least = pictures + decoding + size_bytes(temporary)
    resources = CONTAINER["resources"]
    assert least < size_bytes(resources["requests"]["memory"]) <= size_bytes(resources["limits"]["memory"])
    compose = SERVICES["avito-ai"]["deploy"]["resources"]
    assert size_bytes(compose["limits"]["memory"]) == size_bytes(resources["limits"]["memory"])


def test_one_container_has_one_card() -> None:
    assert CONTAINER["resources"]["limits"]["nvidia.com/gpu"] == 1
    (device,) = SERVICES["avito-ai"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"] and len(device["device_ids"]) == 1


def test_a_pod_may_be_taken_while_another_serves() -> None:
    least = manifest("HorizontalPodAutoscaler")["spec"]["minReplicas"]
    assert manifest("PodDisruptionBudget")["spec"]["minAvailable"] == least - 1 > 0
    assert "replicas" not in manifest("Deployment")["spec"]


def test_autoscaler_follows_a_gauge_of_ours_before_the_queue_is_full(app: Flask) -> None:
    (metric,) = manifest("HorizontalPodAutoscaler")["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert known_metrics(app)[name] == "gauge"
    assert int(metric["pods"]["target"]["averageValue"]) < pod_settings().limits.max_waiting
    (rule,) = load_yaml(PROJECT_ROOT / "ops" / "kubernetes" / "prometheus-adapter" / "values.yaml")["rules"]["custom"]
    assert rule["seriesQuery"].startswith(f"{name}{{") and rule["name"]["as"] == name
    assert re.fullmatch(rule["name"]["matches"], name)


def test_ingress_has_the_doors_of_callers_and_keeps_the_operators_inside(app: Flask) -> None:
    (rule,) = manifest("Ingress")["spec"]["rules"]
    paths = [(entry["path"], entry["pathType"] == "Prefix") for entry in rule["http"]["paths"]]

    def is_open(door: str) -> bool:
        return any(door == path or (is_prefix and door.startswith(f"{path}/")) for path, is_prefix in paths)

    kept = {door.rule for door in app.url_map.iter_rules() if not is_open(door.rule)}
    probed = {probe["httpGet"]["path"] for probe in PROBES.values()}
    assert kept == probed | {"/metrics", "/api/metrics", "/api/metrics/reset", "/api/drain"}


def test_ingress_lets_our_own_limits_speak_first() -> None:
    limits = pod_settings().limits
    annotations = {
        key.rpartition("/")[2]: value for key, value in manifest("Ingress")["metadata"]["annotations"].items()
    }
    assert annotations["proxy-buffering"] == "off"
    assert int(annotations["proxy-read-timeout"]) > limits.request_deadline_s
    assert size_bytes(annotations["proxy-body-size"]) > limits.max_body_bytes


# Probes and hooks on the running service.


def passes(server: Server, probe: dict[str, Any]) -> bool:
    """As the kubelet judges: an answer below 400 within the probe's time."""
    url = f"http://127.0.0.1:{server.port}{probe['httpGet']['path']}"
    try:
        with urllib.request.urlopen(url, timeout=probe["timeoutSeconds"]) as response:
            return int(response.status) < 400
    except urllib.error.HTTPError as error:
        with error:
            return False
    except OSError:
        return False


def test_while_models_load_only_liveness_passes_and_then_all_do(serve: Callable[..., Server], tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    server = serve(f"create_held({str(pipe)!r})")
    server.wait(lambda: passes(server, PROBES["liveness"]), "a live worker")
    assert {name: passes(server, probe) for name, probe in PROBES.items()} == {
        "startup": False,
        "readiness": False,
        "liveness": True,
    }
    pipe.write_bytes(b"go")
    server.wait_ready()
    assert all(passes(server, probe) for probe in PROBES.values())


def test_pre_stop_takes_readiness_away_and_loses_no_request(serve: Callable[..., Server]) -> None:
    server = serve("create(step_s=0.01)", AVITO_OPS_TOKEN=TOKEN, AVITO_DRAIN_S="0.1").wait_ready()
    prompt = "x" * 300
    threads, results = in_threads(4, lambda _: server.ask(prompt))
    server.wait(lambda: server.application()["requests_running"] > 0, "running")
    hook = run(CONTAINER["lifecycle"]["preStop"]["exec"]["command"], server.environ)
    assert hook.returncode == 0, hook.stderr
    assert not passes(server, PROBES["readiness"]) and passes(server, PROBES["liveness"])
    # From a balancer that has not looked yet.
    assert server.ask("late")[0] == 200
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join(GENEROUS_S)
    assert [status for status, _ in results] == [200] * 4
    assert server.process.wait(GENEROUS_S) == 0, server.log.read_text()


def test_hung_engine_fails_liveness_and_is_replaced_before_the_kubelet_would(serve: Callable[..., Server]) -> None:
    server = serve("create(step_s=0.001)", AVITO_STALL_LIMIT_S="1").wait_ready()
    threads, results = in_threads(1, lambda _: server.ask("hang"))
    server.wait(lambda: server.get(PROBES["liveness"]["httpGet"]["path"])[0] == 503, "a failing probe")
    begun = time.monotonic()
    server.wait(lambda: passes(server, PROBES["liveness"]), "a new worker")
    assert time.monotonic() - begun < budget_s(PROBES["liveness"]) - PROBES["liveness"]["periodSeconds"]
    server.wait_ready()
    threads[0].join(GENEROUS_S)
    assert results[0][0] == 500 and server.ask("hello")[0] == 200
