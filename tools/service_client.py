"""What deploy.sh asks of a running service: is it ready, does it answer, let it drain.

A client of the public doors like any other; it imports nothing of the service but its settings.
Standard library only, for HTTP too: this is what an operator runs when things are broken.

    python -m tools.service_client wait --pid 4711 --timeout-s 300
    python -m tools.service_client try | status | drain
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from config import PROJECT_ROOT, ConfigError, Settings, load_settings

POLL_S = 0.2
POLL_TIMEOUT_S = 5
SAY_AGAIN_S = 10  # after that long without news, waiting says what it waits for
MAX_RETRY_AFTER_S = 65

# One metric that each configured model has at /metrics.
READY_METRIC = 'avito_model_ready{model="%s"} 1.0'

# A key for the trial, where the service asks for keys.
KEY_VARIABLE = "DEPLOY_API_KEY"

QUESTION = "What is the capital of France?"
PROOF = {"prompt": QUESTION, "temperature": 0, "max_tokens": 32}
TEXT_DOOR, PICTURE_DOOR = "/api/v1/text/generate", "/api/v1/image/analyze"
DRAWING = PROJECT_ROOT / "static" / "samples" / "shapes.png"
PICTURE_QUESTION = "Describe the picture."
# What is on it. The embedded Avision must say just this; another model may choose its words.
DRAWING_SHOWS = (
    "A large red house on the left, a small blue star at the bottom, a large pink heart on the right. "
    "The price is 1250."
)
EXPECTED_KEYS = {
    "/api/health": {"status", "version", "uptime_seconds", "models"},
    "/api/metrics": {"system", "gpu", "application"},
}

Say = Callable[[str], None]


class Failed(Exception):
    """The service is not as it should be; the message is one sentence for the operator."""


class Answer(NamedTuple):
    status: int
    body: dict[str, Any]
    retry_after_s: float | None = None


class Service:
    """The running service under its own address, whatever proxy the environment names."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(self, path: str, *, payload: object = None, timeout_s: float = POLL_TIMEOUT_S, token: str = "") -> Answer:
        """GET path, or POST payload to it as JSON. Any status is an answer.

        :raise Failed: if nobody answers in time, or with something else than a JSON object.
        """
        status, text, after = self._open(path, payload, timeout_s, token)
        try:
            body = json.loads(text)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise Failed(f"{self.url}{path} answered {status} with something else than a JSON object")
        return Answer(status, body, float(after) if after and after.isdecimal() else None)

    def read(self, path: str, *, payload: object = None, timeout_s: float = POLL_TIMEOUT_S, token: str = "") -> str:
        """What is no JSON: the text of a page, or of a stream to its end.

        :raise Failed: the status is not 200, or nobody answers in time.
        """
        status, text, _ = self._open(path, payload, timeout_s, token)
        if status != 200:
            raise Failed(f"{path} answered {status}")
        return text.decode(errors="replace")

    def _open(self, path: str, payload: object, timeout_s: float, token: str) -> tuple[int, bytes, str | None]:
        headers = {"Content-Type": "application/json"} if payload is not None else {}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        data = json.dumps(payload).encode() if payload is not None else None
        request = urllib.request.Request(self.url + path, data=data, headers=headers)
        try:
            with self._opener.open(request, timeout=timeout_s) as response:
                return response.status, response.read(), None
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read(), error.headers.get("Retry-After")
        except (OSError, http.client.HTTPException) as error:
            raise Failed(f"{self.url}{path} does not answer: {getattr(error, 'reason', error)}") from error


def service_url(settings: Settings) -> str:
    """Where this machine reaches the service: the loopback address if it listens on all of them."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"


def is_alive(pid: int) -> bool:
    """Whether the process runs; a zombie, dead but not yet collected by its parent, does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_until_ready(service: Service, pid: int, timeout_s: float, say: Say) -> None:
    """Follow the loading of the models until all serve.

    :raise Failed: as soon as waiting is in vain: the process ended, a model failed, the time is up.
    """
    begun = said_at = time.monotonic()
    told: set[tuple[str, str]] = set()
    reasons = "it does not answer"
    while True:
        if not is_alive(pid):
            raise Failed("The service ended while it was starting")
        try:
            answer = service.ask("/api/health/ready")
        except Failed:
            pass  # the port is not bound yet
        else:
            for model, state in answer.body.get("models", {}).items():
                for phase, seconds in state.get("phases", {}).items():
                    if (model, phase) not in told:
                        told.add((model, phase))
                        said_at = time.monotonic()
                        say(f"  {model}: {phase} {seconds:.1f} s")
            if answer.status == 200:
                say(f"Ready after {time.monotonic() - begun:.1f} s")
                return
            reasons = "; ".join(answer.body.get("why_not_ready", [])) or f"it answers {answer.status}"
            if any(state.get("state") == "failed" for state in answer.body.get("models", {}).values()):
                raise Failed(f"The service cannot become ready: {reasons}")
        now = time.monotonic()
        if now - begun > timeout_s:
            raise Failed(f"The service is not ready after {timeout_s:g} s: {reasons}")
        if now - said_at > SAY_AGAIN_S:
            said_at = now
            say(f"  waiting for {now - begun:.0f} s: {reasons}")
        time.sleep(POLL_S)


def try_out(service: Service, settings: Settings, say: Say, key: str = "") -> None:
    """One real request to each door that tells most: text, a stream, a picture, health, metrics.

    :param key: for a service that asks for keys; without one its models are not asked.
    :raise Failed: a door did not answer as it must, or the embedded Avision does not see what is on a drawing.
    """
    deadline_s = settings.request_deadline_s
    can_ask = bool(key) or not settings.keys_file
    if not can_ask:
        say(f"Keys are on and {KEY_VARIABLE} has none, so the models are not asked")
    if can_ask and settings.avibe_model_path:
        say_answer("Avibe", QUESTION, ask_model(service, TEXT_DOOR, PROOF, deadline_s, key), say)
        say(f"Streamed: {ask_stream(service, TEXT_DOOR, PROOF, deadline_s, key)} events, the last one done")
    if can_ask and settings.avision_model_path:
        body = ask_model(service, PICTURE_DOOR, picture_proof(), deadline_s, key)
        say_answer("Avision", f"{DRAWING.name}: {PICTURE_QUESTION}", body, say)
        if body["data"].get("demo") and body["data"]["text"] != DRAWING_SHOWS:
            raise Failed(f"The embedded Avision does not see what {DRAWING.name} shows, which is: {DRAWING_SHOWS}")
    for path, keys in EXPECTED_KEYS.items():
        answer = service.ask(path)
        missing = sorted(keys - answer.body.keys())
        if answer.status != 200 or missing:
            what = f"without {', '.join(missing)}" if missing else json.dumps(answer.body)
            raise Failed(f"{path} answered {answer.status} {what}")
        detail = f", {answer.body['status']}" if "status" in answer.body else ""
        say(f"{path}: {answer.status}{detail}")
    metrics = service.read("/metrics").splitlines()
    models = {"avibe": settings.avibe_model_path, "avision": settings.avision_model_path}
    if silent := [name for name, path in models.items() if path and READY_METRIC % name not in metrics]:
        raise Failed(f"/metrics does not tell that {' and '.join(silent)} can serve")
    say("/metrics: 200")


def picture_proof() -> dict[str, Any]:
    picture = base64.b64encode(DRAWING.read_bytes()).decode("ascii")
    return {"prompt": PICTURE_QUESTION, "image": picture, "temperature": 0, "max_tokens": 64}


def ask_model(service: Service, path: str, payload: dict[str, Any], deadline_s: float, key: str = "") -> dict[str, Any]:
    """The success body of one real completion.

    :raise Failed: there is none, or its text is empty.
    """
    answer = service.ask(path, payload=payload, timeout_s=deadline_s + POLL_TIMEOUT_S, token=key)
    if answer.status == 429 and answer.retry_after_s is not None:
        # Restarts in a row can use up what one client may ask per minute.
        time.sleep(min(answer.retry_after_s, MAX_RETRY_AFTER_S))
        answer = service.ask(path, payload=payload, timeout_s=deadline_s + POLL_TIMEOUT_S, token=key)
    body = answer.body
    if answer.status != 200 or body.get("success") is not True:
        raise Failed(f"{path} answered {answer.status}: {body.get('error', {}).get('message', body)}")
    if not str(body["data"]["text"]).strip():
        raise Failed(f"{path} answered with an empty text")
    return body


def ask_stream(service: Service, path: str, payload: dict[str, Any], deadline_s: float, key: str = "") -> int:
    """How many events one streamed completion had.

    :raise Failed: it was refused, had no text, or did not end with `done`.
    """
    payload = {**payload, "stream": True}
    text = service.read(path, payload=payload, timeout_s=deadline_s + POLL_TIMEOUT_S, token=key)
    events = [line.removeprefix("event: ") for line in text.splitlines() if line.startswith("event: ")]
    if events[-1:] != ["done"] or "delta" not in events:
        raise Failed(f"{path} streamed {', '.join(events) or 'nothing'} instead of deltas and done")
    return len(events)


def say_answer(name: str, question: str, body: dict[str, Any], say: Say) -> None:
    data, seconds = body["data"], body["metrics"]["total_time"]
    say(f"Asked: {question}")
    say(f"{name}: {' '.join(data['text'].split())}")
    who = ", embedded demo model" if data.get("demo") else ""
    say(f"       ({data['generated_tokens']} tokens in {seconds:.2f} s{who})")


def tell_status(service: Service) -> bool:
    """Say whether the service is ready, and if not why not."""
    answer = service.ask("/api/health/ready")
    if answer.status != 200:
        reasons = "; ".join(answer.body.get("why_not_ready", [])) or f"it answers {answer.status}"
        print(f"Not ready: {reasons}")
        return False
    serving = [model for model, state in answer.body.get("models", {}).items() if state.get("state") == "ready"]
    print(f"Ready: {', '.join(serving) or 'no model'} at {service.url}")
    return True


def drain(service: Service, settings: Settings) -> None:
    """Tell balancers through /api/health/ready to look away, and give them AVITO_DRAIN_S to do so."""
    if not settings.drain_s:
        return
    answer = service.ask("/api/drain", payload={}, token=settings.ops_token.get_secret_value())
    if answer.status != 200:
        raise Failed(f"/api/drain answered {answer.status}, so it is stopped without a drain")
    print(f"Draining for {settings.drain_s:g} s")
    time.sleep(settings.drain_s)


def say(line: str) -> None:
    print(line, flush=True)  # at once, into a pipe too


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.service_client")
    commands = parser.add_subparsers(dest="command", required=True)
    wait = commands.add_parser("wait", help="until ready, with the load phases")
    wait.add_argument("--pid", type=int, required=True, help="of the Gunicorn that was started")
    wait.add_argument("--timeout-s", type=float, required=True)
    commands.add_parser("try", help="one real request each: text, stream, picture, health, metrics")
    commands.add_parser("status", help="ready or why not")
    commands.add_parser("drain", help="before a stop, if AVITO_DRAIN_S asks for it")
    arguments = parser.parse_args()
    try:
        settings = load_settings()
        service = Service(service_url(settings))
        if arguments.command == "wait":
            wait_until_ready(service, arguments.pid, arguments.timeout_s, say)
        elif arguments.command == "try":
            try_out(service, settings, say, os.environ.get(KEY_VARIABLE, ""))
        elif arguments.command == "status":
            return 0 if tell_status(service) else 1
        else:
            drain(service, settings)
    except (Failed, ConfigError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
