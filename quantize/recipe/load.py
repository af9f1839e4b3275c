"""Reads recipes: the shipped ones by name, a user's own by path. Errors name the file, the line and the key."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import yaml
from pydantic import ValidationError

from ..checkpoint.json_text import quoted
from ..checkpoint.regular import read_regular, unreadable
from ..errors import InputError
from .schema import Recipe
from .yaml_text import YamlFault, parse_yaml

_PACKAGE = "nvquant.recipes"
MOST_KEY = 60  # characters of a key that a message repeats
# pydantic's kinds of errors where its own words are Python's, not YAML's.
_IN_WORDS = {
    "missing": "is required",
    "tuple_type": "must be a list",
    "too_short": "must not be empty",
    "model_type": "must be a map of keys",
    "string_type": "must be text",
}


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with nvquant, sorted."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in resources.files(_PACKAGE).iterdir()
        if entry.name.endswith(".yaml")
    )


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by its name, or a user's own by the path of its file.

    Raises:
        InputError: no such recipe, or a file that does not fit the schema. The message names file, line and key.
    """
    if name in shipped_recipes():
        return parse_recipe(resources.files(_PACKAGE).joinpath(f"{name}.yaml").read_bytes(), f"{name}.yaml")
    path = Path(name)
    try:
        if path.suffix in (".yaml", ".yml") or path.is_file():
            return parse_recipe(read_regular(path, hint="give the path of a YAML file"), name)
    except OSError as error:
        raise unreadable(path, error, "give the path of a YAML file") from error
    raise InputError(
        f"recipe '{name}' does not exist",
        hint=f"choose one of {', '.join(shipped_recipes())}, or give the path of your own file, such as ./my.yaml",
    )


def parse_recipe(text: str | bytes, file: str) -> Recipe:
    """Check the text of a recipe.

    Args:
        text: YAML.
        file: its name in messages.
    Raises:
        InputError: not YAML or not a recipe. The message names file, line and key.
    """
    try:
        root, data = parse_yaml(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    except YamlFault as error:
        raise InputError(f"{file}:{error.line}: {error.problem}.") from error
    _refuse_duplicates(root, file)
    if not isinstance(data, dict):
        raise InputError(f"{file}:1: the file is not a map with the keys name and quantize.")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part)[:MOST_KEY] for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise InputError(
            f"{file}:{_line_of(root, first['loc'])}: key '{key}': {_in_words(message, first['type'], first['loc'])}."
        ) from error


def _in_words(message: str, kind: str, location: Sequence[int | str]) -> str:
    if kind == "extra_forbidden":
        return f"{quoted(str(location[-1]))} is not a key of a recipe: `nvquant recipes show nvfp4` lists all of them"
    if kind in _IN_WORDS:
        return _IN_WORDS[kind]
    return message[0].lower() + message[1:]


def _refuse_duplicates(root: yaml.Node | None, file: str) -> None:
    """Refuse equal keys, of which YAML silently keeps the last."""
    seen: set[int] = set()  # an alias leads to a node again, perhaps to one around it
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            names: set[str] = set()
            for key, value in node.value:
                name = key.value if isinstance(key, yaml.ScalarNode) else ""
                if name in names:
                    raise InputError(
                        f"{file}:{key.start_mark.line + 1}: key {quoted(name)} occurs twice",
                        where=file,
                        hint="remove one",
                    )
                names |= {name} - {""}
                waiting.append(value)


def _line_of(node: yaml.Node | None, location: Sequence[int | str]) -> int:
    """The line (from 1) of the deepest node on the way to `location`."""
    line = 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            pair = next(((key, value) for key, value in node.value if key.value == part), None)
            if pair is None:
                return node.start_mark.line + 1 if line == 1 else line
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line
