"""A configuration from and to a TOML file, with dotted overrides.

An unknown field is an error that suggests the nearest name.
"""

import difflib
import json
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from lclm.config import Config, ConfigError, check_config


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    complete: Callable[[dict[str, Any]], None] | None = None,
) -> Config:
    """Read a TOML file, apply `key.path=value` overrides, check it and return it.

    A value is read as TOML (`8`, `1e-5`, `true`, `[1, 2]`); what TOML cannot read is text.
    Lists are addressed by number: `stage.0.seq_length=65536`. `complete` may put into the tree,
    before it is checked, what another file says.

    Raises:
        ConfigError: with field, value, rule and remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"config: {path} is not a file; give the path of a TOML file")
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"config: {path} is not valid TOML: {error}") from error
    for override in overrides:
        _apply_override(tree, override)
    if complete is not None:
        complete(tree)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"config: {explain(error, Config)}") from error
    check_config(config)
    return config


def _apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one `key.path=value` in the tree read from TOML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override '{override}': write key.path=value, as in parallel.cp=2")
    *parents, last = key.strip().split(".")
    node: Any = tree
    for step, part in enumerate(parents):
        node = _child(node, part, ".".join(parents[: step + 1]))
    value = _read_value(text)
    if isinstance(node, list):
        node[_list_index(node, last, key)] = value
    else:
        node[last] = value


def _child(node: Any, part: str, name: str) -> Any:
    """The table or list under `part`, made where a table is missing."""
    if isinstance(node, list):
        return node[_list_index(node, part, name)]
    child = node.setdefault(part, {})
    if not isinstance(child, (dict, list)):
        raise ConfigError(f"override: {name} is a value, not a table; nothing lies below it")
    return child


def _list_index(node: list[Any], part: str, name: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(
            f"override: {name}: '{part}' is not one of the {len(node)} entries "
            f"0..{len(node) - 1}; count from 0"
        )
    return int(part)


def _read_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _section_fields(root: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Names of the fields that exist where `location` points."""
    section = root
    for part in location:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """What is wrong with fields of `root`: of each problem the dotted field, the value, the rule.

    An unknown field comes with the nearest name that is known.
    """
    items, lines = error.errors(), []
    for item in items:
        if item["type"] == "too_short" and any(_is_below(other, item) for other in items):
            continue  # its entries were left out because of what is wrong in them
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _section_fields(root, item["loc"][:-1])
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"
            lines.append(f"{where}: unknown field; {hint}")
        elif item["type"] == "missing":
            lines.append(f"{where}: missing; set it")
        elif item["type"] == "string_type" and isinstance(item["input"], int | float):
            text = _toml_value(str(item["input"]))
            lines.append(f"{where} = {item['input']!r}: must be text; quote it: '{where}={text}'")
        else:
            lines.append(f"{where} = {item['input']!r}: {item['msg']}")
    return "; ".join(lines)


def _is_below(inner: ErrorDetails, outer: ErrorDetails) -> bool:
    """Whether a problem lies inside of the value that another is about."""
    depth = len(outer["loc"])
    return len(inner["loc"]) > depth and inner["loc"][:depth] == outer["loc"]


def dump_toml(config: Config) -> str:
    """The resolved configuration as TOML, every field written out; `load_config` reads it back."""
    tree = config.model_dump(exclude_none=True)
    lines = [f"seed = {tree.pop('seed')}"]
    stages = tree.pop("stage")
    for name, section in tree.items():
        lines += ["", f"[{name}]", *_toml_fields(section)]
    for stage in stages:
        mixture = stage.pop("mixture")
        lines += ["", "[[stage]]", *_toml_fields(stage)]
        for entry in mixture:
            lines += ["", "[[stage.mixture]]", *_toml_fields(entry)]
    return "\n".join(lines) + "\n"


def dump_section(name: str, section: BaseModel) -> str:
    """One section as TOML, every field written out."""
    return "\n".join([f"[{name}]", *_toml_fields(section.model_dump(exclude_none=True))]) + "\n"


def _toml_fields(section: dict[str, Any]) -> list[str]:
    return [f"{key} = {_toml_value(value)}" for key, value in section.items()]


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_toml_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)  # written alike in TOML
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)
