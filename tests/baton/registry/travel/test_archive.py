"""The archive: other programs read it, and it comes back as it was written."""

import hashlib
import io
import tarfile
from collections.abc import Iterator

import pytest

from baton.errors import UserError
from baton.registry.travel.archive import END, Reader, Writer, header

LONG = f"attestations/{'a' * 64}/{'b' * 64}.json"


def written(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    writer = Writer(stream)
    for path, data in files.items():
        writer.add(path, len(data), iter([data]))
    writer.end()
    assert writer.size == len(stream.getvalue())
    return stream.getvalue()


def test_a_header_by_hand() -> None:
    block = header("bundle.json", 65)
    assert len(block) == 512 and block[:12] == b"bundle.json\0"
    assert block[100:136] == b"0000644\0" + b"0000000\0" * 2 + b"00000000101\0"  # 65 is 101 in octal
    assert block[136:148] == b"00000000000\0" and block[156:157] == b"0" and block[257:265] == b"ustar\x0000"
    assert int(block[148:154], 8) == sum(block[:148]) + 8 * 32 + sum(block[156:])


def test_python_reads_it() -> None:
    files = {"bundle.json": b"{}", LONG: b"x" * 512, "blobs/sha256/c": b"", "d": b"y" * 513}
    with tarfile.open(fileobj=io.BytesIO(written(files)), mode="r:") as tar:
        members = tar.getmembers()
        assert [member.name for member in members] == list(files)
        for member in members:
            content = tar.extractfile(member)
            assert content is not None and content.read() == files[member.name]
            assert member.isreg() and (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
            assert (member.uname, member.gname) == ("", "")


@pytest.mark.parametrize("size", [0, 1, (8 << 30) - 1, 8 << 30, 1 << 50])
def test_sizes_beyond_eight_gibibytes(size: int) -> None:
    assert tarfile.TarInfo.frombuf(header("x", size), "utf-8", "strict").size == size
    assert Reader(io.BytesIO(header("x", size)), "here").first("x", 1 << 60) == size


def test_a_size_below_zero_is_refused_and_nothing_more_is_read() -> None:
    stream = io.BytesIO(header("bundle.json", -1) + b"x" * 5000)
    with pytest.raises(UserError, match="here: the header of bundle.json says -1 bytes"):
        Reader(stream, "here").first("bundle.json", 1 << 20)
    assert stream.tell() == 512


class Trickle(io.RawIOBase):
    """A pipe that gives one to seven bytes at a time."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def read(self, size: int = -1) -> bytes:
        part = self._data[self._at : self._at + min(size, 1 + self._at % 7)]
        self._at += len(part)
        return part


@pytest.mark.parametrize("kind", [io.BytesIO, Trickle])
def test_it_comes_back_as_it_was(kind: type) -> None:
    files = {"bundle.json": b"{}", LONG: b"x" * 512, "d": b"y" * 700}
    data = written(files)
    reader = Reader(kind(data), "here")
    assert b"".join(reader.content("bundle.json", reader.first("bundle.json", 9))) == b"{}"
    for path in (LONG, "d"):
        reader.next(path, len(files[path]))
        assert b"".join(reader.content(path, len(files[path]))) == files[path]
    reader.end()

    assert reader.position == len(data) and reader.sha256 == hashlib.sha256(data).hexdigest()


def test_an_endless_stream_is_left_after_one_byte() -> None:
    class Endless(io.RawIOBase):
        taken = 0

        def read(self, size: int = -1) -> bytes:
            start, self.taken = self.taken, self.taken + size
            return (data[start : start + size]).ljust(size, b"\0")

    data = written({"d": b"y"})
    stream = Endless()
    reader = Reader(stream, "here")
    assert list(reader.content("d", reader.first("d", 9))) == [b"y"]
    with pytest.raises(UserError, match="goes on after its end"):
        reader.end()
    assert stream.taken == len(data) + 1


def test_a_stream_that_fails_is_a_mistake_that_can_be_mended() -> None:
    class Broken(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(UserError, match="here cannot be read: .*Input/output"):
        Reader(Broken(), "here").first("d", 9)


def test_a_writer_holds_to_the_size_it_announced() -> None:
    def content() -> Iterator[bytes]:
        yield b"123"

    with pytest.raises(AssertionError):
        Writer(io.BytesIO()).add("x", 4, content())
    assert written({}) == END
