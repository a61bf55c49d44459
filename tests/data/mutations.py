"""Strategies of hypothesis that damage the content of a file."""

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

from hypothesis import strategies as st

DEEP = "a value nested deeply"
TWICE = "\N{BLACK CIRCLE}"  # marks a key that is written as another key once more
VALUES = [None, True, False, -1, 0, 1, 2**31, 2**63, 2**70, 1.5, 1e308, float("nan"), DEEP]
VALUES += ["", "0", "\0", "../x", "/x", "(", "a*", "\ud800", [], [[]], [0], {}, {"a": 1}]


class Raw(bytes):
    """Bytes that a failing test prints in a few characters."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


def places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container in a JSON value, with each of its keys."""
    for key in list(content) if isinstance(content, dict) else range(len(content)):
        yield content, key
        if isinstance(content[key], dict | list):
            yield from places(content[key])


@st.composite
def damaged_json(draw: Callable, raw: bytes) -> bytes:
    """Delete, replace or repeat one value of a JSON text."""
    content = json.loads(raw)
    every = list(places(content))
    container, key = every[draw(st.integers(0, len(every) - 1))]
    others = deepcopy([container[key] for container, key in every[:50]])
    action = draw(st.sampled_from(["delete", "replace", "repeat"]))
    if action == "delete":
        del container[key]
    elif action == "replace":
        container[key] = draw(st.sampled_from(VALUES + others))
    elif isinstance(container, list):
        container.append(container[key])
    else:
        container[key + TWICE] = draw(st.sampled_from([*VALUES, container[key]]))
    text = json.dumps(content, ensure_ascii=False).replace(TWICE, "")
    nested = "[" * 100_000 + "]" * 100_000
    return text.replace(json.dumps(DEEP), nested).encode(errors="surrogatepass")


@st.composite
def damaged_bytes(draw: Callable, raw: bytes, end: int | None = None) -> bytes:
    """Truncate a file, insert a byte, or change up to three of the bytes before `end`."""
    place = st.integers(0, min(len(raw), end or len(raw)) - 1)
    action = draw(st.sampled_from(["truncate", "insert", "change", "change"]))
    if action == "truncate":
        return raw[: draw(place)]
    if action == "insert":
        i = draw(place)
        return raw[:i] + draw(st.binary(min_size=1, max_size=1)) + raw[i:]
    changed = bytearray(raw)
    for i in draw(st.lists(place, min_size=1, max_size=3)):
        changed[i] = draw(st.integers(0, 255))
    return bytes(changed)


def damaged(raw: bytes) -> st.SearchStrategy[bytes]:
    """Damage the values or the bytes of a JSON text."""
    return st.one_of(damaged_json(raw), damaged_json(raw), damaged_bytes(raw))
