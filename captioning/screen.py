"""The screen: what is printed, made safe for terminals, for consoles of few characters and for readers that leave."""

import contextlib
import os
import re
import sys

UNSAFE = r"\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069"  # what a terminal takes for commands


def printable(text):
    """:return: the text of a name or a caption as part of one line, without what a terminal would take for commands"""
    text = re.sub("[\ud800-\udfff]", "\ufffd", str(text))  # bytes of a file's name that are not text
    return re.sub(rf"[{UNSAFE}\n\r\t]", "?", text)


@contextlib.contextmanager
def safe_screen():
    """Within this block, whatever is printed can neither command the terminal nor end the script."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed (`2>&-`): without this, the next file to be opened would take its place
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115  stays open until the script ends
    screens = Screen(sys.stdout), Screen(sys.stderr)
    with contextlib.redirect_stdout(screens[0]), contextlib.redirect_stderr(screens[1]):
        try:
            yield
        finally:
            for screen in screens:
                screen.flush()
    fault = screens[0].fault
    if fault and not isinstance(fault, BrokenPipeError):
        print(f"error: what the script printed could not be written ({fault}); its files are complete", file=sys.stderr)
        sys.exit(2)


class Screen:
    """
    The output or the error stream, made safe: of a hostile name a terminal gets no commands, characters that the
    console does not have are replaced, and when the reader has gone (`| head`), the script continues unheard.
    """

    def __init__(self, stream):
        """:param stream: sys.stdout or sys.stderr"""
        if hasattr(stream, "reconfigure"):  # a notebook's has no encoding to fail
            stream.reconfigure(errors="replace")
        self.stream = stream
        self.fault = None  # the OSError after which nothing more was printed

    def write(self, text):
        """Print, unless nobody can read it."""
        self.attempt(lambda: self.stream.write(re.sub(f"[{UNSAFE}]", "?", text)))
        return len(text)

    def flush(self):
        """Print what still waits, unless nobody can read it."""
        self.attempt(self.stream.flush)

    def attempt(self, action):
        if self.fault:
            return
        try:
            action()
        except OSError as error:
            self.fault = error
            with contextlib.suppress(OSError):  # Python flushes once more when it ends: let that succeed
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)
