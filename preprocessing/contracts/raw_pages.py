"""Where the values of a column lie in a Parquet file, one after the other: there to be mapped, or cut out, undecoded.

They do where a required column is one uncompressed page of plain values, as `schemas.TENSOR_WRITER` has it written:
then they reach to the end of the column's chunk. How many pages a chunk has no footer says, hence the look at the first
page's own header: it must hold all the values.
"""

from dataclasses import dataclass
from typing import Final

import pyarrow.parquet as pq

MAX_HEADER_BYTES: Final = 1 << 12
"""Of a page; a longer one would hold statistics of long values, and such a page counts as having no raw values."""

_I32: Final = b"\x15"  # the next field, an i32
_DATA_PAGE: Final = {3: b"\x2c", 4: b"\x1c"}  # field 5, a struct: behind field 3, or behind field 4, the checksum


@dataclass(frozen=True)
class ColumnChunk:
    """A column that may be one page of raw values: its footer does not speak against it.

    Attributes:
        begin: Where in the file it begins, with the header of its first page.
        end: Where it ends.
        num_values: One a row of the file.
    """

    begin: int
    end: int
    num_values: int

    def values_begin(self, head: bytes) -> int | None:
        """Where in the file the values begin; from there they reach to `end`. None where there are several pages.

        Args:
            head: What lies in the file from `begin` on: `MAX_HEADER_BYTES`, or the whole chunk where it is shorter.
        """
        num_bytes, num_values = _page(head)
        is_only = num_values == self.num_values and 0 < self.end - self.begin - num_bytes <= MAX_HEADER_BYTES
        return self.end - num_bytes if is_only else None


def find_chunk(metadata: pq.FileMetaData, name: str) -> ColumnChunk | None:
    """A column's chunk; None where it has another layout, or several chunks, or no values.

    Args:
        metadata: The file's.
        name: The column's.
    """
    places = [place for place in range(metadata.num_columns) if metadata.schema.column(place).path == name]
    if len(places) != 1 or metadata.num_row_groups != 1 or metadata.num_rows == 0:
        return None
    column, chunk = metadata.schema.column(places[0]), metadata.row_group(0).column(places[0])
    if column.max_definition_level or column.max_repetition_level or not set(chunk.encodings) <= {"PLAIN", "RLE"}:
        return None
    if chunk.compression != "UNCOMPRESSED" or chunk.has_dictionary_page:
        return None
    begin, end = chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size
    return ColumnChunk(begin, end, metadata.num_rows) if 0 <= begin < end else None


def _page(head: bytes) -> tuple[int, int]:
    """The bytes behind the header of a page of data, and its values; (0, 0) where it is another page, or compressed.

    By the header's first fields, in Thrift's compact form: kind, size, compressed size, perhaps a checksum; and the
    first of the struct behind them, which is the number of values.

    Source: apache/parquet-format `parquet.thrift`, `PageHeader`; apache/thrift `thrift-compact-protocol.md`.
    """
    numbers, at = [], 0
    while head[at : at + 1] == _I32:
        number, at = _i32(head, at + 1)
        numbers.append(number)
    if head[at : at + 2] != _DATA_PAGE.get(len(numbers), b"") + _I32:
        return 0, 0
    kind, size, compressed_size = numbers[:3]
    return (size, _i32(head, at + 2)[0]) if kind == 0 and size == compressed_size else (0, 0)


def _i32(data: bytes, at: int) -> tuple[int, int]:
    """A number, seven bits a byte and zigzag, and where it ends."""
    shift = number = 0
    while at < len(data):
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            break
    return (number >> 1) ^ -(number & 1), at
