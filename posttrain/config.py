"""Recipes: YAML + `base:` inheritance + `key=value` overrides -> a checked `Recipe`. No torch.

recipes/nano/grpo_long_audio.yaml --base--> recipes/grpo_long_audio.yaml --defaults--> schema
"""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from posttrain.recipe_rules import validate
from posttrain.schema import Recipe
from reward_models.names import REWARD_NAMES

SECRET_VALUE = re.compile(r"^(hf_|sk-|wandb_)[A-Za-z0-9]{8,}")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads, inherits, overrides and checks a recipe.

    Args:
        overrides: `section.key=value` strings; values are YAML.

    Raises:
        ValueError: one line that names the file or override, the key and the fix.
    """
    path = Path(path)
    raw = _read_with_base(path, ())
    changes = _parse_overrides(overrides)
    _refuse_unknown(OmegaConf.to_container(raw), Recipe, str(path))
    _refuse_unknown(OmegaConf.to_container(changes), Recipe, "override")
    _refuse_secrets(OmegaConf.to_container(OmegaConf.merge(raw, changes)))
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Recipe), raw, changes)
        recipe = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise ValueError(f"{path}: {key}: {str(error).splitlines()[0]}") from error
    assert isinstance(recipe, Recipe)
    if recipe.run_name is None:
        recipe.run_name = path.stem
    try:
        validate(recipe, REWARD_NAMES)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return recipe


def engine_recipe(model: str, overrides: Sequence[str] = ()) -> Recipe:
    """Defaults for commands that only ask a model: its path, and overrides.

    Raises:
        ValueError: one line that names the override, the key and the fix.
    """
    changes = _parse_overrides(overrides)
    _refuse_unknown(OmegaConf.to_container(changes), Recipe, "override")
    try:
        base = OmegaConf.merge(OmegaConf.structured(Recipe), {"model": {"path": model}}, changes)
        recipe = OmegaConf.to_object(base)
    except OmegaConfBaseException as error:
        raise ValueError(f"override: {str(error).splitlines()[0]}") from error
    assert isinstance(recipe, Recipe)
    return recipe


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe; feeding it back gives the same recipe."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def _read_with_base(path: Path, seen: tuple[Path, ...]) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe; see recipes/")
    if path.resolve() in seen:
        raise ValueError(f"{path}: `base:` leads back to itself; remove one of them")
    try:
        own = OmegaConf.load(path)
    except Exception as error:  # yaml raises many types; all mean the same to the user
        raise ValueError(f"{path}: not readable YAML: {str(error).splitlines()[0]}") from error
    if not OmegaConf.is_dict(own):
        raise ValueError(f"{path}: a recipe is a mapping of keys")
    base = own.pop("base", None)
    if base is None:
        return own
    return OmegaConf.merge(_read_with_base(path.parent / base, (*seen, path.resolve())), own)


def _parse_overrides(overrides: Sequence[str]) -> Any:
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"override {override!r}: write it as key=value")
    return OmegaConf.from_dotlist(list(overrides))


def _refuse_unknown(tree: Any, schema: type, where: str, prefix: str = "") -> None:
    hints = get_type_hints(schema)
    for key, value in (tree or {}).items():
        path = f"{prefix}{key}"
        if key not in hints:
            raise ValueError(f"{where}: unknown key {path!r}; {_nearest(path)}")
        kind, mapped = _section_type(hints[key])
        if kind is None or value is None:
            continue
        if not isinstance(value, dict):
            raise ValueError(f"{where}: {path} is a section; set one of its keys")
        if not mapped:
            _refuse_unknown(value, kind, where, f"{path}.")
            continue
        for name, section in value.items():
            if section is not None and not isinstance(section, dict):
                raise ValueError(f"{where}: {path}.{name} is a section; set one of its keys")
            _refuse_unknown(section, kind, where, f"{path}.{name}.")


def _section_type(hint: Any) -> tuple[Any, bool]:
    """(dataclass of a section, whether the section is a mapping of names to it)."""
    if is_dataclass(hint):
        return hint, False
    if get_origin(hint) is dict and is_dataclass(get_args(hint)[1]):
        return get_args(hint)[1], True
    return None, False


def known_keys(schema: type = Recipe, prefix: str = "") -> list[str]:
    """Every dotted key; names inside mappings are written `NAME`."""
    keys = []
    for name, hint in get_type_hints(schema).items():
        kind, mapped = _section_type(hint)
        if kind is None:
            keys.append(f"{prefix}{name}")
        else:
            keys += known_keys(kind, f"{prefix}{name}.NAME." if mapped else f"{prefix}{name}.")
    return keys


def _nearest(path: str) -> str:
    """The known key closest to `path`, by its last part and by the whole."""
    last = path.rsplit(".", 1)[-1]

    def closeness(key: str) -> float:
        by_name = difflib.SequenceMatcher(None, last, key.rsplit(".", 1)[-1]).ratio()
        return by_name + 0.2 * difflib.SequenceMatcher(None, path, key).ratio()

    return f"did you mean {max(known_keys(), key=closeness)!r}?"


def _refuse_secrets(tree: Any, prefix: str = "") -> None:
    for key, value in tree.items():
        if isinstance(value, dict):
            _refuse_secrets(value, f"{prefix}{key}.")
        elif isinstance(value, str) and SECRET_VALUE.match(value):
            raise ValueError(
                f"{prefix}{key}: looks like a secret; put it into an environment variable "
                "(HF_TOKEN, WANDB_API_KEY), never into a recipe"
            )


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a recipe, for editors."""
    schema = _schema_of(Recipe)
    schema["properties"]["base"] = {"type": "string", "description": "recipe to inherit from"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "posttrain recipe",
        **schema,
    }


def _schema_of(hint: Any) -> dict[str, Any]:
    origin, args = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        properties = {}
        for item in fields(hint):
            properties[item.name] = _schema_of(hints[item.name])
            if item.default is not MISSING:
                properties[item.name]["default"] = item.default
        return {
            "type": "object",
            "description": (hint.__doc__ or "").strip().splitlines()[0],
            "properties": properties,
            "additionalProperties": False,
        }
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema_of(args[1])}
    if origin is list:
        return {"type": "array", "items": _schema_of(args[0])}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema_of(arg) for arg in args]}
    if hint is Any:
        return {}
    names = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
    return {"type": names[hint]}


def write_json_schema(path: Path) -> None:
    path.write_text(json.dumps(json_schema(), indent=2) + "\n")
