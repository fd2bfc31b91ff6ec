"""How many files this process may have open at once: workers that read for it take several each."""

from utils import UserError

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None

OWN = 64  # files that a script has open besides


def allow_open_files(workers, each):
    """
    Have the system allow what workers need; without it they die or wait for ever in the middle of the work.

    :param workers: number of processes
    :param each: files that one of them takes: its pipes, and what it hands over through memory
    :raises UserError: if the system does not allow it
    """
    if resource is None or not workers:
        return
    needed, (soft, hard) = OWN + each * workers, resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (ValueError, OSError):
        raise UserError(
            f"workers: {workers} need up to {needed} open files, but the limit is {hard}; raise it (ulimit -n), or "
            "take fewer --workers (0 needs none)"
        ) from None
