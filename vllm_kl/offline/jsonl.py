"""Reads ranges of files of JSON lines into Arrow tables whose columns have one type in the whole data set.

A line belongs to the range in which its first byte lies. A column whose values have no common type becomes
text, the JSON of each value; a value that cannot be what the scorer reads from its column becomes null,
with an error for its row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from types import NoneType
from typing import Any

import pyarrow as pa

from vllm_kl.offline.columns import DIALOGS, fits, is_list
from vllm_kl.offline.storage import open_file

_JSON = {b"vllm_kl": b"json"}  # metadata of the field of a column that holds JSON as text
_MAYBE_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_DEEPEST = 30  # of lists and structs in each other: Arrow 26 reads no schema of more than 64
_MISFITS = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError)

# Of each column: the types that its values have. None: a value that Arrow has no type for.
Types = dict[str, set[pa.DataType | None]]


def lines(path: str, begin: int, end: int) -> Iterator[bytes]:
    """Return the lines of a range, without empty ones."""
    with open_file(path) as stream:
        if begin:
            stream.seek(begin - 1)
            stream.readline()
        while stream.tell() < end and (line := stream.readline()):
            if line.strip():
                yield line


def parse(line: bytes) -> dict[str, Any] | str:
    """Return a line's object, or the text of its error. A column of Arrow holds what is UTF-8 only."""
    try:
        text = line.decode("utf-8-sig")
        value = json.loads(text)
        if _MAYBE_HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        return f"the line is not UTF-8 at byte {error.start}"
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        return f"the line has {half}, half of a surrogate pair: write both halves, or none"
    except (ValueError, RecursionError) as error:
        return f"the line is not JSON: {error}"
    return value if isinstance(value, dict) else f"the line is {str(value)[:60]!r}, expected a JSON object"


def types_of(path: str, begin: int, end: int, role_of: Mapping[str, str]) -> tuple[int, Types]:
    """Return the number of a range's rows, and the types of its columns.

    Args:
        path, begin, end: the range.
        role_of: for a column that the scorer reads, what it holds: a field of ``Columns``.
    """
    values: dict[str, list[Any]] = {}
    num_rows = 0
    for line in lines(path, begin, end):
        num_rows += 1
        row = parse(line)
        for name, value in row.items() if isinstance(row, dict) else ():
            values.setdefault(name, []).append(value)
    return num_rows, {name: _types(column, role_of.get(name)) for name, column in values.items()}


def _types(values: list[Any], role: str | None) -> set[pa.DataType | None]:
    found = _type(values)
    if found is not None and (role is None or fits(role, found)):
        return {found}
    return {_type([value]) for value in values}


def _type(values: list[Any]) -> pa.DataType | None:
    try:
        type_ = pa.array(values).type
    except _MISFITS:
        return None
    return type_ if all(_is_kept(value, type_) for value in values) else None


def schema_of(types: Types, role_of: Mapping[str, str]) -> pa.Schema:
    """Return the columns of a data set from the types of the values in all of its parts."""
    fields = []
    for name, found in types.items():
        usable = {one for one in found if one and name in role_of and fits(role_of[name], one)}
        usable = {one for one in usable if not pa.types.is_string(one)} or usable
        type_ = _common(usable) if usable else None
        if type_ is None:
            type_ = _common(found)
        json_field = pa.field(name, pa.string(), metadata=_JSON)
        fields.append(json_field if type_ is None else pa.field(name, type_))
    return pa.schema(fields)


def _common(types: set[pa.DataType | None]) -> pa.DataType | None:
    if None in types:
        return None
    schemas = [pa.schema([("x", one)]) for one in sorted(types, key=str)]
    try:
        type_ = pa.unify_schemas(schemas, promote_options="permissive").field("x").type
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None
    return type_ if _can_be_written(type_) else None


def _can_be_written(type_: pa.DataType, depth: int = 0) -> bool:
    """Whether a column of the type can be written: Parquet has no structs without fields."""
    inner = [type_.field(i).type for i in range(type_.num_fields)]
    if depth > _DEEPEST or (pa.types.is_struct(type_) and not inner):
        return False
    return all(_can_be_written(one, depth + 1) for one in inner)


def read(
    path: str, begin: int, end: int, num_rows: int, schema: pa.Schema, error: str, dialogs: str | None
) -> pa.Table:
    """Return the first rows of a range as a table.

    Args:
        path, begin, end, num_rows: which rows.
        schema: of the table.
        error: the name of the column of errors.
        dialogs: the column of dialogs, which are also kept as JSON in ``DIALOGS``. Arrow has one struct for
            all messages, so it adds keys, and 5 beside 2.5 in the arguments of tools becomes 5.0: a chat
            template would see that.
    """
    rows: list[dict[str, Any]] = []
    errors: list[str | None] = []
    for line in lines(path, begin, end):
        if len(rows) == num_rows:
            break
        row = parse(line)
        errors.append(row if isinstance(row, str) else None)
        rows.append({} if isinstance(row, str) else row)
    arrays = [_array(field, [row.get(field.name) for row in rows], errors) for field in schema]
    table = pa.Table.from_arrays(arrays, schema=schema)
    if dialogs is not None:
        texts = [json.dumps(row[dialogs]) if dialogs in row else None for row in rows]
        table = table.append_column(DIALOGS, pa.array(texts, pa.string()))
    return table.append_column(error, pa.array(errors, pa.string()))


def _array(field: pa.Field, values: list[Any], errors: list[str | None]) -> pa.Array:
    if field.metadata == _JSON:
        values = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    try:
        return _exact(values, field.type)
    except _MISFITS:
        pass
    fitting = []
    for i, value in enumerate(values):
        try:
            _exact([value], field.type)
            fitting.append(value)
        except _MISFITS:
            fitting.append(None)
            errors[i] = errors[i] or (
                f"column {field.name!r} holds {str(value)[:60]!r}, expected {field.type} as in other rows"
            )
    return pa.array(fitting, field.type)


def _exact(values: list[Any], type_: pa.DataType) -> pa.Array:
    """Return the values as an array; refuse what Arrow would convert."""
    if not all(_is_kept(value, type_) for value in values):
        raise pa.ArrowTypeError(f"no {type_}")
    return pa.array(values, type_)


def _is_kept(value: Any, type_: pa.DataType) -> bool:
    """Return whether Arrow (26) does not convert a value of JSON.

    It makes floats of booleans, ints of fractions, and an empty list of an empty text. An int beside floats
    may become one.
    """
    if value is None:
        return True
    if is_list(type_):
        if not isinstance(value, list):
            return False
        if pa.types.is_nested(type_.value_type):
            return all(_is_kept(one, type_.value_type) for one in value)
        return _are_kept(value, type_.value_type)
    if pa.types.is_struct(type_):
        return isinstance(value, dict) and all(_is_kept(value.get(one.name), one.type) for one in type_)
    return _are_kept([value], type_)


def _are_kept(values: list[Any], type_: pa.DataType) -> bool:
    if pa.types.is_integer(type_):
        return {*map(type, values)} <= {int, NoneType}
    if pa.types.is_floating(type_):
        return {*map(type, values)} <= {int, float, NoneType}
    return True  # Arrow refuses what has another type
