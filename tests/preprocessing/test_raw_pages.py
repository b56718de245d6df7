"""Raw values are found where they lie one after the other, and nowhere else, whatever the footer lets one believe."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.storage import open_store
from preprocessing.contracts.raw_pages import MAX_HEADER_BYTES, find_chunk
from preprocessing.contracts.schemas import TENSOR_WRITER
from preprocessing.stored_parquet import first_rows

SMALL_PAGES = {**TENSOR_WRITER, "data_page_size": 64, "write_batch_size": 1}
WIDTH = 16


def _table(num_rows: int, width: int = WIDTH, *, nullable: bool = False) -> pa.Table:
    values = np.random.default_rng(num_rows).integers(0, 256, (num_rows, width), np.uint8)
    schema = pa.schema([pa.field("before", pa.int32()), pa.field("tensor", pa.binary(width), nullable=nullable)])
    return pa.table([pa.array(range(num_rows), pa.int32()), pa.array([row.tobytes() for row in values])], schema=schema)


def _written(table: pa.Table, **writer: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **writer)
    return buffer.getvalue()


def _raw_values(data: bytes, name: str = "tensor") -> bytes | None:
    chunk = find_chunk(pq.read_metadata(io.BytesIO(data)), name)
    if chunk is None:
        return None
    begin = chunk.values_begin(data[chunk.begin : chunk.begin + MAX_HEADER_BYTES])
    return None if begin is None else data[begin : chunk.end]


@settings(deadline=None)  # a busy machine is no failure
@given(st.integers(1, 300), st.sampled_from([1, 8, 1000]), st.booleans(), st.booleans())
def test_one_page_is_its_values(num_rows: int, width: int, has_checksum: bool, has_statistics: bool) -> None:
    table = _table(num_rows, width)
    writer = {**TENSOR_WRITER, "write_page_checksum": has_checksum, "write_statistics": has_statistics}
    assert _raw_values(_written(table, **writer)) == b"".join(table.column("tensor").to_pylist())


@pytest.mark.parametrize("num_rows", [9, 20, 90])
def test_a_small_chunk_of_several_pages_is_none(num_rows: int) -> None:
    """All of its headers together are no longer than one may be: so the footer alone would let it pass."""
    data = _written(_table(num_rows), **SMALL_PAGES)
    chunk = pq.read_metadata(io.BytesIO(data)).row_group(0).column(1)
    assert 0 < chunk.total_compressed_size - num_rows * WIDTH < MAX_HEADER_BYTES
    assert find_chunk(pq.read_metadata(io.BytesIO(data)), "tensor") is not None
    assert _raw_values(data) is None
    assert _raw_values(_written(_table(num_rows), **TENSOR_WRITER)) is not None


def test_what_it_holds_is_read_all_the_same(tmp_path: Path) -> None:
    store, table = open_store(str(tmp_path)), _table(20)
    store.put("datasets/pages.parquet", _written(table, **SMALL_PAGES))
    found = first_rows(store, "datasets/pages.parquet", 15, ["tensor"])
    assert found.to_pylist() == table.slice(0, 15).select(["tensor"]).to_pylist()


@pytest.mark.parametrize(
    "writer",
    [
        {"compression": "snappy"},
        {"use_dictionary": True},
        {"row_group_size": 5},
        {"data_page_version": "2.0"},
        {"column_encoding": {"tensor": "BYTE_STREAM_SPLIT"}},
    ],
)
def test_another_layout_is_none(writer: dict[str, Any]) -> None:
    assert _raw_values(_written(_table(20), **{**TENSOR_WRITER, **writer})) is None


def test_nulls_nesting_nothing_and_no_such_column_are_none() -> None:
    assert _raw_values(_written(_table(20, nullable=True), **TENSOR_WRITER)) is None
    assert _raw_values(_written(_table(0), **TENSOR_WRITER)) is None
    assert _raw_values(_written(_table(20), **TENSOR_WRITER), "nothing") is None
    nested = pa.table({"tensor": pa.array([{"x": 1}], pa.struct([pa.field("x", pa.int32(), nullable=False)]))})
    assert _raw_values(_written(nested, **TENSOR_WRITER)) is None


@settings(deadline=None)  # as above
@given(st.binary(max_size=64))
def test_what_is_no_header_is_none(head: bytes) -> None:
    chunk = find_chunk(pq.read_metadata(io.BytesIO(_written(_table(300), **TENSOR_WRITER))), "tensor")
    assert chunk is not None
    assert chunk.values_begin(head) is None
