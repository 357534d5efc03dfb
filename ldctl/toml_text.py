"""TOML as text: where its keys stand, what its syntax faults are in plain words, and how values are written.

The standard library parses TOML but neither writes it nor tells where a key stands; this does, and nothing more.
"""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping

KeyPath = tuple[str | int, ...]

_BARE = r"[A-Za-z0-9_-]+"
_PART = re.compile(rf"""[ \t]*({_BARE}|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')[ \t]*""")
_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
# Up to two quotes may stand right before the three that close a multi-line string.
_SCALAR = re.compile(
    r'''"""(?:[^\\]|\\.)*?""""{0,2}|\'\'\'.*?\'\'\'\'{0,2}|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'|[^,\]}#\n]+''', re.DOTALL
)


def locate(text: str) -> dict[KeyPath, int]:
    """Tell the line, from 1, of every table, key and list item in a valid TOML document: where it is first named."""
    lines: dict[KeyPath, int] = {}
    for path, line in _entries(text):
        for depth in range(1, len(path) + 1):
            lines.setdefault(path[:depth], line)
    return lines


def _entries(text: str) -> list[tuple[KeyPath, int]]:
    """List what a document's statements name, in order, each with its line; stop at what is no statement."""
    entries: list[tuple[KeyPath, int]] = []
    section: KeyPath = ()
    counts: dict[KeyPath, int] = {}
    position = _blank(text, 0)
    while position < len(text):
        if text[position] != "[":
            end = _read_pair(text, position, section, entries)
            if end == position:
                break
            position = _blank(text, end)
            continue
        line = text.count("\n", 0, position) + 1
        is_item = text.startswith("[[", position)
        parts, position = read_key(text, position + 1 + is_item)
        section = ()
        for depth, part in enumerate(parts):
            section = (*section, part)
            if is_item and depth == len(parts) - 1:
                counts[section] = counts.get(section, 0) + 1
            if section in counts:
                section = (*section, counts[section] - 1)
        if section:
            entries.append((section, line))
        position = _blank(text, position + 1 + is_item)
    return entries


def _read_pair(text: str, position: int, section: KeyPath, entries: list[tuple[KeyPath, int]]) -> int:
    """Note a key and what its value names; return where the value ends, `position` if there is no pair."""
    parts, end = read_key(text, position)
    if not parts or text[end : end + 1] != "=":
        return position
    path = (*section, *parts)
    entries.append((path, text.count("\n", 0, position) + 1))
    return _read_value(text, _blank(text, end + 1), path, entries)


def _read_value(text: str, position: int, path: KeyPath, entries: list[tuple[KeyPath, int]]) -> int:
    """Note the keys and items inside a value; return where it ends."""
    opening = text[position : position + 1]
    if opening not in ("[", "{"):
        found = _SCALAR.match(text, position)
        return found.end() if found else position
    index = 0
    position = _blank(text, position + 1)
    while position < len(text) and text[position] not in "]}":
        if opening == "[":
            entries.append(((*path, index), text.count("\n", 0, position) + 1))
            end = _read_value(text, position, (*path, index), entries)
        else:
            end = _read_pair(text, position, path, entries)
        if end == position:
            return len(text)
        position = _blank(text, end)
        if text.startswith(",", position):
            position = _blank(text, position + 1)
        index += 1
    return position + 1


def read_key(text: str, position: int) -> tuple[tuple[str, ...], int]:
    """Read a dotted key; return its parts, none if there is no key, and where it ends."""
    parts: list[str] = []
    while found := _PART.match(text, position):
        token = found[1]
        try:
            parts.append(str(tomllib.loads(f"v = {token}")["v"]) if token[0] in "\"'" else token)
        except tomllib.TOMLDecodeError:  # an escape that TOML does not know
            return (), position
        position = found.end()
        if not text.startswith(".", position):
            return tuple(parts), position
        position += 1
    return (), position


def _blank(text: str, position: int) -> int:
    """Return the position behind white space and comments."""
    found = _BLANK.match(text, position)
    assert found is not None  # it matches nothing at all, too
    return found.end()


def syntax_fault(text: str, message: str) -> str:
    """Turn the parser's message into `line:column: plain words`."""
    found = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)$", message)
    said = message[: found.start()] if found else message
    last = text.count("\n") + 1
    line, column = (int(found[1]), int(found[2])) if found and found[1] else (last, len(text.split("\n")[-1]) + 1)
    if re.search("overwrite|twice|mutate|redefine|Duplicate", said):
        entries = [(path, at) for path, at in _entries(text) if at <= line and isinstance(path[-1], str)]
        for rank, (path, at) in reversed(list(enumerate(entries))):
            first = next((before for other, before in entries[:rank] if other[: len(path)] == path), None)
            if first is not None:
                return f"{at}: {'.'.join(map(str, path))}: given twice, first in line {first}; keep one of them"
        return f"{line}:{column}: this key or section is given twice; keep one of them"
    hints = {
        "Invalid value": "not a TOML value; text goes in quotes",
        "Invalid statement": "not a [section] and not a key = value line",
        "Expected newline or end of document after a statement": "a value ends before this; text goes in quotes",
    }
    return f"{line}:{column}: {hints.get(said, said)}"


def write(table: Mapping[str, object]) -> str:
    """Write a table of tables, lists and values as a document that parses to the same."""
    return "\n".join(_lines((), table, "")).lstrip("\n") + "\n"


def _lines(path: tuple[str, ...], table: Mapping[str, object], header: str) -> Iterator[str]:
    """Write a table: its values, then its tables, then its lists of tables, as TOML has to have them."""
    groups: dict[str, object] = {}
    lines = []
    for key, value in table.items():
        if isinstance(value, dict) or (isinstance(value, list) and value and all(isinstance(v, dict) for v in value)):
            groups[key] = value
        else:
            lines.append(f"{_name(key)} = {literal(value)}")
    # A table that holds only tables needs no header of its own.
    if header and (lines or not groups or header.startswith("[[")):
        yield from ("", header)
    yield from lines
    for key, value in sorted(groups.items(), key=lambda group: isinstance(group[1], list)):
        inner = (*path, _name(key))
        if isinstance(value, dict):
            yield from _lines(inner, value, f"[{'.'.join(inner)}]")
        elif isinstance(value, list):
            for item in value:
                yield from _lines(inner, item, f"[[{'.'.join(inner)}]]")


def _name(key: str) -> str:
    return key if re.fullmatch(_BARE, key) else literal(key)


def literal(value: object) -> str:
    """Write a value on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_name(str(key))} = {literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(literal(item) for item in value)}]"
    return repr(value)
