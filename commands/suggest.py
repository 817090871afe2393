"""Errors of the command line in a line or two: which key or class, in which file, and what was perhaps meant.

jsonargparse reports a wrong argument as a tree of every type that it tried. Here the tree is read back
into its leaves, the one that explains most is kept, and the nearest accepted names are added. A message
of an unknown shape is printed as it came.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, get_args

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser

NAMED = 5  # so many candidates are named

BRANCH = re.compile(r'Parser key "(?P<key>.+?)":(?P<rest>.*)|Problem with given class_path \'(?P<owner>.+?)\':')
NOT_ACCEPTED = re.compile(r"(?:(?P<scope>Group|Subcommand) '(?P<of>\S+?)' does not accept o|O)ption '(?P<key>\S+?)'")
NO_CLASS = re.compile(
    r"Expected a dot import path string: (\w+)|module '(?P<module>\S+)' has no attribute '(?P<name>\w+)'"
)
NO_SPEC = re.compile(r"Expected an instantiatable class, but \S+ is abstract|Not a valid subclass of")
NO_TARGET = re.compile(r"Interpolation key '\S+' not found \(resolved to '\w+\.(\S+)'\)")
NOISE = re.compile(
    r"Does not validate against any|Subtypes: |Errors:|Given value|Expected a <class 'NoneType'>"
    r"|Expected a path but |Subclass types expect|a class path \(str\)|a dict with"
)


@dataclass(frozen=True)
class Leaf:
    """One reason why an argument was refused."""

    key: str  # from the root: "model.backbone"
    owner: str | None  # class path of the innermost object around it, None: the parser itself
    local: str  # the key as that object has it: "backbone"
    text: str

    @property
    def weight(self) -> tuple[bool, int]:
        """Known mistakes explain more than others, inner ones more than outer ones."""
        return bool(NOT_ACCEPTED.search(self.text) or NO_CLASS.search(self.text)), self.key.count(".")


class Parser(LightningArgumentParser):
    """The parser of every command: it ends with exit code 2 and a message that names what is wrong."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and what was perhaps meant, and exit."""
        if not self.exit_on_error:
            super().error(message, ex)
        given: Sequence[str] = getattr(self, "args", ())
        for line in explain(message, self, given):
            print(f"error: {line}", file=sys.stderr)
        self.exit(2)


def nearest(word: str, candidates: Iterable[str]) -> list[str]:
    """The candidates that are closest to a word: those that begin with it, then those spelled alike."""
    names = sorted(set(candidates))
    lower = {name.lower(): name for name in reversed(names)}
    begin = [name for name in names if name.startswith(word)]
    alike = [lower[close] for close in difflib.get_close_matches(word.lower(), lower, n=3, cutoff=0.6)]
    return list(dict.fromkeys(begin + alike))[:NAMED]


def stray(key: str, accepted: Iterable[str]) -> tuple[str, list[str]]:
    """Where a dotted key goes wrong.

    Returns:
        The first part that is not accepted below its parents, and the nearest keys at that level.
    """
    names = [name.split(".") for name in accepted]
    parts = key.split(".")
    for level, part in enumerate(parts):
        parent = parts[:level]
        children = {name[level] for name in names if name[:level] == parent and len(name) > level}
        if part not in children:
            return part, [".".join([*parent, child]) for child in nearest(part, children)]
    return parts[-1], []


def explain(message: str, parser: ArgumentParser, given: Sequence[str]) -> list[str]:
    """A jsonargparse error in a few lines.

    Args:
        message: what jsonargparse says.
        parser: that says so.
        given: the command line, which names configuration files and the subcommand.
    """
    if message.startswith("Problems parsing config"):
        return [broken_yaml(given) or message]
    scope = subparser(parser, given)
    if unknown := re.match(r"unrecognized arguments: (.*)", message, re.DOTALL):
        words = [word for word in unknown[1].split() if word.startswith("-")] or unknown[1].split()[:1]
        return [unknown_key(word.split("=")[0].lstrip("-"), scope, "--")[0] for word in words]
    if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
        return [f"unknown command {choice[1]!r}{meant(nearest(choice[1], re.findall(r'[a-z_]+', choice[2])))}"]
    found = leaves(message)
    if not found:
        return [message]
    text, words = describe(max(found, key=lambda leaf: leaf.weight), scope)  # the first of the heaviest
    return [text + place(words, given)]


def leaves(message: str) -> list[Leaf]:
    """The reasons in a tree of indented lines."""
    found: list[Leaf] = []
    stack: list[tuple[int, str, str | None]] = []  # indentation, key, class path
    for line in message.splitlines():
        text = line.strip().removeprefix("- ")
        indent = len(line) - len(line.lstrip())
        while stack and stack[-1][0] >= indent and text:
            stack.pop()
        branch = BRANCH.match(text)
        if branch:
            stack.append((indent, branch["key"] or "", branch["owner"]))
            text = (branch["rest"] or "").strip()
        if not text or NOISE.match(text):
            continue
        owners = [n for n, (_, _, owner) in enumerate(stack) if owner is not None]
        inner = stack[owners[-1] + 1 :] if owners else stack
        found.append(
            Leaf(
                key=".".join(key for _, key, _ in stack if key),
                owner=stack[owners[-1]][2] if owners else None,
                local=".".join(key for _, key, _ in inner if key),
                text=text,
            )
        )
    return found


def describe(leaf: Leaf, scope: ArgumentParser) -> tuple[str, list[str]]:
    """One reason in words, with candidates; and the words by which its line in a file is known."""
    last = leaf.key.rsplit(".", 1)[-1]
    if match := NOT_ACCEPTED.search(leaf.text):
        if leaf.owner is None:
            return unknown_key(f"{match['of']}.{match['key']}" if match["scope"] == "Group" else match["key"], scope)
        name, accepted = leaf.owner.rsplit(".", 1)[-1], accepted_by(leaf.owner)
        word, candidates = stray(match["key"], accepted)
        hint = meant(candidates) or f"; {name} accepts {', '.join(sorted(accepted)) or 'none'}"
        return f"unknown key '{leaf.key}.{match['key']}': {name} has no argument {match['key']!r}{hint}", [word]
    known = known_classes(leaf, scope)
    if match := NO_CLASS.search(leaf.text):
        wrong = match[1] or match["name"]
        known = known or sorted(vars(sys.modules[match["module"]])) if match["module"] else known
        where = f" for '{leaf.key}'" if leaf.key else f" in {match['module']}"
        return f"unknown class {wrong!r}{where}{meant(nearest(wrong, known)) or listed(known)}", [wrong]
    if NO_SPEC.search(leaf.text):
        return f"'{leaf.key}' needs class_path and init_args, and nothing else beside them{listed(known)}", [last]
    if match := NO_TARGET.search(leaf.text):
        return f"nothing is called ${{{match[1]}}}", [match[1].rsplit(".", 1)[-1]]
    value = re.search(r"Got value: (\w+)$", leaf.text)
    return (f"'{leaf.key}': {leaf.text}" if leaf.key else leaf.text), [last, value[1]] if value else [last]


def unknown_key(key: str, scope: ArgumentParser, dashes: str = "") -> tuple[str, list[str]]:
    """What to say of a key that the parser does not have, and the part of it that is wrong."""
    word, candidates = stray(key, accepted_keys(scope))
    return f"unknown key '{dashes}{key}'{meant([dashes + name for name in candidates])}", [word]


def meant(candidates: Sequence[str]) -> str:
    """The end of a message: what was perhaps meant."""
    return f"; did you mean {', '.join(candidates)}?" if candidates else ""


def listed(known: Sequence[str]) -> str:
    """The end of a message: what there is."""
    return f"; known: {', '.join(sorted(known))}" if known else ""


def accepted_keys(parser: ArgumentParser) -> dict[str, Any]:
    """Key -> type of everything that a parser accepts."""
    actions = [action for action in parser._actions if action.option_strings and not action.dest.endswith(".help")]
    return {action.dest: getattr(action, "_typehint", None) for action in actions}


def accepted_by(class_path: str) -> dict[str, Any]:
    """Init argument -> type of a class, ``**kwargs`` of its parents included."""
    module, name = class_path.rsplit(".", 1)
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_class_arguments(getattr(importlib.import_module(module), name), fail_untyped=False)
    return accepted_keys(parser)


def known_classes(leaf: Leaf, scope: ArgumentParser) -> list[str]:
    """Names of the classes that could stand at a key."""
    hints: Mapping[str, Any] = accepted_keys(scope) if leaf.owner is None else accepted_by(leaf.owner)
    return sorted({cls.__name__ for base in classes(hints.get(leaf.local)) for cls in concrete(base)})


def classes(hint: Any) -> list[type]:
    """The classes that a type hint mentions."""
    if inspect.isclass(hint) and not get_args(hint):
        return [] if hint.__module__ == "builtins" else [hint]
    return [cls for part in get_args(hint) for cls in (classes(part) if not isinstance(part, list) else [])]


def concrete(base: type) -> set[type]:
    """A class and all its subclasses that are imported, without abstract and private ones."""
    children: list[type] = base.__subclasses__()
    below = {cls for child in children for cls in concrete(child)}
    return below if inspect.isabstract(base) or base.__name__.startswith("_") else below | {base}


def subparser(parser: ArgumentParser, given: Sequence[str]) -> ArgumentParser:
    """The parser of the subcommand that was asked for; without subcommands the parser itself."""
    for action in parser._actions:
        parsers: Mapping[str, ArgumentParser] = getattr(action, "_name_parser_map", None) or {}
        for word in given:
            if word in parsers:
                return parsers[word]
    return parser


def config_files(given: Sequence[str]) -> list[Path]:
    """The YAML files that a command line names, in order."""
    words = [word.split("=", 1)[-1] for word in given]
    return [Path(word) for word in words if word.endswith((".yaml", ".yml")) and Path(word).is_file()]


def place(words: Sequence[str], given: Sequence[str]) -> str:
    """`` (file:line, ...)`` where configuration files have these words; empty if the command line itself does."""
    wholes = [re.compile(rf"(?<![\w-]){re.escape(word)}(?![\w-])") for word in words if word]

    def has(text: str) -> bool:
        return all(whole.search(text) for whole in wholes)

    if not wholes or any(has(each) for each in given if not each.endswith((".yaml", ".yml"))):
        return ""
    hits = [
        f"{file}:{number}"
        for file in config_files(given)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if has(line.split("#")[0])
    ]
    return f" ({', '.join(hits[:NAMED])})" if hits else ""


def broken_yaml(given: Sequence[str]) -> str | None:
    """Which file is no YAML, and where."""
    for file in config_files(given):
        try:
            yaml.safe_load(file.read_text(encoding="utf-8"))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            where = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else str(file)
            return f"{where}: not valid YAML: {error.problem}"
    return None
