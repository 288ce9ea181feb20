"""Real proxies in front of real servers, on the loopback: the files of `ops/`, with ports and paths of a test.

What is tested is the shipped file: `rewritten` replaces named places and insists that each is there exactly as often
as it says.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from config import PROJECT_ROOT

GENEROUS_S = 60.0
OPS = PROJECT_ROOT / "ops"


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def need(*programs: str) -> None:
    """Skip the test that calls this, naming what is missing."""
    search = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [program for program in programs if shutil.which(program, path=search) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)}: not installed")


def tool(program: str) -> str:
    """Its path; Debian keeps servers in folders that are not on everybody's PATH."""
    found = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    assert found is not None
    return found


def rewritten(file: Path, places: Mapping[str, tuple[str, int]]) -> str:
    """:param places: what stands in the file -> what to put there, and how often it stands there."""
    text = file.read_text(encoding="utf-8")
    for old, (new, times) in places.items():
        assert text.count(old) == times, f"{file.name}: {old!r} is there {text.count(old)} times, not {times}"
        text = text.replace(old, new)
    return text


class Certificate:
    """Self-signed, made with openssl, for ai.example.org and the loopback."""

    def __init__(self, folder: Path) -> None:
        self.chain, self.key, self.both = folder / "chain.pem", folder / "key.pem", folder / "both.pem"
        names = "subjectAltName=DNS:ai.example.org,IP:127.0.0.1"
        command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
        command += f" -addext {names} -keyout {self.key} -out {self.chain}"
        subprocess.run(command.split(), check=True, capture_output=True)
        self.both.write_text(self.chain.read_text() + self.key.read_text())

    def context(self, *protocols: str) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.chain))
        if protocols:
            context.set_alpn_protocols(list(protocols))
        return context


class Proxy:
    """One proxy with TLS on a free port, in front of the servers on `ports`: one, or two."""

    def __init__(self, folder: Path, command: Sequence[str], certificate: Certificate, port: int, plain: int) -> None:
        self.port, self.plain_port, self.certificate = port, plain, certificate
        self.log = folder / "log"
        with self.log.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=out)
        deadline = time.monotonic() + GENEROUS_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                return
            except ConnectionRefusedError:
                assert self.process.poll() is None, self.log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(GENEROUS_S)


def start_nginx(folder: Path, ports: Sequence[int], certificate: Certificate) -> Proxy:
    port, plain = free_port(), free_port()
    places = {
        "listen 80;": (f"listen 127.0.0.1:{plain};", 1),
        "listen [::]:80;": ("", 1),
        "listen 443 ssl http2;": (f"listen 127.0.0.1:{port} ssl http2;", 1),
        "listen [::]:443 ssl http2;": ("", 1),
        "/etc/letsencrypt/live/ai.example.org/fullchain.pem": (str(certificate.chain), 1),
        "/etc/letsencrypt/live/ai.example.org/privkey.pem": (str(certificate.key), 1),
        "    server 127.0.0.1:8085 max": (f"    server 127.0.0.1:{ports[0]} max", 1),
    }
    if len(ports) > 1:
        places["    # server 10.0.0.12:8085 max"] = (f"    server 127.0.0.1:{ports[1]} max", 1)
    (folder / "avito-ai.conf").write_text(rewritten(OPS / "nginx" / "avito-ai.conf", places))
    temporary = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in ("proxy", "fastcgi", "uwsgi", "scgi"))
    (folder / "nginx.conf").write_text(
        f"daemon off;\nworker_processes 2;\npid {folder}/pid;\nerror_log stderr;\n"
        + ("user root;\n" if os.geteuid() == 0 else "")
        + "events { worker_connections 512; }\n"
        + f"http {{\naccess_log off;\nclient_body_temp_path {folder}/bodies;\n{temporary}"
        + f"include {folder}/avito-ai.conf;\n}}\n"
    )
    command = [tool("nginx"), "-e", "stderr", "-p", str(folder), "-c", str(folder / "nginx.conf")]
    return Proxy(folder, command, certificate, port, plain)


def start_haproxy(folder: Path, ports: Sequence[int], certificate: Certificate) -> Proxy:
    port, plain = free_port(), free_port()
    places = {
        "log /dev/log local0": ("log stdout format raw local0", 1),
        "    user haproxy\n    group haproxy\n": ("", 1),
        "bind :80": (f"bind 127.0.0.1:{plain}", 1),
        "bind :443": (f"bind 127.0.0.1:{port}", 1),
        "ssl crt /etc/haproxy/certs/avito-ai.pem": (f"ssl crt {certificate.both}", 1),
        "    server host1 127.0.0.1:8085": (f"    server host1 127.0.0.1:{ports[0]}", 1),
    }
    if len(ports) > 1:
        places["    # server host2 10.0.0.12:8085"] = (f"    server host2 127.0.0.1:{ports[1]}", 1)
    (folder / "haproxy.cfg").write_text(rewritten(OPS / "haproxy" / "haproxy.cfg", places))
    command = [tool("haproxy"), "-db", "-f", str(folder / "haproxy.cfg")]
    return Proxy(folder, command, certificate, port, plain)
