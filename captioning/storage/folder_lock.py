"""A folder that one process at a time may write to."""

import contextlib
import errno
import os

from utils import UserError

try:
    import fcntl
except ImportError:  # Windows: there two processes at once are not noticed
    fcntl = None


@contextlib.contextmanager
def sole_writer(folder, field):
    """
    Within this block, no other process that asks the same may write to the folder. Nothing is left behind, however the
    process ends.

    :param folder: Path of an existing folder
    :param field: the setting that named it, for the message
    :raises UserError: if another process writes there
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            os.close(descriptor)
            raise UserError(
                f"{field}: another run is writing to {folder}; wait until it has ended, or give another folder"
            ) from None
        # else the file system knows no locks, as some network drives
    try:
        yield
    finally:
        os.close(descriptor)
