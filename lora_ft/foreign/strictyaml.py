"""YAML text -> plain values, refusing what would fill the machine or be read in two ways."""

from __future__ import annotations

from typing import Any

import yaml

from lora_ft.foreign.strictjson import INT64

# A run's configuration is under 4 KB, and PyYAML takes a second for a few hundred.
MAX_BYTES = 64 * 2**10
MAX_DEPTH = 16
# Each alias of an alias multiplies; so few cannot grow to anything.
MAX_ALIASES = 16


class YamlError(ValueError):
    """Text that is no YAML, or YAML that is refused; says where and why."""


def loads(text: str) -> Any:
    """Returns the value that `text` holds, of dictionaries, lists and scalars alone. Raises YamlError."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise YamlError(f"it is longer than {MAX_BYTES:,} bytes; a configuration is not")
    try:
        return _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise YamlError(f"{line}{error.problem}") from None
    except yaml.YAMLError as error:
        raise YamlError(str(error).splitlines()[0]) from None
    # Dates and numbers that Python cannot hold; brackets by the thousand, which the scanner nests.
    except (ValueError, OverflowError, RecursionError) as error:
        raise YamlError(f"a value cannot be read: {error}") from None


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with limits on depth and aliases, and keys that stand once."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        self.aliases += isinstance(event, yaml.AliasEvent)
        self.depth += 1
        if self.aliases > MAX_ALIASES:
            raise _refused(f"more than {MAX_ALIASES} aliases; write the values out", event.start_mark)
        if self.depth > MAX_DEPTH:
            raise _refused(f"nested deeper than {MAX_DEPTH} levels; make it flatter", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = getattr(key, "value", None)
            if isinstance(name, str) and (key.tag, name) in seen:
                raise _refused(f"the key {name!r} stands twice; keep one", key.start_mark)
            seen.add((key.tag, name if isinstance(name, str) else id(key)))
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = super().construct_yaml_int(node)
        if value not in INT64:
            raise _refused("a whole number beyond 64 bits", node.start_mark)
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _refused(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
