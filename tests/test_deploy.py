"""deploy.sh and its tools as far as they go without network, torch or a model: refusals, reports, pins."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from config import Settings
from tools import download_size, prepare_demo_avibe, service_client

PROJECT = Path(__file__).resolve().parent.parent
PIN = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*==[0-9][0-9a-z.]*")


@pytest.fixture
def folder(tmp_path):
    """A copy of the project's scripts, so that no test sees the service or the .venv of the real one."""
    target = tmp_path / "folder with spaces"
    target.mkdir()
    for name in ("deploy.sh", "requirements.txt"):
        shutil.copy(PROJECT / name, target)
    return target


def deploy(folder: Path, *arguments: str, cwd: Path | None = None, path: str = "") -> subprocess.CompletedProcess[str]:
    """Run deploy.sh, with what is in the folder `path` preferred to the commands of the machine."""
    command = ["bash", str(folder / "deploy.sh"), *arguments]
    environment = {"PATH": f"{path}:{os.environ['PATH']}"}
    return subprocess.run(
        command, cwd=cwd or folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


# ------------------------------------------------------------------------------------------- deploy.sh


@pytest.mark.parametrize("script", ["deploy.sh", ".ci/run", "ops/try_deploy.sh"])
def test_scripts_are_clean_for_shellcheck(script):
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    result = subprocess.run([shellcheck, script], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "which command?"),
        (["fly"], "unknown command 'fly'"),
        (["stop", "now"], "the command 'stop' takes no argument"),
        (["logs", "--fast"], "unknown arguments 'logs --fast'"),
        (["venv", "--dev", "x"], "unknown arguments 'venv --dev x'"),
        (["releases", "x"], "the command 'releases' takes no argument"),
    ],
)
def test_unknown_words_are_refused_in_one_sentence_with_exit_code_2(folder, arguments, complaint):
    result = deploy(folder, *arguments)
    assert result.returncode == 2
    assert result.stderr == f"Error: {complaint}; './deploy.sh help' lists what there is\n"


def test_help_names_every_command_that_there_is(folder):
    commands = set(re.findall(r"^cmd_(\w+)\(\)", (PROJECT / "deploy.sh").read_text(), re.MULTILINE))
    listed = set(re.findall(r"^  (\w+) {2,}", deploy(folder, "help").stdout, re.MULTILINE))
    assert listed == commands | {"help"}


def test_without_a_service_status_exits_3_and_stop_0_from_any_folder(folder, tmp_path):
    status = deploy(folder, "status", cwd=tmp_path)
    assert (status.returncode, status.stdout) == (3, "Not running\n")
    stop = deploy(folder, "stop", cwd=tmp_path)
    assert (stop.returncode, stop.stdout) == (0, "Not running\n")


def test_a_pid_file_that_names_a_foreign_process_is_not_believed(folder):
    (folder / "run").mkdir()
    (folder / "run" / "avito-ai.pid").write_text(f"{os.getpid()}\n")
    assert deploy(folder, "status").returncode == 3
    assert deploy(folder, "stop").stdout == "Not running\n"  # and this test run is still alive


def test_without_a_start_there_is_no_log_and_it_says_so(folder):
    result = deploy(folder, "logs", "--no-follow")
    assert (result.returncode, result.stderr) == (
        1,
        "Error: There is no log yet: the service was never started here\n",
    )


def test_logs_prints_the_end_of_the_log(folder):
    (folder / "run").mkdir()
    (folder / "run" / "avito-ai.log").write_text("".join(f"line {n}\n" for n in range(1, 201)))
    assert deploy(folder, "logs", "--no-follow").stdout.splitlines() == [f"line {n}" for n in range(101, 201)]


@pytest.mark.parametrize(
    ("version", "complaint"),
    [
        ("3.9.2", "Python 3.11 or newer is needed, and the newest here is 3.9.2"),
        ("3.12.3", "Python 3.12.3 is here, but it cannot make virtual environments: apt install python3-venv"),
        ("", "Python 3.11 or newer is needed and there is none here: apt install python3 python3-venv"),
    ],
)
def test_a_machine_without_a_fit_python_is_told_what_to_install(folder, tmp_path, version, complaint):
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        # Fails at the question whether it can make a virtual environment, tells its version if it has one.
        script = f'#!/bin/sh\ncase "$2" in *platform*) echo {version} ;; *) exit 1 ;; esac\n'
        (commands / name).write_text(script)
        (commands / name).chmod(0o755)
    result = deploy(folder, "venv", path=str(commands))
    assert (result.returncode, result.stderr) == (1, f"Error: {complaint}\n")
    assert not (folder / ".venv").exists()


# ---------------------------------------------------------------------------------------- requirements


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_every_requirement_is_pinned_to_one_version(name):
    lines = [line.split("#")[0].strip() for line in (PROJECT / name).read_text().splitlines()]
    requirements = [line for line in lines if line and line != "-r requirements.txt"]
    assert [line for line in requirements if not PIN.fullmatch(line)] == []
    names = [line.split("==")[0] for line in requirements]
    assert sorted(set(names)) == sorted(names)


def test_torch_is_pinned_without_a_local_version_so_that_any_build_of_it_fits():
    assert re.search(r"^torch==[0-9.]+$", (PROJECT / "requirements.txt").read_text(), re.MULTILINE)


def test_the_demo_wheel_is_pinned_by_version_and_hash():
    text = prepare_demo_avibe.PINNED_WHEEL.read_text()
    pin = rf"^{re.escape(prepare_demo_avibe.SOURCE)} --hash=sha256:[0-9a-f]{{64}}$"
    assert re.search(pin, text, re.MULTILINE)


# --------------------------------------------------------------------------------------- download size


def plan_of(*sizes: tuple[str, int | None]) -> download_size.Plan:
    return download_size.Plan(dict(sizes))


def test_sizes_in_pips_plan_are_summed_and_unknown_ones_counted(tmp_path):
    wheel = tmp_path / "torch one.whl"
    wheel.write_bytes(b"x" * 1234)
    gone = tmp_path / "gone.whl"
    urls = {"Torch": wheel.as_uri(), "flask": "https://host.invalid/flask.whl", "gone": gone.as_uri()}
    report = {"install": [{"metadata": {"name": n}, "download_info": {"url": u}} for n, u in urls.items()]}

    def size_of(url: str) -> int | None:
        return 66 if url.startswith("https") else download_size.size_of(url)

    plan = download_size.read_plan(report, size_of)
    assert plan.sizes_bytes == {"torch": 1234, "flask": 66, "gone": None}
    assert (plan.total_bytes, plan.unknown) == (1300, 1)


def test_the_size_line_names_the_largest_packages_and_what_is_unknown():
    plan = plan_of(("torch", 900_000_000), ("flask", 300_000_000), ("idna", 70_000), ("odd", None))
    assert download_size.describe(plan, free_bytes=10**12, has_gpu=False) == [
        "Downloading 4 packages, 1.2 GB (torch 900 MB, flask 300 MB), and 1 of unknown size"
    ]


def test_gpu_packages_without_a_gpu_bring_the_hint_to_another_index():
    plan = plan_of(("torch", 500_000_000), ("nvidia-cublas", 400_000_000), ("nvidia-ml-py", 58_000))
    assert "AVITO_TORCH_INDEX_URL" in download_size.describe(plan, 10**12, has_gpu=False)[1]
    assert len(download_size.describe(plan, 10**12, has_gpu=True)) == 1
    assert len(download_size.describe(plan_of(("nvidia-ml-py", 58_000)), 10**12, has_gpu=False)) == 1


def test_too_little_disk_for_the_plan_is_warned_of():
    lines = download_size.describe(plan_of(("torch", 1_000_000_000)), free_bytes=2_000_000_000, has_gpu=True)
    assert lines[1] == "Warning: 2.0 GB of disk are free, and this may take 3.5 GB"


def test_an_empty_plan_downloads_nothing():
    assert download_size.describe(plan_of(), 10**12, has_gpu=False) == ["Nothing to download"]


# ------------------------------------------------------------------------------------------ demo model


@pytest.fixture
def snapshot(tmp_path):
    """Small files where the real ones would be, with the marker that the tool writes over them."""
    output = tmp_path / "demo"
    output.mkdir()
    for name in ("model.safetensors", "tokenizer.json", "LICENSE"):
        (output / name).write_text(f"pretended {name}")
    prepare_demo_avibe.write_marker(output)
    return output


def test_a_complete_demo_is_recognised_without_torch(snapshot):
    code = (
        "import runpy, sys\n"
        "sys.modules.update(torch=None, transformers=None)\n"  # to import them is an error now
        f"runpy.run_path({prepare_demo_avibe.__file__!r}, run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code, "--output", str(snapshot)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"The embedded Avibe is ready in {snapshot}\n"


def test_the_marker_tells_the_service_that_this_is_a_demo_and_of_what(snapshot):
    marker = prepare_demo_avibe.read_marker(snapshot)
    assert marker is not None
    assert (marker["demo"], marker["name"]) == (True, "SmolLM2-135M-Instruct")
    assert re.fullmatch(r"[0-9a-f]{64}", marker["sha256"]["model.safetensors"])


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "avito_demo.json"])
def test_a_demo_with_a_file_missing_or_cut_is_not_complete(snapshot, name):
    assert prepare_demo_avibe.is_complete(snapshot)
    (snapshot / name).write_text("")
    assert not prepare_demo_avibe.is_complete(snapshot)
    (snapshot / name).unlink()
    assert not prepare_demo_avibe.is_complete(snapshot)


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    assert prepare_demo_avibe.main(["--output", str(tmp_path)]) == 1
    assert "holds something that this tool did not make" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_the_demo_template_adds_no_system_line_of_its_own():
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Template(prepare_demo_avibe.CHAT_TEMPLATE)
    prompt = template.render(messages=[{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_the_tools_import_torch_and_transformers_only_where_they_convert():
    for path in sorted((PROJECT / "tools").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"torch", "transformers"}, path


# -------------------------------------------------------------------------------------- service client


class Script(BaseHTTPRequestHandler):
    """Answers each request with the next (status, body) that the test put in line; the last one stays."""

    answers: list[tuple[int, bytes]]
    authorizations: list[str | None]

    def do_GET(self) -> None:
        status, body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.authorizations.append(self.headers["Authorization"])
        self.do_GET()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def authorizations() -> list[str | None]:
    """The header of each POST that came to `service`."""
    return []


@pytest.fixture
def service(request, authorizations) -> Iterator[service_client.Service]:
    handler = type("Scripted", (Script,), {"answers": list(request.param), "authorizations": authorizations})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield service_client.Service(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join()


LOADING = b"""{"status": "not_ready", "why_not_ready": ["avibe: loading weights (3.2 s)"],
               "models": {"avibe": {"state": "loading", "phases": {"tokenizer": 0.41}}}}"""
READY = b"""{"status": "ready",
             "models": {"avibe": {"state": "ready", "phases": {"tokenizer": 0.41, "weights": 2.8}}}}"""
BROKEN = b"""{"status": "not_ready", "why_not_ready": ["avibe: a shard is missing"],
              "models": {"avibe": {"state": "failed", "phases": {}}}}"""


@pytest.mark.parametrize("service", [[(503, LOADING), (503, LOADING), (200, READY)]], indirect=True)
def test_waiting_tells_each_load_phase_once_until_ready(service):
    said: list[str] = []
    service_client.wait_until_ready(service, os.getpid(), timeout_s=30, say=said.append)
    assert said[:2] == ["  avibe: tokenizer 0.4 s", "  avibe: weights 2.8 s"]
    assert said[2].startswith("Ready after ")
    assert len(said) == 3


@pytest.mark.parametrize("service", [[(503, BROKEN)]], indirect=True)
def test_waiting_ends_at_once_when_a_model_failed(service):
    with pytest.raises(service_client.Failed, match="cannot become ready: avibe: a shard is missing"):
        service_client.wait_until_ready(service, os.getpid(), 30, say=print)


@pytest.mark.parametrize("service", [[(503, LOADING)]], indirect=True)
def test_waiting_ends_at_its_limit_and_says_why(service):
    with pytest.raises(service_client.Failed, match=r"not ready after 0 s: avibe: loading weights"):
        service_client.wait_until_ready(service, os.getpid(), timeout_s=0, say=lambda line: None)


def test_waiting_ends_at_once_when_the_process_ended():
    process = subprocess.Popen(["true"])
    deadline = threading.Event()
    while service_client.is_alive(process.pid):  # a zombie until we collect it, which counts as dead
        assert not deadline.wait(0.01)
    nobody = service_client.Service("http://127.0.0.1:9")
    with pytest.raises(service_client.Failed, match="ended while it was starting"):
        service_client.wait_until_ready(nobody, process.pid, 30, say=print)
    process.wait()


def completion(text: str, *, is_demo: bool) -> tuple[int, bytes]:
    data = {"text": text, "generated_tokens": 9, "demo": is_demo}
    return 200, json.dumps({"success": True, "data": data, "metrics": {"total_time": 0.5}}).encode()


HEALTH = (200, b'{"status": "healthy", "version": "1", "uptime_seconds": 1, "models": {}}')
METRICS = (200, b'{"system": {}, "gpu": {}, "application": {}}')
PROMETHEUS = (200, b'avito_model_ready{model="avibe"} 1.0\navito_model_ready{model="avision"} 1.0\n')
ONLY_AVIBE = (200, b'avito_model_ready{model="avibe"} 1.0\n')
STREAM = (200, b": waiting\n\nevent: delta\ndata: {}\n\nevent: done\ndata: {}\n\n")
SAID = ["/api/health: 200, healthy", "/api/metrics: 200", "/metrics: 200"]
BOTH = Settings.model_validate({"AVIBE_MODEL_PATH": "a", "AVISION_MODEL_PATH": "b"})


@pytest.mark.parametrize(
    "service",
    [
        [
            *(completion("Paris.", is_demo=True), STREAM, completion(service_client.DRAWING_SHOWS, is_demo=True)),
            *(HEALTH, METRICS, PROMETHEUS),
        ],
        [
            *(completion("Paris.", is_demo=False), STREAM, completion("A house, and more.", is_demo=False)),
            *(HEALTH, METRICS, PROMETHEUS),
        ],
    ],
    indirect=True,
    ids=["embedded", "real"],
)
def test_trying_out_asks_both_models_and_shows_a_drawing(service):
    said: list[str] = []
    service_client.try_out(service, BOTH, say=said.append)
    assert [said[at].split(":")[0] for at in (0, 1, 3, 4, 5)] == ["Asked", "Avibe", "Streamed", "Asked", "Avision"]
    assert "shapes.png" in said[4] and said[7:] == SAID


@pytest.mark.parametrize(
    "service",
    [[completion("Paris.", is_demo=True), STREAM, completion("A small blue moon.", is_demo=True)]],
    indirect=True,
)
def test_an_embedded_avision_that_does_not_see_fails_the_trial(service):
    with pytest.raises(service_client.Failed, match=r"does not see what shapes.png shows, which is: A large red house"):
        service_client.try_out(service, BOTH, say=lambda line: None)


@pytest.mark.parametrize("service", [[(200, b"<html>")]], indirect=True)
def test_an_answer_that_is_no_json_object_is_a_failure_with_its_address(service):
    with pytest.raises(service_client.Failed, match="/api/health answered 200 with something else"):
        service.ask("/api/health")


@pytest.mark.parametrize(
    "service",
    [
        [
            *(completion("Paris.", is_demo=True), STREAM, completion(service_client.DRAWING_SHOWS, is_demo=True)),
            *(HEALTH, METRICS, PROMETHEUS),
        ]
    ],
    indirect=True,
)
def test_trying_out_a_service_with_keys_sends_the_one_it_was_given(service, authorizations):
    with_keys = BOTH.model_copy(update={"keys_file": "keys.json"})
    service_client.try_out(service, with_keys, say=lambda line: None, key="avito_x")
    assert authorizations == ["Bearer avito_x"] * 3


@pytest.mark.parametrize(
    ("service", "complaint"),
    [
        ([(503, b"")], "answered 503"),
        ([(200, b": waiting\n\nevent: delta\ndata: {}\n\n")], "streamed delta instead of deltas and done"),
        ([(200, b"event: error\ndata: {}\n\n")], "streamed error instead"),
    ],
    indirect=["service"],
)
def test_a_stream_that_does_not_end_well_fails_the_trial(service, complaint):
    with pytest.raises(service_client.Failed, match=complaint):
        service_client.ask_stream(service, service_client.TEXT_DOOR, service_client.PROOF, deadline_s=5)


@pytest.mark.parametrize(
    "service", [[HEALTH, METRICS, (200, b'avito_model_ready{model="avibe"} 1.0\n')]], indirect=True
)
def test_metrics_that_do_not_tell_of_a_model_fail_the_trial(service):
    with_keys = BOTH.model_copy(update={"keys_file": "keys.json"})
    with pytest.raises(service_client.Failed, match="does not tell that avision can serve"):
        service_client.try_out(service, with_keys, say=lambda line: None)


@pytest.mark.parametrize("service", [[HEALTH, METRICS, PROMETHEUS]], indirect=True)
def test_trying_out_a_service_with_keys_and_without_one_says_that_the_models_are_not_asked(service, authorizations):
    said: list[str] = []
    service_client.try_out(service, BOTH.model_copy(update={"keys_file": "keys.json"}), say=said.append)
    assert said == [
        "Keys are on and DEPLOY_API_KEY has none, so the models are not asked",
        *SAID,
    ]
    assert authorizations == []
