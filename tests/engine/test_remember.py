"""The file of remembered prefixes: what was written is read, for the same model only, and nothing else ever is."""

from __future__ import annotations

import json
import os
import random
import stat
from pathlib import Path

import pytest
from xxhash import xxh3_128_hexdigest

from engine import remember
from engine.remember import Remembered, Unusable, read, write
from engine.tenants import namespace_key
from prefixcache.tokens import pack

PREFIXES = [
    Remembered(namespace_key("anonymous", ""), pack([1, 2, 3, 260]), 1_790_000_000.0),
    Remembered(namespace_key("team: 5", "é\n"), pack(range(200)), 1_790_000_050.0),
]
VOCAB = 261


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "remembered"


def test_what_was_written_is_read(file: Path) -> None:
    """In order, with any names of tenants and namespaces."""
    assert write(file, PREFIXES, "model") == 2
    assert read(file, "model", VOCAB) == PREFIXES


def test_there_may_be_no_file_yet(file: Path) -> None:
    """The first start remembers nothing."""
    assert read(file, "model", VOCAB) == []


def test_only_the_owner_may_read_it(file: Path) -> None:
    """It holds prompts; also when it replaces a file that others could read, whatever the umask says."""
    file.write_text("")
    file.chmod(0o644)
    before = os.umask(0)
    try:
        write(file, PREFIXES, "model")
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_it_is_replaced_as_a_whole_or_not_at_all(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If writing fails half way, the old file is there and nothing else; what a killed server left is no hindrance."""
    write(file, PREFIXES, "model")

    def fail(descriptor: int) -> None:
        raise OSError(28, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="no space"):
            write(file, PREFIXES[:1], "model")
    assert read(file, "model", VOCAB) == PREFIXES
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    file.with_name(file.name + ".new").write_text("half of o")
    write(file, PREFIXES[:1], "model")
    assert read(file, "model", VOCAB) == PREFIXES[:1]


def test_a_link_is_not_written_through(file: Path, tmp_path: Path) -> None:
    """Nobody can make the server overwrite another file by putting a link where the new one is written."""
    other = tmp_path / "other"
    other.write_text("precious")
    file.with_name(file.name + ".new").symlink_to(other)
    write(file, PREFIXES, "model")
    assert other.read_text() == "precious"


def test_another_model_is_not_warmed_with_it(file: Path) -> None:
    """Its token ids would mean something else."""
    write(file, PREFIXES, "model")
    with pytest.raises(Unusable, match="another model"):
        read(file, "other", VOCAB)


def _with_checksum(lines: list[object]) -> bytes:
    body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    head = {"format": remember.FORMAT, "version": 1, "fingerprint": "model", "checksum": xxh3_128_hexdigest(body)}
    return json.dumps(head).encode() + b"\n" + body


ENTRY = {"namespace": "9:anonymous,0:", "used": 5, "tokens": [1, 2, 3]}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no file of remembered prefixes"),
        (b"\x00\xff\xfe" * 100, "no file of remembered prefixes"),
        (b"[" * 100_000, "no file of remembered prefixes"),
        (b'{"format": "something else"}\n', "no file of remembered prefixes"),
        (json.dumps({"format": remember.FORMAT, "version": 2}).encode(), "version 2"),
        (_with_checksum([ENTRY])[:-2], "damaged"),
        (_with_checksum([ENTRY]) + b" ", "damaged"),
        (_with_checksum([5]), "damaged"),
        (_with_checksum([{"namespace": "9:anonymous,0:"}]), "damaged"),
        (_with_checksum([ENTRY | {"tokens": []}]), "damaged"),
        (_with_checksum([ENTRY | {"tokens": [1, True]}]), "damaged"),
        (_with_checksum([ENTRY | {"tokens": [1, -1]}]), "damaged"),
        (_with_checksum([ENTRY | {"tokens": [VOCAB]}]), "damaged"),
        (_with_checksum([ENTRY | {"tokens": "abc"}]), "damaged"),
        (_with_checksum([ENTRY | {"namespace": 5}]), "damaged"),
        (_with_checksum([ENTRY | {"namespace": "anonymous"}]), "damaged"),
        (_with_checksum([ENTRY | {"used": "yesterday"}]), "damaged"),
    ],
)
def test_a_file_that_is_no_good_is_not_used(file: Path, data: bytes, reason: str) -> None:
    """Whatever is in it, the server is told why, and no token of it is computed."""
    file.write_bytes(data)
    with pytest.raises(Unusable, match=reason):
        read(file, "model", VOCAB)


@pytest.mark.parametrize("seed", range(20))
def test_any_change_is_noticed(file: Path, seed: int) -> None:
    """A flipped bit or a lost end, wherever it is, costs the file and nothing else."""
    write(file, PREFIXES, "model")
    data = bytearray(file.read_bytes())
    rng = random.Random(seed)
    place = rng.randrange(len(data))
    if rng.random() < 0.5:
        data[place] ^= 1 << rng.randrange(8)
    else:
        del data[place:]
    file.write_bytes(data)
    with pytest.raises(Unusable):
        read(file, "model", VOCAB)


def test_a_file_that_cannot_be_read_is_not_used(file: Path) -> None:
    """Such as a directory."""
    file.mkdir()
    with pytest.raises(Unusable, match="cannot be read"):
        read(file, "model", VOCAB)


def test_its_size_is_bounded(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most valuable are written as far as there is room, and a larger file is not even read."""
    monkeypatch.setattr(remember, "MAX_BYTES", 3000)
    prefixes = [Remembered(namespace_key("anonymous", ""), pack([i] * 100), 5.0) for i in range(100)]
    written = write(file, prefixes, "model")
    assert 0 < written < 100
    assert file.stat().st_size <= 3000
    assert read(file, "model", VOCAB) == prefixes[:written]
    file.write_bytes(b" " * 3001)
    with pytest.raises(Unusable, match="longer than 3,000 bytes"):
        read(file, "model", VOCAB)
