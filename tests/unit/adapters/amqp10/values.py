"""Strategies for AMQP 1.0's values, as the codec writes them."""

from __future__ import annotations

import struct
from typing import Any

from hypothesis import strategies as st

from aio_pika_batch.adapters.amqp10.codec import (
    Byte,
    Char,
    Decimal,
    Described,
    Float,
    Int,
    Short,
    Symbol,
    Timestamp,
    UByte,
    UInt,
    ULong,
    UShort,
)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
names = st.text(st.characters(codec="ascii"), max_size=30).map(Symbol)


def _signed(bits: int) -> st.SearchStrategy[int]:
    return st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) | st.integers(-130, 130)


def _unsigned(bits: int) -> st.SearchStrategy[int]:
    return st.integers(0, 2**bits - 1) | st.integers(0, 300).filter(lambda n: n < 2**bits)


kinds: list[st.SearchStrategy[Any]] = [
    st.booleans(),
    _unsigned(8).map(UByte),
    _unsigned(16).map(UShort),
    _unsigned(32).map(UInt),
    _unsigned(64).map(ULong),
    _signed(8).filter(lambda n: -128 <= n < 128).map(Byte),
    _signed(16).map(Short),
    _signed(32).map(Int),
    _signed(64),
    st.floats(),
    st.floats(width=32).map(Float),
    st.integers(0, 0x10FFFF).map(Char),
    _signed(64).map(Timestamp),
    *(st.binary(min_size=size, max_size=size).map(Decimal) for size in (4, 8, 16)),
    st.uuids(),
    st.binary(max_size=300),
    text,
    names,
]
"""Of each, the values of one type."""

_scalars = st.none() | st.one_of(kinds)


@st.composite
def _scalar(draw: st.DrawFn) -> Any:
    return draw(_scalars)


scalars = _scalar()
"""Any value of those. It has a short description, of which `values` is full."""


def _key(value: Any) -> Any:
    """What Python takes for the same key."""
    return value if value == value else struct.pack(">d", value)  # noqa: PLR0124  -- NaN


def _maps(children: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[Any, Any]]:
    entries = st.lists(
        st.tuples(names | text | scalars, children), max_size=6, unique_by=lambda e: _key(e[0])
    )
    return entries.map(dict)


def _extend(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return (
        st.lists(children, max_size=6)
        | _maps(children)
        | st.builds(Described, names | _unsigned(64).map(ULong), children)
    )


values = st.recursive(scalars, _extend, max_leaves=12)
