"""YAML of unknown origin, parsed within limits: no Python tags, no alias bombs, and limits of depth and digits."""

from __future__ import annotations

from typing import Any

import yaml

MOST_BYTES = 1_000_000  # a recipe has some hundreds
MOST_DEPTH = 50
MOST_NODES = 50_000  # aliases counted as often as they stand


class YamlFault(ValueError):
    """A fault of a YAML text: a clause that describes it, and its line (from 1)."""

    def __init__(self, problem: str, line: int = 1) -> None:
        super().__init__(problem)
        self.problem, self.line = problem, line


def parse_yaml(data: bytes) -> tuple[yaml.Node | None, Any]:
    """The tree of nodes, for the lines of errors, and the value of a YAML text.

    Raises:
        YamlFault: it is not YAML in UTF-8, or exceeds a limit.
    """
    if len(data) > MOST_BYTES:
        raise YamlFault(f"the file has {len(data):,} bytes, but the limit is {MOST_BYTES:,}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise YamlFault(f"byte {error.start:,} is not UTF-8: save the file in UTF-8") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _check_size(root)
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise YamlFault(
            f"the text is not YAML ({' '.join(str(problem).split())[:200]})", mark.line + 1 if mark else 1
        ) from error
    except RecursionError as error:
        raise YamlFault(f"the file nests more than {MOST_DEPTH} lists and maps") from error
    except YamlFault:
        raise
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, OverflowError) as error:  # PyYAML's own faults
        raise YamlFault(f"the file contains an unreadable value ({str(error)[:100]})") from error
    _check_values(value)
    return root, value


def _check_size(root: yaml.Node | None) -> None:
    """Refuse aliases that make a tree too large, too deep or endless."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, depth: int) -> int:
        if depth > MOST_DEPTH:
            raise YamlFault(f"the file nests more than {MOST_DEPTH} lists and maps", node.start_mark.line + 1)
        if id(node) not in sizes:
            inner: list[yaml.Node] = []
            if isinstance(node, yaml.SequenceNode):
                inner = node.value
            elif isinstance(node, yaml.MappingNode):
                inner = [part for pair in node.value for part in pair]
            sizes[id(node)] = 1 + sum(size(part, depth + 1) for part in inner)
        if sizes[id(node)] > MOST_NODES:
            raise YamlFault(f"the file contains more than {MOST_NODES:,} values", node.start_mark.line + 1)
        return sizes[id(node)]

    if root is not None:
        size(root, 0)


def _check_values(value: Any) -> None:
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            waiting += [*found, *found.values()]
        elif isinstance(found, (list, tuple, set)):
            waiting += found
        elif isinstance(found, str):
            if any("\ud800" <= character <= "\udfff" for character in found):
                raise YamlFault("the file contains half of a surrogate pair, which is not a character")
        elif isinstance(found, int) and abs(found) >= 1 << 63:
            raise YamlFault(
                f"the file contains a number of {len(str(found)) if abs(found) < 10**4000 else 'too many'} digits"
            )
