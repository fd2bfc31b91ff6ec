"""
The command line: a script's dataclass of settings becomes its options, its help and its checks; and what happens when
the user, the machine or a signal ends the script.
"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import errno
import inspect
import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import NamedTuple, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from captioning.screen import printable, safe_screen
from utils import Stopped, UserError, short

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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

    def stop(number, _):  # an exception, as Ctrl-C is: temporary files and workers are cleaned away
        raise Stopped(number)

    def excepthook(args):  # TensorBoard writes in a thread, and raises the same again in ours
        if getattr(args.exc_value, "errno", None) not in FULL_DISK:
            threading.__excepthook__(args)

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
        if error.filename is None:
            raise
        reason = error.strerror or error
        exit_with(f"{os.fsdecode(error.filename)}: {reason}; give a path that you may read or write")
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
    last_line = str(error).strip().split("\n")[-1]  # a DataLoader's worker puts its traceback before it
    return printable(last_line.removeprefix("utils.UserError: "))


def check_command_line(config_class):
    """
    Answer `--help` and wrong options at once, at the top of a script, before its imports take seconds.

    :param config_class: as for `parse_args`
    """
    with safe_screen():
        parse_or_exit(config_class)


def parse_or_exit(config_class, args=None, find_base=None):
    """:return: the config of `parse_args`; a wrong option ends the script with one line"""
    try:
        return parse_args(config_class, args, find_base)
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":  # torchrun's other processes read the same words
            sys.exit(2)
        exit_with(error)


def parse_args(config_class, args=None, find_base=None):
    """
    Build a config from the command line: `--name value` for each of its fields.

    The help shows each field's type, default and comment, in the groups that the comment lines between them make.
    Words before the first option belong to the first field, if it takes several.
    :param config_class: a script's dataclass; or a union of some, each of which is a command (`blip.py eval ...`)
    :param args: list of words, default the process's own
    :param find_base: function of the config that gives another, whose fields stand where no option is given; or None
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
    """Help with a column for the options that most of them fit in."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=32)


class Option(NamedTuple):
    """A field of a Config as an option of the command line."""

    name: str
    type: object  # its annotation
    default: object  # dataclasses.MISSING if it has none
    group: str  # the comment line that it stands under
    comment: str  # at the end of its line

    def read(self, words):
        """
        :param words: of the command line: a str, or a list of them
        :return: the value that they mean
        :raises UserError: if the type does not allow it
        """
        if words == "None" and "None" in self.describe():
            return None
        return validate(self.name, self.type, words, ConfigDict(allow_inf_nan=False))

    def describe(self):
        """:return: the values that the type allows, in words"""
        return describe_values(TypeAdapter(self.type).json_schema())


def check_value(name, kind, value):
    """
    :param name: of the field
    :param kind: its type, such as `utils.Count`
    :raises UserError: if the type does not allow this value
    """
    validate(name, kind, value, ConfigDict(strict=True, allow_inf_nan=False))


def validate(name, kind, value, rules):
    """:return: the value as the type has it, by pydantic's rules; :raises UserError: if the type does not allow it"""
    found = tuple(map(as_text, value)) if isinstance(value, list | tuple) else as_text(value)
    try:
        return TypeAdapter(kind, config=rules).validate_python(found)
    except ValidationError as error:
        schema = TypeAdapter(kind).json_schema()
        place = error.errors()[0]["loc"]
        if isinstance(found, tuple) and "items" in schema and place:
            found, schema = found[place[0]], schema["items"]
        raise UserError(f"{name}: {short(found)} found, {describe_values(schema)} expected") from None


def as_text(value):
    """:return: a path as a str, anything else as it is"""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def describe_values(schema):
    """
    :param schema: JSON schema of a type
    :return: the values that it allows, in words
    """
    if "anyOf" in schema:
        return " or ".join(describe_values(part) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        *names, last = map(repr, schema.get("enum", [schema.get("const")]))
        return f"{', '.join(names)} or {last}" if names else last
    if schema["type"] == "array":
        return f"one or more values, each {describe_values(schema['items'])},"
    words = {"null": "None", "boolean": "True or False", "string": "text", "integer": "a whole number"}
    limits = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    ranges = [f"{word} {schema[key]:,}" for key, word in limits.items() if key in schema]
    return " ".join([words.get(schema["type"], "a number"), *ranges])


def read_options(config_class):
    """:return: list of a dataclass's fields as `Option`s"""
    types = get_type_hints(config_class, include_extras=True)
    comments, groups = read_comments(config_class)
    return [
        Option(field.name, types[field.name], field.default, groups.get(field.name, ""), comments.get(field.name, ""))
        for field in dataclasses.fields(config_class)
    ]


def read_comments(config_class):
    """
    :return: dict of the comment at the end of each field's line, and dict of the comment line above its group; both
        are empty where Python does not know the source, as in a notebook
    """
    comments, groups, group = {}, {}, ""
    with contextlib.suppress(OSError, TypeError):
        for line in inspect.getsource(config_class).splitlines():
            field = re.match(r" +(\w+):.*?(?:  # (.*))?$", line)
            if line.strip().startswith("# "):
                group = line.strip()[2:]
            elif field:
                comments[field[1]], groups[field[1]] = field[2] or "", group
    return comments, groups


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


def check_fields(config, needed=()):
    """
    Check what somebody typed at the top of a script, or gave to its Config in Python.

    :param config: instance of a script's dataclass
    :param needed: names of fields that it must have, beside those that its own file reads
    :raises UserError: if a field has a value that its type does not allow, has no type, or is missing
    """
    config_class = type(config)
    options = {option.name: option for option in read_options(config_class)}
    for name, value in vars(config_class).items():
        if not name.startswith("_") and name not in options and not callable(value):
            raise UserError(f"{name}: has no type, so it is not a setting; write `{name}: TYPE = {value!r}`")
    for name in (*fields_read_in_own_file(config_class), *needed):
        if not hasattr(config, name):
            raise UserError(missing_field(config_class, name))
    for name, option in options.items():
        check_value(name, option.type, getattr(config, name))


def fields_read_in_own_file(config_class):
    """:return: the fields that a script reads from its `Config`; none if it has several, or no file (a notebook)"""
    if config_class.__name__ != "Config":
        return []
    try:
        return fields_read_in(inspect.getfile(config_class))
    except (OSError, TypeError):
        return []


def fields_read_in(path):
    """:return: list of each <name> in `config.<name>` in a Python file"""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    reads = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    return [node.attr for node in reads if node.value.id == "config"]


def missing_field(config_class, name):
    """:return: what to tell the user about a field that a script needs and its Config does not have"""
    similar = difflib.get_close_matches(name, [field.name for field in dataclasses.fields(config_class)])
    found = f"'{similar[0]}' found instead" if similar else "it may have been deleted or misspelt"
    return f"{name}: missing from {config_class.__name__} at the top of the script ({found}); write it as it was"
