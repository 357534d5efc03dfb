"""Specs as TOML text: read a file, lay options and assignments over it, validate, name every fault, write it back.

Knows pydantic models, and nothing of the schemas. The standard library's parser does not tell where a key stands, so
`locate` reads the text a second time, for positions only.
"""

import copy
import difflib
import json
import re
import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ldctl.errors import SpecError
from ldctl.toml_text import KeyPath, literal, locate, read_key, syntax_fault, write

S = TypeVar("S", bound=BaseModel)


class Origin(NamedTuple):
    """Where a value comes from; faults are listed in this order."""

    layer: int
    position: int
    text: str


class Fault(NamedTuple):
    """What is wrong with the value at a path. `expected` is what it should have been, where that can be said."""

    path: KeyPath
    expected: str
    text: str


def load(cls: type[S], *, file: Path | None, flags: Mapping[str, object], assignments: Sequence[str]) -> S:
    """Resolve a spec: the schema's defaults, then the file, then command-line options, then assignments.

    Args:
        cls: What to load.
        file: A TOML file.
        flags: Values by dotted path.
        assignments: `section.key=value`; the value is TOML, or a bare word. An index addresses an item of a list.

    Raises:
        SpecError: Lists every fault, one a line, each with where it stands.
    """
    values, origins = _read(file) if file else ({}, {})
    faults: dict[Origin, list[str]] = {}
    layers: list[tuple[Origin, str, object]] = [
        (Origin(1, 0, "command line"), path, copy.deepcopy(value)) for path, value in flags.items()
    ]
    for number, assignment in enumerate(assignments):
        origin = Origin(2, number, f"--set {_shorten(assignment)}")
        try:
            layers.append((origin, *_parse_assignment(assignment)))
        except SpecError as error:
            faults[origin] = [str(error)]
    for origin, key, value in layers:
        try:
            _assign(cls, values, origins, key, value, origin)
        except SpecError as error:
            faults.setdefault(origin, []).append(str(error))
    try:
        spec = cls.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        details = [detail for detail in error.errors() if not _is_echo(detail)]
        for fault in _merge(_explain(cls, values, detail) for detail in details):
            text = ": ".join(filter(None, (".".join(map(str, fault.path)), fault.text)))
            faults.setdefault(_origin(origins, fault.path), []).append(text)
    if faults:
        lines = [": ".join(filter(None, (origin.text, text))) for origin in sorted(faults) for text in faults[origin]]
        raise SpecError("\n".join(line.replace("\n", " ") for line in dict.fromkeys(lines)))
    return spec


def _origin(origins: Mapping[KeyPath, Origin], path: KeyPath) -> Origin:
    """Return where the value at a path comes from; no line of a file where the command line changed part of it."""
    known = next(path[:k] for k in range(len(path), -1, -1) if path[:k] in origins or k == 0)
    origin = origins.get(known, Origin(0, 0, ""))
    is_changed = any(part.layer > 0 for other, part in origins.items() if other[: len(path)] == path)
    if origin.layer == 0 and is_changed:
        return Origin(1, 0, "command line") if path else Origin(0, 0, "")  # options always change something at the top
    return origin


def dumps(spec: BaseModel) -> str:
    """Write a spec as TOML text that loads back to an equal one; `None`, which TOML lacks, is left out."""
    return write(_plain_table(spec))


# --- reading --------------------------------------------------------------------------------------------------------


def _read(file: Path) -> tuple[dict[str, object], dict[KeyPath, Origin]]:
    """Parse a file; say of each key in which line it stands."""
    try:
        text = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except OSError as error:
        raise SpecError(f"{file}: cannot be read: {error.strerror}; give the path of a TOML file") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"{file}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{file}:{syntax_fault(text, str(error))}") from error
    except ValueError as error:  # all that is left: a number that Python refuses to read
        raise SpecError(f"{file}: holds a number of thousands of digits; mend it") from error
    lines = {path: Origin(0, line, f"{file}:{line}") for path, line in locate(text).items()}
    return values, {(): Origin(0, 0, str(file))} | lines


# --- overriding -----------------------------------------------------------------------------------------------------


def _parse_assignment(assignment: str) -> tuple[str, object]:
    """Split `section.key=value`; a value that is no TOML is text, unless it starts like TOML."""
    key, equals, text = (part.strip() for part in assignment.partition("="))
    if not equals:
        raise SpecError("no '='; write section.key=value")
    try:
        parsed = tomllib.loads(f"v = {text}")
    except tomllib.TOMLDecodeError as error:
        if text[:1] in ("[", "{", '"', "'"):
            raise SpecError(f"{key}: {_shorten(text)} is not a TOML value; check quotes and brackets") from error
        return key, text
    except ValueError as error:  # as in `_read`
        raise SpecError(f"{key}: a number of thousands of digits; mend it") from error
    if len(parsed) > 1:
        raise SpecError(f"{key}: more than one value; use one --set for each")
    return key, parsed["v"]


def _assign(
    cls: type[BaseModel],
    values: dict[str, object],
    origins: dict[KeyPath, Origin],
    key: str,
    value: object,
    origin: Origin,
) -> None:
    """Put a value where a dotted key says, in place."""
    parts, end = read_key(key, 0)
    if not parts or end < len(key):
        raise SpecError(f"{key}: not a key; write section.key=value")
    path: KeyPath = ()
    place: object = values
    schema: object = cls
    for depth, part in enumerate(parts):
        is_last = depth == len(parts) - 1
        where = ".".join(map(str, path))
        step: str | int = part
        if isinstance(place, list):
            if not part.isdecimal() or int(part) >= len(place):
                raise SpecError(f"{key}: {where} is a list of {len(place)}; its items are 0 to {len(place) - 1}")
            step = int(part)
            if is_last:
                place[step] = value
        elif isinstance(place, dict):
            if is_last:
                place[part] = value
            elif part not in place:
                place[part] = _start(schema, place, part) if parts[depth + 1].isdecimal() else {}
        else:
            raise SpecError(f"{key}: {where} is {literal(place)}, which has no keys of its own")
        schema = _inner(schema, step, place)
        path = (*path, step)
        place = place[step]  # type: ignore[index]
        origins.setdefault(path, origin)
    for stale in [other for other in origins if other[: len(path)] == path]:
        del origins[stale]
    origins[path] = origin


def _start(schema: object, place: dict[str, object], key: str) -> object:
    """Return what an assignment into an absent key changes: the schema's default, if it is a list, else a new table."""
    model = _model(schema, place)
    field = model.model_fields.get(key) if model else None
    default = field.get_default(call_default_factory=True) if field else None
    return _plain(default) if isinstance(default, list | tuple) else {}


# --- the schema at a place ------------------------------------------------------------------------------------------


def _members(schema: object) -> tuple[list[object], str | None]:
    """Return the types that a place accepts, and the key that chooses among them where there is one."""
    if isinstance(schema, FieldInfo):
        members, key = _members(schema.annotation)
        return members, schema.discriminator if isinstance(schema.discriminator, str) else key
    if get_origin(schema) is Annotated:
        base, *notes = get_args(schema)
        members, key = _members(base)
        keys = [note.discriminator for note in notes if isinstance(note, FieldInfo)]
        return members, next((found for found in keys if isinstance(found, str)), key)
    if get_origin(schema) in (Union, types.UnionType):
        found = [_members(member) for member in get_args(schema)]
        return [member for members, _ in found for member in members], next((key for _, key in found if key), None)
    return [schema], None


def _models(schema: object) -> list[type[BaseModel]]:
    return [member for member in _members(schema)[0] if isinstance(member, type) and issubclass(member, BaseModel)]


def _kinds(model: type[BaseModel], key: str) -> tuple[object, ...]:
    return get_args(model.model_fields[key].annotation)


def _model(schema: object, value: object) -> type[BaseModel] | None:
    """Return the model that a table has to satisfy, None where that is not known.

    A table that does not say its kind is of the default's, where there is one.
    """
    models, key = _models(schema), _members(schema)[1]
    if len(models) == 1:
        return models[0]
    default = schema.default if isinstance(schema, FieldInfo) else None
    kind = value.get(key, getattr(default, key, None)) if key and isinstance(value, dict) else None
    return next((model for model in models if key and kind in _kinds(model, key)), None)


def _inner(schema: object, step: str | int, value: object) -> object:
    """Return what the schema says of one key or item of a value, None where it says nothing."""
    model = _model(schema, value)
    if isinstance(step, str) and model:
        return model.model_fields.get(step)
    for member in _members(schema)[0]:
        arguments = get_args(member)
        if isinstance(step, int) and get_origin(member) in (list, tuple) and arguments:
            return arguments[0] if arguments[-1] is ... else arguments[min(step, len(arguments) - 1)]
        if isinstance(step, str) and get_origin(member) in (dict, Mapping):
            return arguments[1]
    return None


# --- faults ---------------------------------------------------------------------------------------------------------

_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a table",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_attributes_type": "a table",
    "model_type": "a table",
    "string_type": "text in quotes",
    "tuple_type": "a list",
}


def _is_echo(detail: ErrorDetails) -> bool:
    """Return whether a list is called too short only because its items have faults of their own."""
    return detail["type"] == "too_short" and len(detail["input"]) >= detail["ctx"]["min_length"]


def _explain(cls: type[BaseModel], values: dict[str, object], detail: ErrorDetails) -> Fault:
    """Say in the user's words what pydantic found."""
    path, owner, schema = _resolve(cls, values, detail["loc"])
    kind, given, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        known = owner.model_fields if owner else {}
        hint = _suggest(str(path[-1]), known) or f"; known here: {', '.join(known)}"
        return Fault(path, "", f"unknown key{hint}")
    if kind == "missing":
        if isinstance(path[-1], int):
            return Fault(path, "", "missing; the list is too short")
        if _models(schema):
            return Fault(path, "", f"missing; add a section {_header(path)}")
        return Fault(
            path, "", f"missing; add {path[-1]} = ... {f'to {_header(path[:-1])}' if path[1:] else 'at the top'}"
        )
    if kind in ("value_error", "assertion_error"):
        return Fault(path, "", str(context["error"]))
    if kind.startswith("union_tag"):
        key = _members(schema)[1] or "kind"
        kinds = [str(name) for model in _models(schema) for name in _kinds(model, key)]
        if kind == "union_tag_not_found":
            return Fault((*path, key), "", f"missing; one of {_quote(kinds)}")
        given = given[key]
        return Fault((*path, key), _quote(kinds), f", given {literal(given)}{_suggest(str(given), kinds)}")
    rest = f", given {_shorten(literal(given))}"
    if kind in ("literal_error", "enum"):
        names = re.findall(r"'([^']*)'", str(context["expected"]))
        return Fault(path, str(context["expected"]), rest + _suggest(str(given), names))
    if kind in ("too_short", "string_too_short"):
        return Fault(path, "", "must not be empty")
    if kind in _EXPECTED:
        return Fault(path, _EXPECTED[kind], rest)
    return Fault(path, "", detail["msg"].replace("Input should be", "must be") + rest)


def _resolve(
    cls: type[BaseModel], values: dict[str, object], loc: tuple[int | str, ...]
) -> tuple[KeyPath, type[BaseModel] | None, object]:
    """Turn pydantic's location into a path of keys: it also names the members of unions, which no user wrote.

    Returns:
        The path; the model that the last key belongs to; what the schema says of that key.
    """
    path: KeyPath = ()
    owner: type[BaseModel] | None = None
    schema: object = cls
    value: object = values
    is_behind_tag = False
    for step in loc:
        if _members(schema)[1] and not is_behind_tag:
            is_behind_tag = True
            continue
        model = _model(schema, value)
        if isinstance(value, dict):
            is_key = step in value or (model is not None and step in model.model_fields)
        else:
            is_key = isinstance(value, list) and isinstance(step, int)
        if not is_key:
            continue
        path, owner, is_behind_tag = (*path, step), model, False
        schema = _inner(schema, step, value)
        if isinstance(value, list) and isinstance(step, int):
            value = value[step] if step < len(value) else None
        else:
            value = value.get(step) if isinstance(value, dict) else None
    return path, owner, schema


def _merge(faults: Iterable[Fault]) -> list[Fault]:
    """Join what the members of a union expected of the same value."""
    merged: dict[KeyPath, Fault] = {}
    alone: list[Fault] = []
    for fault in faults:
        other = merged.get(fault.path)
        if not fault.expected:
            alone.append(fault)
        elif other is None:
            merged[fault.path] = fault
        elif fault.expected not in other.expected.split(" or "):
            rest = max(other.text, fault.text, key=len)
            merged[fault.path] = Fault(fault.path, f"{other.expected} or {fault.expected}", rest)
    return alone + [fault._replace(text=f"expected {fault.expected}{fault.text}") for fault in merged.values()]


def _suggest(word: str, known: Iterable[str]) -> str:
    """Name the known word that is nearest, if any is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def _header(path: KeyPath) -> str:
    """Write the header under which the keys of a table or of a list item stand."""
    name = ".".join(step for step in path if isinstance(step, str))
    return f"[[{name}]]" if isinstance(path[-1], int) else f"[{name}]"


def _quote(words: Sequence[str]) -> str:
    quoted = [f"'{word}'" for word in words]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)


def _shorten(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- writing --------------------------------------------------------------------------------------------------------


def _plain_table(spec: BaseModel) -> dict[str, object]:
    """Turn a spec into tables, lists and values that TOML has."""
    table = {}
    for name, field in type(spec).model_fields.items():
        value = getattr(spec, name)
        if value is not None:
            table[name] = _plain(value)
        else:
            default = field.get_default(call_default_factory=True)
            assert default is None, f"{name}: TOML cannot say None, so None has to be the default"
    return table


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        return _plain_table(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        assert None not in value, "TOML cannot say None"
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return _plain(value.value)
    return str(value) if isinstance(value, Path) else value
