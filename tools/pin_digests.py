"""Pins images of our container files to digests: `name:tag` becomes `name:tag@sha256:...`, as its registry says now.

    make pin-digests

A tag follows the corrections of what it names; a digest is one image for ever, so run this again to get newer ones.
Asks anonymously (OCI distribution specification: HEAD /v2/NAME/manifests/TAG, with a bearer token if the registry wants
one). Nothing is written unless every image was found. Images that we build ourselves are left alone.
"""

from __future__ import annotations

import json
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
FILES = ("Dockerfile", "ops/compose/compose.yaml")
OWN = "avito-ai"
TIMEOUT_S = 30
IMAGE = re.compile(r"^(?P<before>\s*(?:FROM|image:)\s+)(?P<tagged>[^\s@]+:[\w.-]+)(?P<digest>@\S+)?$", re.MULTILINE)
# An index names the images of all platforms: pinned, it still fits any.
MEDIA_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)


class PinError(Exception):
    """An image has no digest; the message is one sentence with its name."""


def split_image(tagged: str) -> tuple[str, str, str]:
    """Registry's address, repository and tag of an image's name, by Docker's rules."""
    name, _, tag = tagged.rpartition(":")
    host, slash, rest = name.partition("/")
    if slash and (host == "localhost" or "." in host or ":" in host):
        scheme = "http" if host.split(":")[0] == "localhost" else "https"
        return f"{scheme}://{host}", rest, tag
    return "https://registry-1.docker.io", name if slash else f"library/{name}", tag


def find_digest(tagged: str) -> str:
    """What the image's registry has under this tag now.

    :raise PinError: it cannot be reached, has no such image, or answers with something else than a digest.
    """
    registry, repository, tag = split_image(tagged)
    headers = {"Accept": ", ".join(MEDIA_TYPES)}
    address = f"{registry}/v2/{repository}/manifests/{tag}"
    try:
        try:
            digest = _head(address, headers)
        except urllib.error.HTTPError as error:
            with error:
                challenge = error.headers.get("WWW-Authenticate", "")
                if error.code != 401 or not challenge.startswith("Bearer "):
                    raise PinError(f"{tagged}: the registry answered {error.code}") from None
            digest = _head(address, headers | {"Authorization": f"Bearer {_get_token(challenge)}"})
    except urllib.error.HTTPError as error:
        with error:
            raise PinError(f"{tagged}: the registry answered {error.code}") from None
    except (OSError, ValueError, KeyError) as error:
        raise PinError(f"{tagged}: the registry cannot be asked: {error}") from None
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise PinError(f"{tagged}: the registry named no digest")
    return digest


def _head(address: str, headers: dict[str, str]) -> str:
    request = urllib.request.Request(address, headers=headers, method="HEAD")
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        return str(response.headers.get("Docker-Content-Digest", ""))


def _get_token(challenge: str) -> str:
    """An anonymous token, from where the registry's refusal sends us."""
    fields = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    query = urllib.parse.urlencode({name: value for name, value in fields.items() if name != "realm"})
    with urllib.request.urlopen(f"{fields['realm']}?{query}", timeout=TIMEOUT_S) as response:
        return str(json.load(response)["token"])


def pin(files: Sequence[Path]) -> list[str]:
    """Write the digests into the files. Returns a line for each image.

    :raise PinError: for the first image without one; no file has been touched then.
    """
    texts = {file: file.read_text(encoding="utf-8") for file in files}
    images = {match["tagged"] for text in texts.values() for match in IMAGE.finditer(text)}
    digests = {tagged: find_digest(tagged) for tagged in sorted(images) if tagged.rpartition(":")[0] != OWN}

    def pinned(match: re.Match[str]) -> str:
        tagged = match["tagged"]
        return f"{match['before']}{tagged}@{digests[tagged]}" if tagged in digests else match[0]

    for file, text in texts.items():
        file.write_text(IMAGE.sub(pinned, text), encoding="utf-8")
    return [f"{tagged}@{digest}" for tagged, digest in digests.items()]


def main() -> int:
    try:
        print("\n".join(pin([PROJECT / name for name in FILES])))
    except PinError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
