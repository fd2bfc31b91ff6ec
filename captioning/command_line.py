"""
The command line: a script's Config becomes its options and its help; and what happens when the user, the machine or a
signal ends the script.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import os
import re
import shlex
import signal
import sys
import threading
from typing import get_args

from pydantic import TypeAdapter

from captioning.config_fields import check_fields, describe_values, missing_field, read_options
from captioning.screen import printable, safe_screen
from utils import Stopped, UserError, is_out_of_memory

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TOO_MANY_OPEN = (errno.EMFILE, errno.ENFILE)


def run_script(main, config_class, args=None, find_base=None):
    """
    Read a script's config from the command line and run its `main(config)`.

    :param main: function of one argument, an instance of `config_class`
    :param config_class: as for `parse_args`
    :param args: list of command line words, default the process's own
    :param find_base: as for `parse_args`
    Exits with 2 and one line on the error stream after a UserError or when a path cannot be used, with 130 after
    Ctrl-C, with 143 after SIGTERM; any other exception keeps its traceback.
    """

    def stop(number, _):  # an exception, as Ctrl-C is: temporary files and workers are cleaned up
        raise Stopped(number)

    def excepthook(args):  # TensorBoard writes in a thread, and the same error is raised in ours too
        if getattr(args.exc_value, "errno", None) not in FULL_DISK:
            threading.__excepthook__(args)

    if signal.getsignal(signal.SIGINT) is exit_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.signal(signal.SIGTERM, stop)
    threading.excepthook = excepthook
    try:
        with safe_screen():
            config = parse_or_exit(config_class, args, find_base)
            with errors_as_lines(config):
                main(config)
    except KeyboardInterrupt as reason:
        with safe_screen():
            print(printable(str(reason) or "stopped"), file=sys.stderr)
        sys.exit(128 + getattr(reason, "number", signal.SIGINT))
    finally:
        signal.signal(signal.SIGTERM, before)
        threading.excepthook = threading.__excepthook__


@contextlib.contextmanager
def errors_as_lines(config):
    """Within this block, an error that the user can cause ends the script with one line and exit code 2."""
    try:
        yield
    except UserError as error:
        exit_with(error)
    except OSError as error:
        if error.errno in FULL_DISK:
            exit_with(f"{error}; make room on the disk and run it again")
        if error.errno in TOO_MANY_OPEN:
            exit_with(f"{error}; raise the limit (ulimit -n), or take fewer --workers")
        if error.filename is None:
            raise
        reason = error.strerror or error
        exit_with(f"{os.fsdecode(error.filename)}: {reason}; give a path that you may read or write")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        needed = re.search(r"llocate [\d.,]+ \w+", str(error))
        size = f" (it could not a{needed[0]})" if needed else ""
        exit_with(f"memory: it is full{size}; end other programs, or take smaller batches, a narrower beam or model")
    except AttributeError as error:  # a field was deleted or misspelt at the top of the script
        if error.obj is not config:
            raise
        exit_with(missing_field(type(config), error.name))


def exit_with(error):
    """Print one line and end the script with exit code 2."""
    print(f"error: {one_line(error)}", file=sys.stderr)
    sys.exit(2)


def one_line(error):
    """:return: a UserError's text, without what a terminal would take for commands: it may quote a hostile file"""
    _, _, after_traceback = str(error).strip().partition("\nutils.UserError: ")  # of a DataLoader's worker
    return printable(after_traceback or str(error).strip())


def check_command_line(config_class):
    """
    Answer `--help` and wrong options at once, at the top of a script, before its imports take seconds; and let Ctrl-C
    end the script in the midst of them.

    :param config_class: as for `parse_args`
    """
    with safe_screen():
        parse_or_exit(config_class)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a script in the background may ignore it
        signal.signal(signal.SIGINT, exit_at_once)


def exit_at_once(number, _):
    """End a script that has not begun to work: there is nothing to clean up, and a traceback would tell of imports."""
    with contextlib.suppress(OSError):  # the error stream may be closed
        os.write(2, b"stopped\n")
    os._exit(128 + number)


def parse_or_exit(config_class, args=None, find_base=None):
    """:return: the config of `parse_args`; a wrong option ends the script with one line"""
    try:
        return parse_args(config_class, args, find_base)
    except UserError as error:
        # torchrun's other processes read the same words.
        if "WORLD_SIZE" in os.environ and os.environ.get("RANK", "0") != "0":
            sys.exit(2)
        exit_with(error)


def parse_args(config_class, args=None, find_base=None):
    """
    Build a config from the command line: `--name value` for each of its fields.

    The help shows each field's type, default and comment, in the groups that the comment lines between them make.
    Words before the first option belong to the first field, if it takes several.
    :param config_class: a script's dataclass; or a union of several, each of which is a command (`blip.py eval ...`)
    :param args: list of words, default the process's own
    :param find_base: function of the config that gives another, whose fields hold where no option is given; or None
    :return: an instance of the dataclass
    :raises UserError: if an option is unknown or missing, or its value is not one that its type allows
    """
    commands = {cls.__name__.lower(): cls for cls in get_args(config_class)}
    first_class = next(iter(commands.values()), config_class)
    parser = CommandLine(
        usage=f"%(prog)s {'command ' if commands else ''}[--name value ...]",
        description=sys.modules[first_class.__module__].__doc__,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    if commands:
        subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    else:
        add_options(parser, config_class)
    for name, cls in commands.items():
        command = subparsers.add_parser(
            name,
            help=cls.__doc__,
            description=cls.__doc__,
            usage="%(prog)s [--name value ...]",
            allow_abbrev=False,
            formatter_class=HelpFormatter,
        )
        add_options(command, cls)

    classes = commands.values() if commands else [config_class]
    switches = {option.name for cls in classes for option in read_options(cls) if option.type is bool}
    given, rest = parser.parse_known_args(spell_out(sys.argv[1:] if args is None else args, switches))
    given = vars(given)
    if commands:
        config_class = commands[given.pop("command")]
    options = {option.name: option for option in read_options(config_class)}
    take_words(rest, given, options)
    for name, option in options.items():
        if name in given:
            given[name] = option.read(given[name])
        elif option.default is dataclasses.MISSING:
            raise UserError(f"{name}: not given; add --{name} and {option.describe()}")
    config = config_class(**given)
    base = find_base(config) if find_base else None
    if base is not None:
        config = dataclasses.replace(base, **given)
    check_fields(config)
    return config


class CommandLine(argparse.ArgumentParser):
    """argparse's parser, but a wrong word is a UserError."""

    def error(self, message):
        raise UserError(f"{message}; `python {self.prog} --help` lists all options")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help whose first column is wide enough for most options."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=32)


def add_options(parser, config_class):
    """Add an option for each field of a dataclass, in the groups of its comment lines."""
    groups = {"": parser}
    for option in read_options(config_class):
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        schema = TypeAdapter(option.type).json_schema()
        kind = next(part for part in schema.get("anyOf", [schema]) if part.get("type") != "null")
        several = kind.get("type") == "array"
        kind = kind["items"] if several else kind
        names = {"boolean": "[True|False]", "integer": "INT", "number": "FLOAT", "string": "TEXT"}
        metavar = "{" + ",".join(kind["enum"]) + "}" if "enum" in kind else names[kind["type"]]
        notes = []
        if kind.get("type") in ("integer", "number") and len(kind) > 1:
            notes.append(describe_values(kind).removeprefix("a whole number ").removeprefix("a number "))
        if option.default is dataclasses.MISSING:
            notes.append("required")
        elif option.default not in (None, ()):
            notes.append(f"default {option.default}")
        groups[option.group].add_argument(
            f"--{option.name}", metavar=metavar, nargs="+" if several else None, default=argparse.SUPPRESS,
            help=f"{option.comment} ({', '.join(notes)})".replace("%", "%%").removesuffix(" ()"),
        )  # fmt: skip


def spell_out(args, switches):
    """
    :param args: list of words of a command line
    :param switches: names of the options that are True or False
    :return: the words, with `--gate` as `--gate=True`, `--no_gate` as `--gate=False`, `--batch-size` as `--batch_size`
    """
    words = []
    for word in args:
        name, equals, value = word.partition("=")
        if re.fullmatch(r"--[\w-]+", name):
            name = "--" + name[2:].replace("-", "_")
            word = name + equals + value
        if not equals and name[2:] in switches:
            word = f"{name}=True"
        elif not equals and name.startswith("--no_") and name[5:] in switches:
            word = f"--{name[5:]}=False"
        elif words and word.lower() in ("true", "false") and words[-1].removesuffix("=True")[2:] in switches:
            word = words.pop().removesuffix("True") + word
        words.append(word)
    return words


def take_words(rest, given, options):
    """
    Find a place for the words that belong to no option, or say what is wrong with them.

    :param rest: list of words
    :param given: dict of each option that was given
    :param options: dict of `Option`s by name
    :raises UserError: if an option is unknown, or words have no place
    """
    unknown = next((word for word in rest if word.startswith("-")), None)
    if unknown:
        name = unknown.lstrip("-").partition("=")[0]
        similar = difflib.get_close_matches(name.replace("-", "_"), options)
        meant = f"did you mean --{' or --'.join(similar)}?" if similar else "--help lists all"
        raise UserError(f"{unknown}: there is no such option; {meant}")
    first = next(iter(options.values()))
    if rest and not first.describe().startswith("one or more"):
        raise UserError(f"'{rest[0]}': found where an option was expected, such as --{first.name}")
    if rest:
        given[first.name] = [*rest, *given.get(first.name, [])]


def split_words(name, text):
    """
    :param name: of the field whose text holds options of another script
    :return: list of command line words
    :raises UserError: if a quotation mark is not closed
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{name}: {text[:80]!r} cannot be split into words ({error}); correct it") from None
