"""Locks between processes, and files under way, so that two runs never write the same thing and a killed one leaves
nothing that is in the way.

The system holds a lock as long as the process lives. Where it cannot, as on some network folders, nothing is locked:
runs go on and clean up less.
"""

import contextlib
import errno
import logging
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from ..errors import ConfigError, shown

log = logging.getLogger(__name__)

TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
"""What the system says of a lock that another one has."""
FAR_OFFSET = 1 << 40
"""The byte that is locked on Windows, where locked bytes cannot be written by anybody else."""
LONGEST_STEM_BYTES = 80
"""Of a file's name in the name of the one under way."""


class FileLock:
    """A file that one process at a time can have. Nothing is opened until `acquire`."""

    def __init__(self, path: Path):
        self.path = path
        self.is_sure = False
        """Whether the file system could lock it."""
        self._handle: int | None = None

    def acquire(self, creates: bool = True) -> bool:
        """Take it -> whether nobody else has it. A file system without locks gives it to everybody.

        Raises:
            OSError: if the file cannot be opened.
        """
        while True:
            handle = os.open(self.path, os.O_RDWR | (os.O_CREAT if creates else 0), 0o666)
            try:
                lock_handle(handle)
                self.is_sure = True
            except OSError as error:
                if error.errno in TAKEN:
                    os.close(handle)
                    return False
                self.is_sure = False
                log.info("%s cannot be locked (%s)", self.path, error.strerror)
            if is_at(handle, self.path):
                self._handle = handle
                return True
            os.close(handle)  # who had it took the file away meanwhile

    def release(self, removes: bool = True) -> None:
        """Give it back; `removes` the file too. Does nothing where it is not held."""
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        if removes and os.name != "nt" and is_at(handle, self.path):
            with contextlib.suppress(OSError):
                self.path.unlink()
        os.close(handle)
        if removes and os.name == "nt":  # open files cannot be deleted there, those of others neither
            with contextlib.suppress(OSError):
                self.path.unlink()


def lock_handle(handle: int) -> None:
    """Lock an open file for this handle alone, without waiting.

    Raises:
        OSError: if another one has it, or the file system has no locks.
    """
    try:
        import fcntl
    except ImportError:
        import msvcrt

        os.lseek(handle, FAR_OFFSET, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        return
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_at(handle: int, path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def lock_of(folder: Path) -> FileLock:
    """The lock of a folder. It lies beside it, so that the folder can be renamed and removed."""
    return FileLock(folder.with_name(f".{folder.name}.lock"))


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Within, no other run works in `folder`, which need not be there.

    Raises:
        ConfigError: at once, if one does, or no file can be made beside it.
    """
    lock = lock_of(folder)
    try:
        is_ours = lock.acquire()
    except OSError as error:
        raise ConfigError(
            f"{shown(folder)} cannot be used: {error.strerror}. Save elsewhere, or under another name."
        ) from error
    if not is_ours:
        raise ConfigError(
            f"another run is at work in {shown(folder)} just now. Wait until it ends, or save under another name."
        )
    try:
        yield
    finally:
        lock.release()


class PartialFile:
    """A file under way beside the one it will be, locked as long as it is written. What killed runs left of the same
    name is removed.

    Raises:
        OSError: if it cannot be made.
    """

    def __init__(self, target: Path):
        self.target = target
        stem = short_stem(target)
        sweep(target.parent, re.escape(stem))
        self._lock = FileLock(target.with_name(f".{stem}.{secrets.token_hex(4)}.part"))
        while not self._lock.acquire():  # another run sweeps just now
            pass
        self.path = self._lock.path

    def publish(self, replaces: bool = True) -> None:
        """Give it its name; what has that name is replaced.

        Raises:
            FileExistsError: without `replaces`, if there is something of that name.
            OSError: if it cannot be renamed.
        """
        if os.name == "nt":
            self._lock.release(removes=False)  # open files cannot be renamed there
        if replaces:
            os.replace(self.path, self.target)
        else:
            self._take_name()
        self._lock.release(removes=False)

    def _take_name(self) -> None:
        """As `os.replace`, but for a name that is taken. A file that stands there for it is never half of one."""
        try:
            os.link(self.path, self.target)
        except FileExistsError:
            raise
        except OSError:  # no links there
            self.target.touch(exist_ok=False)
            os.replace(self.path, self.target)
        else:
            self.path.unlink()

    def discard(self) -> None:
        """Remove it, where it has not got its name."""
        self._lock.release(removes=False)
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def written(target: Path) -> Iterator[Path]:
    """Where to write a file, which gets its name when it is whole. After an exception nothing is left.

    Raises:
        OSError: if it cannot be made or renamed.
    """
    partial = PartialFile(target)
    try:
        yield partial.path
        partial.publish()
    finally:
        partial.discard()


def short_stem(target: Path) -> str:
    """What the name of a file under way says of the one it will be."""
    return os.fsencode(target.stem)[-LONGEST_STEM_BYTES:].decode("utf-8", "ignore")


def sweep(folder: Path, stems: str = ".*") -> list[str]:
    """Remove files under way that nobody writes any more -> the stems that they would have got.

    Args:
        stems: a pattern of those.
    """
    wanted, removed = re.compile(rf"\.({stems})\.[0-9a-f]{{8}}\.part"), []
    try:
        found = [match for name in os.listdir(folder) if (match := wanted.fullmatch(name))]
    except OSError:
        return []
    for match in found:
        lock = FileLock(folder / match[0])
        with contextlib.suppress(OSError):
            if stat.S_ISREG(lock.path.lstat().st_mode) and lock.acquire(creates=False):
                lock.release(removes=lock.is_sure)
                removed += [match[1]] if lock.is_sure else []
    return removed
