"""Every way a small text file of a checkpoint goes wrong: field by field, and as a whole.

A mutation is the file's new bytes. Fields are found in the file itself, so that a new one is
mutated too.
"""

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Path = tuple[str | int, ...]
"""Where a value lies in a JSON document: keys and indices from the outside in."""

TWICE = "\0twice"
"""Stands for a key that is there already, until the document is text."""


@dataclass(frozen=True)
class Mutation:
    """A file's changed content, and what was done to it, for the test's messages."""

    name: str
    content: bytes


def _delete(parent: Any, key: Any) -> None:
    del parent[key]


def _twice(parent: Any, key: Any) -> None:
    if isinstance(parent, dict):
        parent[TWICE + str(key)] = _another(parent[key])
    else:
        parent.insert(key, parent[key])


def _set(change: Callable[[Any], Any]) -> Callable[[Any, Any], None]:
    def mutate(parent: Any, key: Any) -> None:
        parent[key] = change(parent[key])

    return mutate


def _wrong_type(value: Any) -> Any:
    return 3 if isinstance(value, str | list | dict) else str(value)


def _another(value: Any) -> Any:
    """A value of the same kind that is not this one: what an honest edit would look like."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            return value + "x"
        case list():
            return [*value, *value[-1:]] or [1]
        case dict():
            return value | {"more": 1}
        case _:
            return 1


def _like(value: Any, number: int) -> int | float:
    return float(number) if isinstance(value, float) else number


KINDS: dict[str, Callable[[Any, Any], None]] = {
    "another": _set(_another),
    "deleted": _delete,
    "twice": _twice,
    "null": _set(lambda _: None),
    "wrong type": _set(_wrong_type),
    "negative": _set(lambda value: _like(value, -1)),
    "zero": _set(lambda value: _like(value, 0)),
    "half": _set(lambda _: 0.5),
    "huge": _set(lambda value: _like(value, 10**12)),
    "beyond 64 bits": _set(lambda value: _like(value, 10**30)),
    "true": _set(lambda _: True),
    "NaN": _set(lambda _: float("nan")),
    "infinite": _set(lambda _: float("inf")),
    "empty text": _set(lambda _: ""),
    "empty list": _set(lambda _: []),
    "empty object": _set(lambda _: {}),
    "nested junk": _set(lambda _: {"a": [None, {"b": [[-1]]}], "": {"": 1.5}}),
    "list of junk": _set(lambda _: ["x", None, {}]),
    "unicode": _set(lambda _: "µ\u202e\N{SNOWMAN}\0\n"),
    "lone surrogate": _set(lambda _: "\ud800"),
}
"""What can happen to one field, as a change of its parent under its key."""

FILES: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[: len(content) * 2 // 3],
    "empty": lambda _: b"",
    "not UTF-8": lambda content: content.replace(b'"', b'"\xe9', 1),
    "UTF-16": lambda content: content.decode().encode("utf-16"),
    "with a mark": lambda content: b"\xef\xbb\xbf" + content,
    "not JSON": lambda _: b"{model: [\t}",
    "a list": lambda content: b"[" + content + b"]",
    "null": lambda _: b"null",
    "a number": lambda _: b"9" * 5000,
    "bottomless": lambda _: b'{"a":' * 100_000,
    "zeros": lambda content: bytes(len(content)),
}
"""What can happen to a whole file."""


def fields(document: Any, path: Path = ()) -> Iterator[Path]:
    """Every field of a JSON document, of long lists the first and the last item."""
    if isinstance(document, dict):
        keys: list[Any] = list(document)
    elif isinstance(document, list):
        keys = sorted({0, len(document) - 1}) if document else []
    else:
        return
    for key in keys:
        yield (*path, key)
        yield from fields(document[key], (*path, key))


def mutated_field(document: Any, path: Path, kind: str) -> Mutation:
    """The JSON document with one field changed."""
    changed = parent = copy.deepcopy(document)
    for key in path[:-1]:
        parent = parent[key]
    KINDS[kind](parent, path[-1])
    text = json.dumps(changed).replace(json.dumps(TWICE)[:-1], '"')
    return Mutation(f"{'.'.join(map(str, path))}: {kind}", text.encode())


def mutated_files(content: bytes) -> Iterator[Mutation]:
    """The file damaged as a whole, in every way that changes it."""
    for kind, change in FILES.items():
        if (changed := change(content)) != content:
            yield Mutation(kind, changed)


def mutated_fields(document: Any, draw: random.Random, count: int) -> Iterator[Mutation]:
    """Every field of a JSON document changed in `count` ways that `draw` chooses for it."""
    for path in fields(document):
        for kind in draw.sample(list(KINDS), count):
            mutation = mutated_field(document, path, kind)
            if mutation.content != json.dumps(document).encode():
                yield mutation


def mutated_headers(content: bytes, draw: random.Random, count: int) -> Iterator[Mutation]:
    """A safetensors file with its header changed: the first tensor's, the last's, and the whole."""
    size = int.from_bytes(content[:8], "little")
    header, weights = json.loads(content[8 : 8 + size]), content[8 + size :]
    names = list(header)
    other = {key: header[key] for key in names[2:-1]}
    some = {key: header[key] for key in (*names[:2], names[-1])}
    for mutation in mutated_fields(some, draw, count):
        text = mutation.content[:-1] + b", " + json.dumps(other)[1:].encode()
        yield Mutation(mutation.name, len(text).to_bytes(8, "little") + text + weights)
    for mutation in mutated_files(content[8 : 8 + size]):
        yield Mutation(
            f"header {mutation.name}",
            len(mutation.content).to_bytes(8, "little") + mutation.content + weights,
        )
    for length in (0, 1, size - 1, size + 1, len(content), 2**63):
        yield Mutation(f"header of {length} bytes", length.to_bytes(8, "little") + content[8:])
