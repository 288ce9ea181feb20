"""Images are pinned to what their registry says, or no file is touched. The registry is a small one on the loopback."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tools.pin_digests import FILES, IMAGE, OWN, PROJECT, PinError, pin, split_image

TOKEN = "anonymous-token"


class Registry:
    """Knows these images by repository and tag, and shows them to who has fetched a token."""

    def __init__(self) -> None:
        self.digests = {"base:1.2-slim": "sha256:" + "a" * 64, "team/tool:v3": "sha256:" + "b" * 64}
        registry = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                repository, tag = self.path.removeprefix("/v2/").split("/manifests/")
                digest = registry.digests.get(f"{repository}:{tag}")
                if self.headers["Authorization"] != f"Bearer {TOKEN}":
                    realm = f'Bearer realm="http://{registry.host}/token",service="test",scope="pull:{repository}"'
                    self.answer(401, {"WWW-Authenticate": realm})
                elif digest is None:
                    self.answer(404, {})
                else:
                    assert "application/vnd.oci.image.index.v1+json" in self.headers["Accept"]
                    self.answer(200, {"Docker-Content-Digest": digest})

            def do_GET(self) -> None:
                assert self.path.startswith("/token?service=test&scope=pull%3A")
                self.answer(200, {}, json.dumps({"token": TOKEN}).encode())

            def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"localhost:{self.server.server_port}"


@pytest.fixture
def registry() -> Iterator[Registry]:
    registry = Registry()
    thread = threading.Thread(target=registry.server.serve_forever)
    thread.start()
    yield registry
    registry.server.shutdown()
    registry.server.server_close()
    thread.join()


@pytest.fixture
def files(registry: Registry, tmp_path: Path) -> list[Path]:
    docker, compose = tmp_path / "Dockerfile", tmp_path / "compose.yaml"
    docker.write_text(f"FROM {registry.host}/base:1.2-slim\nRUN true\n")
    compose.write_text(f"services:\n  a:\n    image: {OWN}:1.0\n  b:\n    image: {registry.host}/team/tool:v3\n")
    return [docker, compose]


def test_images_get_the_digests_of_their_tags_and_our_own_stays(registry: Registry, files: list[Path]) -> None:
    pin(files)
    docker, compose = (file.read_text() for file in files)
    assert docker == f"FROM {registry.host}/base:1.2-slim@sha256:{'a' * 64}\nRUN true\n"
    assert f"    image: {OWN}:1.0\n" in compose
    assert compose.endswith(f"    image: {registry.host}/team/tool:v3@sha256:{'b' * 64}\n")


def test_pinning_again_follows_a_tag_that_has_moved(registry: Registry, files: list[Path]) -> None:
    pin(files)
    registry.digests["base:1.2-slim"] = "sha256:" + "c" * 64
    pin(files)
    assert files[0].read_text() == f"FROM {registry.host}/base:1.2-slim@sha256:{'c' * 64}\nRUN true\n"


@pytest.mark.parametrize("digest", [None, "", "latest"])
def test_an_image_without_a_digest_is_named_and_no_file_is_touched(
    registry: Registry, files: list[Path], digest: str | None
) -> None:
    if digest is None:
        del registry.digests["team/tool:v3"]
    else:
        registry.digests["team/tool:v3"] = digest
    before = [file.read_text() for file in files]
    with pytest.raises(PinError, match=r"team/tool:v3: the registry (answered 404|named no digest)"):
        pin(files)
    assert [file.read_text() for file in files] == before


def test_a_registry_that_is_away_is_a_sentence(registry: Registry, tmp_path: Path) -> None:
    file = tmp_path / "Dockerfile"
    file.write_text("FROM localhost:1/base:1\n")
    with pytest.raises(PinError, match="localhost:1/base:1: the registry cannot be asked"):
        pin([file])


@pytest.mark.parametrize(
    ("image", "parts"),
    [
        ("python:3.12-slim", ("https://registry-1.docker.io", "library/python", "3.12-slim")),
        ("prom/prometheus:v3", ("https://registry-1.docker.io", "prom/prometheus", "v3")),
        ("ghcr.io/a/b/c:1", ("https://ghcr.io", "a/b/c", "1")),
        ("host:5000/a:1", ("https://host:5000", "a", "1")),
    ],
)
def test_names_of_images_are_read_as_docker_reads_them(image: str, parts: tuple[str, str, str]) -> None:
    assert split_image(image) == parts


def test_every_image_of_our_files_has_a_version_tag_that_would_be_pinned() -> None:
    for name in FILES:
        text = (PROJECT / name).read_text()
        found = [match["tagged"] for match in IMAGE.finditer(text)]
        assert len(found) == len(re.findall(r"^\s*(?:FROM|image:)\s", text, re.MULTILINE)) > 0
        assert all(re.search(r":v?\d+\.\d+", tagged) for tagged in found)
