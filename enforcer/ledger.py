"""The ledger: which GPUs were written and what they had before, on disk before the first write.

It knows no NVML and decides nothing.

One JSON file, replaced atomically, the generation before it beside it. An original limit is
fsynced before the GPU's first write. Later changes need not wait for the disk: the page cache
outlives a killed process, and a crash of the machine makes the hardware forget its limits too.
"""

import contextlib
import errno
import fcntl
import os
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from enforcer.policy import Owned
from enforcer.sources import Tenants

_FILE = "ledger.json"
_BEFORE = "ledger.previous.json"
_NEXT = "ledger.next"
# Not in the ledger's own file: an older version would take a field that it lacks for damage.
_BESIDE = "beside.json"
_BESIDE_NEXT = "beside.next"
_NOTES = "notes.json"
_NOTES_NEXT = "notes.next"
_LOCK = "lock"
_VERSION: Literal[1] = 1
_MAX_BYTES = 4 << 20
_FORGOTTEN = (
    "no generation before it is there, so which limits the GPUs had before is forgotten: the limit "
    "that one has now is taken for what it had, and is what it gets back"
)
_NOT_THERE = (errno.ENOENT,)
# Something else lies under the name: a directory, or a link, which is not followed.
_NO_FILE = (errno.EISDIR, errno.ELOOP)
# What does not parse. OSError is here only for a directory or a link.
_DAMAGE = (OSError, ValueError, RecursionError)


class LedgerError(Exception):
    """The ledger cannot be used; the text names the path and the reason."""


class UnreadableError(LedgerError):
    """The ledger may be whole but cannot be read now: it is tried again."""


class _Format(msgspec.Struct, frozen=True):
    version: int


class _Book(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: Literal[1]
    boot_id: str
    gpus: dict[str, Owned]
    crc32: int | None = None  # of all the rest; none where a person wrote it

    def sealed(self) -> "_Book":
        bare = msgspec.structs.replace(self, crc32=None)
        text = msgspec.json.encode(bare, order="sorted")
        return msgspec.structs.replace(self, crc32=zlib.crc32(text))


class Notes(msgspec.Struct, frozen=True):
    """What helps to say what happened, and nothing else depends on: the file may be lost.

    `stood` has for each GPU the limit that was set last and read back. `names` are those of pods.
    """

    stood: dict[str, int] = {}
    names: dict[str, tuple[str, str]] = {}


class Ledger:
    """The entries by GPU UUID, held under a lock so that a node has one owner."""

    def __init__(self, state_dir: Path, boot_id: str) -> None:
        """Open the directory; raises LedgerError."""
        self.path = state_dir / _FILE
        self._boot_id = boot_id
        self.entries: Mapping[str, Owned] = {}
        self.beside: Mapping[str, Tenants] = {}
        # None where there are none: of an older version, or lost.
        self.notes: Notes | None = None
        try:
            state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._dir = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            self._lock = self._open(_LOCK, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            why = f"POWER_AGENT_STATE_DIR='{state_dir}': {error.strerror}"
            raise LedgerError(f"{why}; name a directory on the node's disk to write in") from error

    def _open(self, name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o600, dir_fd=self._dir)

    def _open_to_read(self, name: str, flags: int) -> int:
        return self._open(name, flags | os.O_NONBLOCK)  # a pipe in its place would block for ever

    def try_lock(self) -> bool:
        """Take the lock if no other enforcer holds it."""
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    def close(self) -> None:
        """Let go of the lock."""
        os.close(self._lock)
        os.close(self._dir)

    def load(self) -> list[str]:
        """Read the entries of this boot; return what a person should know.

        A damaged file is moved aside, never used and never deleted; the generation before it is
        adopted if that one reads. Raises UnreadableError where a file may be whole and cannot be
        read now: then nothing is known, so nothing may be done (I5). Raises LedgerError for one
        that this version must not touch.
        """
        said: list[str] = []
        for name in (_FILE, _BEFORE):
            try:
                book = self._read(name)
            except FileNotFoundError:
                continue
            except _DAMAGE as error:
                said.append(self._move_aside(name, error))
                continue
            except UnreadableError as error:
                raise UnreadableError("; ".join([*said, str(error)])) from error
            if name == _BEFORE:
                said.append("the generation before it is adopted")
            if book.boot_id == self._boot_id:
                self.entries = book.gpus
                self.beside = self._beside()
                self.notes = self._notes()
            elif book.gpus:
                said.append(f"of another boot, hardware forgot, dropped: {', '.join(book.gpus)}")
            break
        else:
            said += [_FORGOTTEN] if said else []
        return said

    def _beside(self) -> dict[str, Tenants]:
        """Return who ran beside the pods of each entry, and these pods themselves.

        Where the file cannot be read, all others are strangers, as on a GPU that is new.
        """
        found: dict[str, Tenants] = {}
        with contextlib.suppress(*_DAMAGE), open(_BESIDE, "rb", opener=self._open_to_read) as file:
            found = msgspec.json.decode(file.read(_MAX_BYTES), type=dict[str, Tenants])
        return {
            uuid: found.get(uuid, frozenset()) | owned.pods | owned.aliases
            for uuid, owned in self.entries.items()
        }

    def _notes(self) -> Notes | None:
        with contextlib.suppress(*_DAMAGE), open(_NOTES, "rb", opener=self._open_to_read) as file:
            return msgspec.json.decode(file.read(_MAX_BYTES), type=Notes)
        return None

    def remember(self, beside: Mapping[str, Tenants], notes: Notes) -> None:
        """Keep who runs beside the pods of each GPU, so that a crash makes nobody a stranger (I9).

        It need not wait for the disk, and may fail: what is lost so is known again once the pods
        are seen. So is what is noted.
        """
        if beside != self.beside:
            self.beside = beside
            self._write_over(_BESIDE, _BESIDE_NEXT, msgspec.json.encode(beside))
        if notes != (self.notes or Notes()):
            self._note(notes)

    def begin_notes(self) -> None:
        """Begin the notes before the first entry: from here on, what they do not say is not so."""
        if self.notes is None and not self.entries:
            self._note(Notes())

    def _note(self, notes: Notes) -> None:
        self.notes = notes
        self._write_over(_NOTES, _NOTES_NEXT, msgspec.json.encode(notes))

    def _write_over(self, name: str, first: str, text: bytes) -> None:
        with contextlib.suppress(OSError):
            with open(first, "wb", opener=self._open) as file:
                file.write(text)
            os.rename(first, name, src_dir_fd=self._dir, dst_dir_fd=self._dir)

    def _move_aside(self, name: str, error: Exception) -> str:
        aside = f"{name}.damaged-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
        path = self.path.with_name(name)
        try:
            os.rename(name, aside, src_dir_fd=self._dir, dst_dir_fd=self._dir)
        except OSError as refused:
            why = f"{path} is damaged ({error}) and cannot be moved aside: {refused.strerror}"
            raise UnreadableError(f"{why}; free or repair that disk") from refused
        return f"{path} is damaged, moved to {aside}: {error}"

    def _read(self, name: str) -> _Book:
        try:
            with open(name, "rb", opener=self._open_to_read) as file:
                text = file.read(_MAX_BYTES)
        except OSError as error:
            if error.errno in _NOT_THERE or error.errno in _NO_FILE:
                raise
            why = f"{self.path.with_name(name)} cannot be read: {error.strerror}"
            raise UnreadableError(f"{why}; repair that disk; tried again until then") from error
        version = msgspec.json.decode(text, type=_Format).version
        if version > _VERSION:  # it has original limits that a downgrade must not lose
            why = f"{self.path.with_name(name)} has format {version} of a newer Power Agent"
            remedy = "start that one, or stop it with POWER_AGENT_ON_EXIT=restore first"
            raise LedgerError(f"{why}: {remedy}")
        book = msgspec.json.decode(text, type=_Book)
        if book.crc32 not in (None, book.sealed().crc32):
            raise ValueError("its checksum is not that of its content")
        return book

    def store(self, entries: Mapping[str, Owned]) -> None:
        """Replace the file by `entries`; raises LedgerError and leaves all as it was.

        Waits for the disk where an original limit is new (I2).
        """
        book = _Book(_VERSION, self._boot_id, dict(entries)).sealed()
        text = msgspec.json.format(msgspec.json.encode(book, order="sorted"), indent=1)
        if len(text) >= _MAX_BYTES:  # what could not be read again
            raise LedgerError(f"{self.path} would have {len(text)} bytes, at most {_MAX_BYTES}")
        try:
            self._replace(text + b"\n", durable=not entries.keys() <= self.entries.keys())
        except OSError as error:
            why = f"{self.path} cannot be written: {error.strerror}; free or repair that disk"
            raise LedgerError(why) from error
        self.entries = dict(entries)

    def _replace(self, text: bytes, *, durable: bool) -> None:
        with open(_NEXT, "wb", opener=self._open) as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_BEFORE, dir_fd=self._dir)
        with contextlib.suppress(FileNotFoundError):
            os.link(_FILE, _BEFORE, src_dir_fd=self._dir, dst_dir_fd=self._dir)
        os.rename(_NEXT, _FILE, src_dir_fd=self._dir, dst_dir_fd=self._dir)
        if durable:
            os.fsync(self._dir)
