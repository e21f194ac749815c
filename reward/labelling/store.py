"""The file of judgements: one process writes it, every line is on the disk before it counts, and nothing is lost.

A judgement is appended in one write and flushed before anybody is told that it was taken. Undoing one writes the file
anew without it and renames it into place. So the file is, after a kill at any moment, that of before or that of after;
the one thing that a crash can leave is the beginning of a last line, which is set aside when the file is next opened.
"""

import fcntl
import json
import os
import threading
from pathlib import Path
from typing import NamedTuple

from baton.errors import UserError
from reward.labelling.judgements import Judgement, NoJudgement, read_line
from reward.labelling.names import annotator_key

_UNKNOWN = "The disk failed, and what it holds is not known. Start `baton label` again."


class StoreError(Exception):
    """A judgement could not be stored; the message is for the page, and the file is as it was."""


class _Entry(NamedTuple):
    judgement: Judgement
    start: int  # bytes into the file
    end: int


class Store:
    """The judgements of one file, which this process alone may change."""

    def __init__(self, path: Path) -> None:
        """Lock the file, and read it; it is made if it is not there.

        `notes` afterwards says what was found amiss and mended. Raises UserError if another process has it, if it
        cannot be written, or if it holds anything but judgements.
        """
        self.path = path.resolve()  # through a link: renaming onto the link would replace it
        self.notes: list[str] = []
        self.revision = 0  # another one whenever a judgement came or went
        self._entries: list[_Entry] = []
        self._by_annotator: dict[str, dict[str, _Entry]] = {}  # by annotator_key, then by pair, oldest first
        self._guard = threading.Lock()
        self._file = -1
        self._size = 0
        self._broken: str | None = None
        try:
            self._lock = self._take_lock()
            try:
                self._open()
            except BaseException:
                self.close()
                raise
        except OSError as error:
            raise UserError(f"judgements cannot be written to {self.path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Let another process have the file."""
        for descriptor in (self._file, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._lock = -1

    def announce(self, address: str) -> None:
        """Leave the page's address for whoever finds the file locked."""
        content = json.dumps({"process": os.getpid(), "address": address}).encode()
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, content, 0)

    def judgements(self) -> list[Judgement]:
        """All that stand, in the order in which they were made."""
        with self._guard:
            return [entry.judgement for entry in self._entries]

    def of(self, annotator: str) -> list[Judgement]:
        """Those of one annotator, oldest first."""
        with self._guard:
            return [entry.judgement for entry in self._mine(annotator).values()]

    def spelling(self, annotator: str) -> str:
        """The name as it is written in the file: Ann and ann are one person."""
        found = self.of(annotator)
        return found[0].annotator if found else annotator

    def add(self, line: bytes) -> bool:
        """Append a judgement and flush it to the disk; False if its annotator judged the pair before.

        A browser that got no answer sends the same again: then the first one stands. Raises StoreError.
        """
        judgement = read_line(line)
        assert line.endswith(b"\n") and line.count(b"\n") == 1
        with self._guard:
            if judgement.pair in self._mine(judgement.annotator):
                return False
            self._check()
            start = self._size
            try:
                _write_all(self._file, line)
                os.fsync(self._file)
            except OSError as error:
                self._take_back(start, error)
            self._size = start + len(line)
            self._keep(_Entry(judgement, start, self._size))
            return True

    def undo(self, annotator: str, judgement_id: str) -> bool:
        """Take the annotator's last judgement out of the file, if it is the named one. Raises StoreError.

        The name makes it safe to ask twice: an answer that was lost must not undo one judgement more.
        """
        with self._guard:
            gone = next(reversed(self._mine(annotator).values()), None)
            if gone is None or gone.judgement.id != judgement_id:
                return False
            self._check()
            try:
                self._rewrite_without(gone)
            except OSError as error:
                raise StoreError(f"The judgement could not be undone: {error.strerror}. It still stands.") from error
            try:
                _flush_folder(self.path.parent)
            except OSError:
                self._broken = _UNKNOWN
            return True

    def _take_lock(self) -> int:
        path = self.path.with_name(f".{self.path.name}.lock")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 4096)
            os.close(descriptor)
            raise UserError(
                f"{self.path} is being written by another `baton label`{_described(holder)}. Several people can judge "
                "on its page at once; to work apart from it, name another --out"
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    def _open(self) -> None:
        is_new = not self.path.exists()
        self._aside().unlink(missing_ok=True)  # of an undo that was cut off
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if is_new:
            _flush_folder(self.path.parent)
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if data[whole:]:
            data = self._mend(data, whole)
        start = 0
        for number, line in enumerate(data.split(b"\n")[:-1], 1):
            if line.strip():
                self._remember(line + b"\n", number, start)
            start += len(line) + 1
        self._size = start

    def _remember(self, line: bytes, number: int, start: int) -> None:
        try:
            judgement = read_line(line)
        except NoJudgement as fault:
            raise UserError(
                f"{self.path} line {number} {fault}; expected a judgement of `baton label`. Mend that line, or name "
                "another --out"
            ) from None
        if (earlier := self._mine(judgement.annotator).pop(judgement.pair, None)) is not None:
            self._entries.remove(earlier)
            self.notes.append(
                f"{self.path} line {number}: {judgement.annotator} judged the pair {judgement.pair} before, and here "
                "again; the last judgement counts, here as in training, and both are in the file"
            )
        self._keep(_Entry(judgement, start, start + len(line)))

    def _mine(self, annotator: str) -> dict[str, _Entry]:
        return self._by_annotator.get(annotator_key(annotator), {})

    def _keep(self, entry: _Entry) -> None:
        self._entries.append(entry)
        mine = self._by_annotator.setdefault(annotator_key(entry.judgement.annotator), {})
        mine[entry.judgement.pair] = entry
        self.revision += 1

    def _mend(self, data: bytes, whole: int) -> bytes:
        """Settle a last line without its end: a whole judgement gets it, the beginning of one is set aside."""
        tail = data[whole:]
        try:
            read_line(tail)
        except NoJudgement:
            aside = self.path.with_name(f"{self.path.name}.cut-off")
            with aside.open("ab") as out:
                out.write(tail + b"\n")
                out.flush()
                os.fsync(out.fileno())
            _flush_folder(aside.parent)
            os.ftruncate(self._file, whole)
            os.fsync(self._file)
            self.notes.append(
                f"the last line of {self.path} was cut off by a crash ({len(tail)} bytes): it was never counted as "
                f"stored, and is set aside in {aside.name}. Its pair is asked again"
            )
            return data[:whole]
        _write_all(self._file, b"\n")
        os.fsync(self._file)
        return data + b"\n"

    def _check(self) -> None:
        """Raises StoreError unless the file is as this process left it: what is appended elsewhere would be lost."""
        if self._broken:
            raise StoreError(self._broken)
        try:
            there, ours = os.stat(self.path), os.fstat(self._file)
        except OSError as error:
            raise StoreError(
                f"{self.path.name} cannot be found any more ({error.strerror}). Start `baton label` again."
            ) from error
        if (there.st_dev, there.st_ino, there.st_size) != (ours.st_dev, ours.st_ino, self._size):
            raise StoreError(f"{self.path.name} was changed by another program. Start `baton label` again.")

    def _take_back(self, start: int, error: OSError) -> None:
        """After a failed append: leave no part of the line behind."""
        try:
            os.ftruncate(self._file, start)
            os.fsync(self._file)
        except OSError:
            self._broken = _UNKNOWN
        raise StoreError(
            f"The judgement could not be stored: {error.strerror}. What was judged before is safe."
        ) from error

    def _rewrite_without(self, gone: _Entry) -> None:
        data = self.path.read_bytes()
        aside = self._aside()
        new = os.open(aside, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            os.fchmod(new, os.fstat(self._file).st_mode & 0o777)
            _write_all(new, data[: gone.start] + data[gone.end :])
            os.fsync(new)
            os.replace(aside, self.path)
        except OSError:
            os.close(new)
            raise
        os.close(self._file)
        self._file = new
        length = gone.end - gone.start
        self._size -= length
        kept = [entry for entry in self._entries if entry is not gone]
        self._entries, self._by_annotator = [], {}
        for each in kept:
            moved = each if each.start < gone.start else each._replace(start=each.start - length, end=each.end - length)
            self._keep(moved)

    def _aside(self) -> Path:
        return self.path.with_name(f".{self.path.name}.partial")


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _described(holder: bytes) -> str:
    try:
        found = json.loads(holder)
        return f" (process {int(found['process'])}, at {found['address']})"
    except (ValueError, LookupError, TypeError):
        return ""
