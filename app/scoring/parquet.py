"""Read a Parquet file in parts, and write one that appears once it is complete."""

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dropserve.app.errors import StartError

# Bytes of a column that are read at once.
BUFFER_BYTES = 2**18
# Rows of a row group, except the last: large ones are fast to read.
GROUP_ROWS = 8192


@contextmanager
def opened(source: Path) -> Iterator[pq.ParquetFile]:
    """Open a file for reading.

    Raises
    ------
    StartError
        If it cannot be read, or is not a Parquet file.
    """
    try:
        with pq.ParquetFile(source, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
            yield file
    except pa.ArrowInvalid as error:
        raise StartError(f"{str(source)!r} is no Parquet file: {error}") from None
    except OSError as error:
        raise failed(source, "read", error) from None


def tables(source: Path, rows: range, size: int) -> Iterator[tuple[int, pa.Table]]:
    """Read some rows of a file as tables of ``size`` rows, each with the number of its first row.

    Raises
    ------
    StartError
        As for ``opened``.
    """
    with opened(source) as file:
        # Reading starts at the row group of the first row.
        numbers: list[int] = []
        stop = at = 0
        for number in range(file.num_row_groups):
            start, stop = stop, stop + file.metadata.row_group(number).num_rows
            if start < rows.stop and stop > rows.start:
                at = at if numbers else start
                numbers.append(number)
        first, held = rows.start, []
        for batch in file.iter_batches(size, row_groups=numbers, use_threads=False):
            held.append(batch.slice(max(0, rows.start - at), rows.stop - max(at, rows.start)))
            at += len(batch)
            while sum(map(len, held)) >= size:
                table = pa.Table.from_batches(held)
                yield first, table.slice(0, size)
                first += size
                held = table.slice(size).to_batches()
            if at >= rows.stop:
                break
        if sum(map(len, held)):
            yield first, pa.Table.from_batches(held)


def check_target(source: Path, target: Path) -> Path:
    """Return the path to write, with links resolved.

    Raises
    ------
    StartError
        If it is the source, or not a file.
    """
    target = target.resolve()
    if target.exists() and not target.is_file():
        raise StartError(f"{str(target)!r} is no file")
    if target == source.resolve():
        raise StartError(f"{str(target)!r} is the file to be read, too")
    return target


def write(target: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write tables into a file, which replaces an older one once it is complete.

    Raises
    ------
    StartError
        If it cannot be written. An older file is unchanged then.
    """
    beside = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    held: list[pa.Table] = []
    try:
        with beside.open("xb") as new, pq.ParquetWriter(new, schema) as writer:
            for table in tables:
                held.append(table)
                if sum(map(len, held)) >= GROUP_ROWS:
                    writer.write_table(pa.concat_tables(held).unify_dictionaries())
                    held.clear()
            if held:
                writer.write_table(pa.concat_tables(held).unify_dictionaries())
        beside.replace(target)
    except OSError as error:
        raise failed(target, "written", error) from None
    finally:
        beside.unlink(missing_ok=True)


def failed(file: Path, what: str, error: OSError) -> StartError:
    """Return the error of a file that cannot be read or written."""
    why = os.strerror(error.errno) if error.errno else error
    return StartError(f"{str(file)!r} cannot be {what}: {why}")
