"""Fetches a source archive as pip would and unpacks only the peer's tests from it.

`fetch.py NAME VERSION SHA256 INTO PREFIX...` runs in an environment that has pip, and asks pip's own finder,
so that index, certificates, proxies and links are those that pip is configured with. `pip download` would do
the same and then build the archive's metadata, for which it installs what a peer is built with, gigabytes of
it. Nothing from the archive is run here; a file is unpacked if its path below the archive's first folder
begins with a PREFIX.
"""

from __future__ import annotations

import hashlib
import io
import sys
import tarfile
from pathlib import Path

from pip._internal.commands import create_command
from pip._vendor.packaging.specifiers import SpecifierSet


def archive(name: str, version: str) -> bytes:
    """The source archive of this version, from wherever pip looks."""
    command = create_command("download")
    options, _ = command.parse_args([name, "--no-binary", name])
    with command.main_context():
        session = command.get_default_session(options)
        finder = command._build_package_finder(options, session)
        found = finder.find_best_candidate(name, SpecifierSet(f"=={version}")).best_candidate
        assert found, f"pip finds no source archive of {name} {version}"
        if found.link.is_file:
            return Path(found.link.file_path).read_bytes()
        response = session.get(found.link.url_without_fragment, headers={"Accept-Encoding": "identity"})
        response.raise_for_status()
        return response.content


def unpack(content: bytes, into: Path, prefixes: list[str]) -> None:
    """Writes the regular files below `prefixes`, without the archive's first folder."""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as files:
        for member in files:
            path = member.name.partition("/")[2]
            if not member.isfile() or not path.startswith(tuple(prefixes)):
                continue
            assert ".." not in Path(path).parts and not Path(path).is_absolute(), path
            target = into / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(files.extractfile(member).read())


def main(name: str, version: str, sha256: str, into: str, *prefixes: str) -> None:
    content = archive(name, version)
    digest = hashlib.sha256(content).hexdigest()
    assert digest == sha256, f"{name} {version} has sha256 {digest}, not {sha256}"
    unpack(content, Path(into), list(prefixes))


if __name__ == "__main__":
    main(*sys.argv[1:])
