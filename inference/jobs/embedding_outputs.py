"""Files of embeddings: Parquet, NumPy's .npz, and .h5ad of anndata, each written row by row."""

import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ...support.errors import MissingExtraError
from .record import record_json
from .tables import check_table_output, write_table

SUFFIXES = (".parquet", ".npz", ".h5ad")
MOST_ROWS_OF_H5AD = 10_000_000  # whose names, places and strands are held in memory, by anndata as well

_COLUMNS = {"name": pa.string(), "start": pa.int64(), "end": pa.int64(), "strand": pa.string()}


def embedding_schema(width: int) -> pa.Schema:
    """Columns of embeddings of so many numbers."""
    return pa.schema([*_COLUMNS.items(), ("embedding", pa.list_(pa.float32(), width))])


def embedding_table(columns: dict[str, Any], vectors: np.ndarray) -> pa.Table:
    """Rows with a vector each.

    Args:
        columns: `name`, `start`, `end` and `strand` of each.
        vectors: (rows, hidden) float32.
    """
    width = vectors.shape[1]
    arrays = [pa.array(columns[name], kind) for name, kind in _COLUMNS.items()]
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    return pa.Table.from_arrays(
        [*arrays, pa.FixedSizeListArray.from_arrays(flat, width)], schema=embedding_schema(width)
    )


def vectors_of(table: pa.Table) -> np.ndarray:
    """The vectors of a table of embeddings, (rows, hidden) float32."""
    column = table.column("embedding")
    flat = [chunk.flatten().to_numpy() for chunk in column.chunks]
    return np.concatenate([np.empty(0, np.float32), *flat]).reshape(len(column), column.type.list_size)


def check_embedding_output(output: Path) -> None:
    """Refuse an output of another kind, or of one whose library is missing.

    Raises:
        ValueError: for another ending.
        MissingExtraError: for `.h5ad` without anndata.
    """
    check_table_output(output, SUFFIXES)
    if output.suffix == ".h5ad":
        _anndata()


def write_embeddings(tables: Iterable[pa.Table], output: Path, record: dict[str, Any], width: int) -> None:
    """Write rows of embeddings to a file whose name says its format.

    Args:
        tables: the rows, in pieces; every loop over them reads them again.
        output: the file.
        record: of the run.
        width: numbers of a vector, if there are no rows.
    """
    schema = next((table.schema for table in tables), embedding_schema(width))
    if output.suffix == ".parquet":
        write_table(tables, output, record, schema)
    elif output.suffix == ".npz":
        _write_npz(tables, output, record, schema)
    else:
        _write_h5ad(tables, output, record, schema)


def _write_npz(tables: Iterable[pa.Table], output: Path, record: dict[str, Any], schema: pa.Schema) -> None:
    """Arrays `name`, `start`, `end`, `strand`, `embedding` (rows, hidden) and `record`, JSON; no pickle."""
    rows, longest = 0, 1
    for table in tables:
        rows += table.num_rows
        longest = max([longest, *map(len, table.column("name").unique().to_pylist())])
    kinds = {"name": f"<U{longest}", "start": "<i8", "end": "<i8", "strand": "<U1"}
    with zipfile.ZipFile(output, "w") as archive:
        for name, kind in kinds.items():
            blocks = (np.array(table.column(name).to_pylist(), dtype=kind) for table in tables)
            _write_array(archive, name, (rows,), np.dtype(kind), blocks)
        shape = (rows, schema.field("embedding").type.list_size)
        _write_array(archive, "embedding", shape, np.dtype("<f4"), map(vectors_of, tables))
        text = np.array(record_json(record))
        _write_array(archive, "record", (), text.dtype, [text])


def _write_array(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], kind: np.dtype, blocks: Iterable[np.ndarray]
) -> None:
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
        header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block).tobytes())


def _write_h5ad(tables: Iterable[pa.Table], output: Path, record: dict[str, Any], schema: pa.Schema) -> None:
    """`X` (rows, hidden), `obs` with name, start, end and strand, and the record as JSON in `uns`."""
    import h5py
    import pandas as pd

    anndata = _anndata()
    width = schema.field("embedding").type.list_size
    small = [table.select(list(_COLUMNS)) for table in tables]
    rows = pa.concat_tables(small) if small else schema.empty_table().select(list(_COLUMNS))
    frame = rows.to_pandas()
    places = frame["name"] + ":" + frame["start"].astype(str) + "-" + frame["end"].astype(str) + frame["strand"]
    frame.index = pd.Index(anndata.utils.make_index_unique(pd.Index(places.astype(str))))
    frame["strand"] = pd.Categorical(frame["strand"], categories=["+", "-", "."])
    described = anndata.AnnData(
        obs=frame, var=pd.DataFrame(index=[str(i) for i in range(width)]), uns={"gengram": record_json(record)}
    )
    with h5py.File(output, "w") as file:
        anndata.io.write_elem(file, "/", described)
        _write_matrix(file, "X", (len(frame), width), map(vectors_of, tables))


def _write_matrix(file: Any, name: str, shape: tuple[int, int], blocks: Iterator[np.ndarray]) -> None:
    """A dense matrix as anndata stores it (https://anndata.readthedocs.io, "On-disk format")."""
    matrix = file.create_dataset(name, shape, dtype="<f4")
    matrix.attrs["encoding-type"], matrix.attrs["encoding-version"] = "array", "0.2.0"
    start = 0
    for block in blocks:
        matrix[start : start + len(block)] = block
        start += len(block)


def _anndata() -> Any:
    try:
        import anndata
    except ImportError as error:
        raise MissingExtraError("an .h5ad file needs anndata: pip install 'gengram[genomics]'") from error
    return anndata
