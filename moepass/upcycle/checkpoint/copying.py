"""Bytes from file to file, by the kernel where it can."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

#: Between two chunks a worker looks whether it should stop.
CHUNK = 64 << 20
_BUFFER = 8 << 20
_CANNOT = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.EIO}


class SourceEnded(Exception):
    """The source has fewer bytes than its header said."""


def copy_range(source: int, begin: int, target: int, offset: int, count: int, pause: Callable[[], None]) -> None:
    """Copy ``count`` bytes between two descriptors; file positions stay.  ``pause`` runs between chunks; it may raise.

    ``copy_file_range`` first (no bytes through this process; shared blocks where the file system can), then a buffered
    copy for what is left.  Raises OSError and ``SourceEnded``.
    """
    done = _by_kernel(source, begin, target, offset, count, pause)
    if done < count:
        _buffered(source, begin + done, target, offset + done, count - done, pause)


def write_all(target: int, data: memoryview | bytes, offset: int) -> None:
    """``pwrite`` until everything is written."""
    view = memoryview(data).cast("B")
    while view.nbytes:
        written = os.pwrite(target, view[:CHUNK], offset)
        view, offset = view[written:], offset + written


def _by_kernel(source: int, begin: int, target: int, offset: int, count: int, pause: Callable[[], None]) -> int:
    done = 0
    while done < count:
        pause()
        try:
            n = os.copy_file_range(source, target, min(CHUNK, count - done), begin + done, offset + done)
        except AttributeError:  # not on this system
            return done
        except OSError as e:
            if e.errno in _CANNOT:
                return done
            raise
        if n == 0:  # the end of the file, or a file system that cannot say more
            return done
        done += n
    return done


def _buffered(source: int, begin: int, target: int, offset: int, count: int, pause: Callable[[], None]) -> None:
    buffer = memoryview(bytearray(min(_BUFFER, count)))
    done = 0
    while done < count:
        pause()
        n = os.preadv(source, [buffer[: count - done]], begin + done)
        if n == 0:
            raise SourceEnded
        write_all(target, buffer[:n], offset + done)
        done += n
