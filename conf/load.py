"""Settings of a job: one YAML per job and setting plus `key=value`, into a frozen dataclass.

OmegaConf merges, pydantic validates. Whatever is wrong ends in one sentence with the place, the key and a
suggestion. A config's fingerprint is the hash of what bears identity: its recipe and its inputs.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, TypeAdapter, ValidationError

ConfigT = TypeVar("ConfigT")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-5 as text; here it is a number, as everyone who types a learning rate means it."""


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)

_QUOTED = re.compile(r"'.*'|\".*\"", re.DOTALL)

STRICT = {"strict": True, "extra": "forbid"}
"""Give it to every config dataclass as `__pydantic_config__`; `settings` does so."""


class ConfigError(ValueError):
    """A setting that cannot be used; the message is one sentence for the person who typed it."""


def meaning(text: str, unit: str = "", **bounds: Any) -> Any:
    """Describes a setting inside `Annotated`: its meaning, its unit and pydantic bounds (`ge`, `le`, ...)."""
    return Field(description=text, json_schema_extra={"unit": unit}, **bounds)


@dataclass_transform(frozen_default=True, kw_only_default=True)
def settings(cls: type[ConfigT]) -> type[ConfigT]:
    """Makes a class a frozen, keyword-only dataclass that pydantic validates strictly, without extra keys."""
    cls.__pydantic_config__ = STRICT  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One leaf of a config as `--help` shows it."""

    key: str
    type: str
    default: str
    unit: str
    meaning: str


def read_yaml(job: str, setting: str) -> dict[str, Any]:
    """The packaged YAML of a job's setting.

    Raises:
        ConfigError: the job has no such setting; the message names those it has.
    """
    if setting not in list_settings(job):
        known = list_settings(job)
        raise ConfigError(f"conf/{job}: no setting {setting!r}; {_suggest(setting, known)}")
    text = resources.files("conf").joinpath(job, f"{setting}.yaml").read_text(encoding="utf-8")
    return _parse_yaml(text, f"conf/{job}/{setting}.yaml")


def list_settings(job: str) -> list[str]:
    """Names of the settings that are shipped for a job, sorted."""
    folder = resources.files("conf").joinpath(job)
    if not folder.is_dir():
        return []
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_yaml_file(path: str) -> dict[str, Any]:
    """A YAML mapping from a file of the user's.

    Raises:
        ConfigError: the file is missing, is not YAML, or is not a mapping.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{path}: no such file; give the path of a YAML file")
    return _parse_yaml(Path(path).read_text(encoding="utf-8"), path)


def load(
    cls: type[ConfigT],
    values: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    source: str = "command line",
) -> ConfigT:
    """Merges values with dotted `key=value` overrides and validates them as `cls`.

    The right side is YAML, but for settings that are text: unless it is quoted, a path is taken as it was typed.

    Raises:
        ConfigError: unknown key, wrong type or out-of-range value.
    """
    merged = OmegaConf.create(dict(values))
    origin: dict[str, str] = {}
    texts = {item.key for item in describe(cls) if item.type == "string"}
    for override in overrides:
        key, sign, text = override.partition("=")
        if not sign or not key:
            raise ConfigError(f"command line: expected key=value, got {override!r}")
        origin[key] = "command line"
        try:
            is_typed = not text or (key in texts and not _QUOTED.fullmatch(text))
            value = text if is_typed else yaml.load(text, _Loader)
            OmegaConf.update(merged, key, value, merge=True)
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(f"command line: {key}: {_first_line(error)}") from error
    return validate(cls, OmegaConf.to_container(merged, resolve=False), source=source, origin=origin)


def load_job(cls: type[ConfigT], job: str, setting: str, overrides: Sequence[str] = ()) -> ConfigT:
    """The config of a job: its setting's YAML and the overrides."""
    return load(cls, read_yaml(job, setting), overrides, source=f"conf/{job}/{setting}.yaml")


def validate(cls: type[ConfigT], values: Any, *, source: str, origin: Mapping[str, str] | None = None) -> ConfigT:
    """Checks plain values against a config dataclass.

    Raises:
        ConfigError: the first thing that is wrong, in one sentence.
    """
    try:
        return TypeAdapter(cls).validate_json(json.dumps(values))
    except ValidationError as error:
        raise ConfigError(_sentence(error, cls, source, origin or {})) from error
    except TypeError as error:
        raise ConfigError(f"{source}: {_first_line(error)}") from error


def describe(cls: type[Any], config: Any | None = None, prefix: str = "") -> Iterator[Setting]:
    """Every leaf setting of a config dataclass, in order, with the value of `config` as its default."""
    schema = TypeAdapter(cls).json_schema()
    yield from _leaves(cls, schema, config, prefix)


def fingerprint(*parts: Any) -> str:
    """16 hex digits over plain values and config dataclasses; equal recipes and inputs give equal prints.

    Sections that say `BEARS_IDENTITY = False` are left out: they decide whether a result counts, not what it is.
    """
    text = json.dumps([_plain(part) for part in parts], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: _plain(item) for name, item in held.items() if getattr(item, "BEARS_IDENTITY", True)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _parse_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        values = yaml.load(text, _Loader) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {_first_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected a mapping of settings, got {type(values).__name__}")
    return values


def _sentence(error: ValidationError, cls: type[Any], source: str, origin: Mapping[str, str]) -> str:
    """The first error of a validation; unknown keys come first, since they explain the others."""
    found = sorted(
        error.errors(),
        key=lambda item: item["type"] not in ("unexpected_keyword_argument", "extra_forbidden"),
    )
    first = found[0]
    key = ".".join(str(part) for part in first["loc"])
    place = next((place for typed, place in origin.items() if key == typed or key.startswith(typed + ".")), source)
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = [item.key for item in describe(cls)]
        sections = sorted({item.rpartition(".")[0] for item in known if "." in item})
        return f"{place}: unknown key {key!r}; {_suggest(key, known + sections)}"
    if first["type"] in ("missing", "missing_argument"):
        return f"{place}: {key!r} is missing; give {key}=VALUE"
    return f"{place}: {key}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"


def _suggest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if not close:
        by_leaf = {item.rpartition(".")[2]: item for item in known}
        close = [by_leaf[leaf] for leaf in difflib.get_close_matches(word.rpartition(".")[2], by_leaf, n=1)]
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known) or 'none'}"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _leaves(cls: type[Any], schema: dict[str, Any], config: Any | None, prefix: str) -> Iterator[Setting]:
    definitions, hints = schema.get("$defs", {}), get_type_hints(cls)
    properties = _resolve(schema, definitions).get("properties", {})
    for field in dataclasses.fields(cls):
        info = _resolve(properties.get(field.name, {}), definitions)
        value = getattr(config, field.name) if config is not None else _default(field)
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            nested = None if value is dataclasses.MISSING else value
            yield from _leaves(kind, {**info, "$defs": definitions}, nested, f"{prefix}{field.name}.")
            continue
        shown = "required" if value is dataclasses.MISSING else json.dumps(_plain(value), ensure_ascii=False)
        yield Setting(
            f"{prefix}{field.name}",
            _kind(info),
            shown,
            str(info.get("unit", "")),
            str(info.get("description", "")),
        )


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _resolve(info: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    name = info.get("$ref", "").rpartition("/")[2]
    return {**definitions[name], **{k: v for k, v in info.items() if k != "$ref"}} if name else info


def _kind(info: dict[str, Any]) -> str:
    if "enum" in info:
        return "|".join(str(item) for item in info["enum"])
    if "const" in info:
        return str(info["const"])
    if "anyOf" in info:
        return "|".join(_kind(item) for item in info["anyOf"])
    if info.get("type") == "array":
        return f"list of {_kind(info.get('items', {}))}" if isinstance(info.get("items"), dict) else "list"
    return str(info.get("type", "value"))
