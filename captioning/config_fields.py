"""
The fields of a script's Config: what the types allow, in words for the help and as checks of what somebody typed.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import os
import re
from pathlib import Path
from typing import NamedTuple, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from utils import UserError, short


class Option(NamedTuple):
    """A field of a Config as an option of the command line."""

    name: str
    type: object  # its annotation
    default: object  # dataclasses.MISSING if it has none
    group: str  # the comment line above it and its neighbours
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
    :return: dict of the comment at the end of each field's line; dict of the comment line above each field's group;
        both empty where Python does not know the source, as in a notebook
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


def check_fields(config, needed=()):
    """
    Check what somebody typed at the top of a script, or gave to its Config in Python.

    :param config: instance of a script's dataclass
    :param needed: names of fields that it must have, besides those that its own file reads
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
        value = getattr(config, name)
        check_value(name, option.type, value)
        empty = "" in value if isinstance(value, list | tuple) else value == ""
        if empty and option.default != "":  # as of a shell's variable that is not set
            raise UserError(f"{name}: an empty text found; give one that says something, or leave the option out")


def check_value(name, kind, value):
    """
    :param name: of the field
    :param kind: its type, such as `utils.Count`
    :raises UserError: if the type does not allow this value
    """
    validate(name, kind, value, ConfigDict(strict=True, allow_inf_nan=False))


def limits_of(kind):
    """:return: the smallest and the largest value of a type such as `utils.BeamSizeOfPage`"""
    schema = TypeAdapter(kind).json_schema()
    return schema["minimum"], schema["maximum"]


def validate(name, kind, value, rules):
    """
    :param rules: pydantic's `ConfigDict`
    :return: the value, converted to the type
    :raises UserError: if the type does not allow it
    """
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
