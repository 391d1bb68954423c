"""Addresses of Ray clusters, checked before anything waits for one."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from fewstep.search.cluster import address_of
from fewstep.space.errors import StudyError

_PATIENCE = 3.0  # seconds


def check_address(address: str | None) -> None:
    """Refuse, within seconds, an address (or RAY_ADDRESS) that no search can join.

    Raises:
        StudyError: nobody answers there, or a dashboard does.
    """
    address = address_of(address)
    if address is None:
        return
    place = address
    if address == "auto":
        place = os.environ.get("RAY_ADDRESS") or _current_cluster()
    plain = place.removeprefix("ray://")
    if plain.startswith(("http://", "https://")) or _answers_http(address, plain):
        raise StudyError(
            f"--address {address} is that of a dashboard, which takes jobs: fewstep submit STUDY "
            f"--address http://{plain.partition('://')[2] or plain}; a search joins host:6379 or "
            "ray://host:10001"
        )
    if address.startswith("ray://"):
        use_token()


def use_token() -> None:
    """Show servers Ray's token, where this user has one, before Ray is imported.

    Every search with workers makes one (`ray.init`), and a head that finds it lets nobody in
    without. Ray shows it unasked to the cluster of this machine alone. Drivers that join a
    cluster without a token by host:port must not show theirs: their workers die.
    """
    if (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _current_cluster() -> str:
    """Where `ray start` on this machine noted its address."""
    folder = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"
    try:
        return (folder / "ray_current_cluster").read_text().strip()
    except OSError:
        raise StudyError(
            "--address auto: no Ray cluster was started on this machine (ray start --head); name "
            "its address, or leave --address out"
        ) from None


def _answers_http(address: str, place: str) -> bool:
    host, _, port = place.rpartition(":")
    if not host or not port.isdigit():
        raise StudyError(f"--address {address}: write auto, host:port or ray://host:port")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _PATIENCE) as talk:
            talk.settimeout(_PATIENCE)
            talk.sendall(b"GET /api/version HTTP/1.0\r\n\r\n")
            with contextlib.suppress(OSError):
                return talk.recv(8).startswith(b"HTTP/")
    except OSError as error:
        raise StudyError(
            f"--address {address}: no Ray cluster answers there ({error.strerror or error}): is "
            "it running, and the port reachable from here?"
        ) from None
    return False
