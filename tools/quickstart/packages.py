"""The pinned npm packages that the quickstart data comes from: getting, checking and reading them."""

import base64
import hashlib
import json
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track


@dataclass(frozen=True)
class Package:
    """One npm package at one version, and what has to be said about its pictures.

    Attributes:
        name: Name on npm.
        version: Exact version.
        integrity: Subresource integrity of the tarball, ``sha512-<base64>``, as npm reports it.
        author: Who made the contents that are used.
        licence: Licence of the contents that are used.
        source: Where the contents come from originally.
        style: Name of the drawing style, empty for a package without pictures.
        folder: Folder of the pictures (or of the JSON files) inside the tarball.
        held_out: Whether the style is for evaluation only and must never be trained on.
        icons: Whether the pictures are one Iconify file, named by the emoji's name instead of its code points.
    """

    name: str
    version: str
    integrity: str
    author: str
    licence: str
    source: str
    folder: str
    style: str = ""
    held_out: bool = False
    icons: bool = False

    @property
    def tarball(self) -> str:
        """File name that ``npm pack`` gives the tarball."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = (
    Package(
        "emoji-datasource-google",
        "16.0.0",
        "sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
        "Google (Noto Emoji); packaged by Cal Henderson (MIT)",
        "Apache-2.0",
        "https://github.com/googlefonts/noto-emoji",
        "package/img/google/64",
        "noto",
    ),
    Package(
        "emoji-datasource-twitter",
        "16.0.0",
        "sha512-7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
        "Twitter, Inc. and other contributors (Twemoji); packaged by Cal Henderson (MIT)",
        "CC-BY-4.0",
        "https://github.com/jdecked/twemoji",
        "package/img/twitter/64",
        "twemoji",
    ),
    Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "sha512-Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        "Microsoft Corporation (Fluent Emoji); packaged by LobeHub (MIT)",
        "MIT",
        "https://github.com/microsoft/fluentui-emoji",
        "package/assets",
        "fluent-3d",
    ),
    Package(
        "@lobehub/fluent-emoji-modern",
        "1.0.0",
        "sha512-YdZEgLC/vh29uDEl440q3W2vN50FdUFarQoKUHH9Clzx61/wW6mImLJywVBMKQPa3+GL59j3NvOlTLhH4rxleA==",
        "Microsoft Corporation (Fluent Emoji); packaged by LobeHub (MIT)",
        "MIT",
        "https://github.com/microsoft/fluentui-emoji",
        "package/assets",
        "fluent-modern",
    ),
    Package(
        "@iconify-json/noto-v1",
        "1.2.5",
        "sha512-/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        "Google (Noto Emoji, first edition); packaged by Iconify",
        "Apache-2.0",
        "https://github.com/googlefonts/noto-emoji",
        "package",
        "noto-v1",
        icons=True,
    ),
    Package(
        "@iconify-json/emojione",
        "1.2.3",
        "sha512-T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        "Ranks.com and the EmojiTwo contributors (EmojiOne 2); packaged by Iconify",
        "CC-BY-4.0",
        "https://github.com/EmojiTwo/emojitwo",
        "package",
        "emojione",
        icons=True,
    ),
    Package(
        "@iconify-json/fxemoji",
        "1.2.2",
        "sha512-UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
        "Mozilla (Firefox OS Emoji); packaged by Iconify",
        "Apache-2.0",
        "https://github.com/mozilla/fxemoji",
        "package",
        "fxemoji",
        icons=True,
    ),
    Package(
        "@iconify-json/emojione-monotone",
        "1.2.1",
        "sha512-cZSNcPsuiAD6HCzCh/2dYKGh3pNI0jJlxBxQWfC33cQsPtqYZqulGBvlkThXYNvDl8VxgVHT9u+izyX/yeEIkA==",
        "Ranks.com and the EmojiTwo contributors (EmojiOne 2); packaged by Iconify",
        "CC-BY-4.0",
        "https://github.com/EmojiTwo/emojitwo",
        "package",
        "emojione-monotone",
        icons=True,
    ),
    Package(
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "sha512-esqhZPpkrF7sNX3NsLoh8KW64okEr/bzko7WNnFP+qTJGAqDPDYjp0925yxuivXy3HtVQB8xhIKu3+Nq1byX5w==",
        "Microsoft Corporation (Fluent Emoji); packaged by Iconify",
        "MIT",
        "https://github.com/microsoft/fluentui-emoji",
        "package",
        "fluent-high-contrast",
        icons=True,
    ),
    Package(
        "openmoji",
        "17.0.0",
        "sha512-EBnYrNGdcdw+OSXmENeNE1yBNRu6tOraTmoOyUbJkTmvT/+XETp8RZLSJFzD3lrPc5N9CzsyPnRTk0Vp4UaI9w==",
        "HfG Schwäbisch Gmünd, Benedikt Groß, Daniel Utz and the OpenMoji contributors",
        "CC-BY-SA-4.0",
        "https://openmoji.org",
        "package/color/svg",
        "openmoji",
        held_out=True,
    ),
    Package(
        "emojibase-data",
        "17.0.0",
        "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
        "Miles Johnson",
        "MIT",
        "https://github.com/milesj/emojibase",
        "package/en",
    ),
)


def integrity(path: Path) -> str:
    """Returns the subresource integrity of a file: ``sha512-`` and the digest in base64."""
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def obtain(
    packages: Sequence[Package], folder: Path, console: Console, *, download: bool = True
) -> dict[Package, Path]:
    """Makes sure that every tarball lies in a folder and is the pinned one.

    Args:
        packages: What is needed.
        folder: Where the tarballs are, or are put. A tarball that is there already is not asked for again.
        console: Where the progress bar goes.
        download: Whether the npm client may be asked for what is missing.

    Returns:
        The tarball of each package.

    Raises:
        FileNotFoundError: A tarball is missing and may not or cannot be downloaded.
        RuntimeError: npm failed.
        ValueError: A tarball is not the pinned one.
    """
    paths = {}
    for package in track(packages, "packages", console=console, disable=not console.is_terminal):
        path = folder / package.tarball
        if not path.exists():
            if not download:
                raise FileNotFoundError(
                    f"{path} is missing: put the tarball of {package.name}@{package.version} there."
                )
            _npm_pack(package, path)
        else:
            _check(package, path)
        paths[package] = path
    return paths


def _npm_pack(package: Package, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    spec = f"{package.name}@{package.version}"
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        command = ["npm", "pack", spec, "--json", "--pack-destination", scratch]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"npm is needed to get {spec}: install Node.js, or pass --tarballs with the downloaded packages."
            ) from None
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"npm could not get {spec}: {error.stderr.strip()[-400:]}") from None
        fetched = Path(scratch) / package.tarball
        _check(package, fetched)
        os.replace(fetched, path)


def _check(package: Package, path: Path) -> None:
    found = integrity(path)
    if found != package.integrity:
        raise ValueError(f"{path} has integrity {found}, {package.integrity} was expected: delete it and try again.")


def read_members(path: Path, folder: str) -> dict[str, bytes]:
    """Reads the files that lie directly in one folder of a tarball, without unpacking anything to disk.

    Args:
        path: The tarball.
        folder: Folder inside the tarball.

    Returns:
        Contents by file name.
    """
    with tarfile.open(path) as tar:
        return {
            member.name.removeprefix(folder + "/"): tar.extractfile(member).read()
            for member in tar
            if member.isfile() and member.name.rpartition("/")[0] == folder
        }


def read_icons(path: Path, folder: str) -> dict[str, bytes]:
    """Reads an icon set in Iconify's format.

    Args:
        path: The tarball.
        folder: Folder inside the tarball that holds ``icons.json``.

    Returns:
        SVG files by the name of the icon, further names of the same drawing included.
    """
    icons = json.loads(read_members(path, folder)["icons.json"])
    drawn = icons["icons"]
    same = {name: alias["parent"] for name, alias in icons.get("aliases", {}).items() if alias.keys() == {"parent"}}
    files = {}
    for name, parent in {**{name: name for name in drawn}, **same}.items():
        width, height = (drawn[parent].get(side, icons[side]) for side in ("width", "height"))
        attributes = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
        files[name] = f"<svg {attributes}>{drawn[parent]['body']}</svg>".encode()
    return files
