"""The 113 binary text data sets of sae-probes, read without that package's code or its dependencies.

Enters: the data files its wheel ships (0.4.2: zstd-compressed CSV, `prompt` and `target` columns; MIT licence).
Leaves: plain texts and labels, and the split its "normal" setting makes (run_sae_evals.py, utils_data.py): of the first
5000 rows, min(rows − 100, 1024) train and rows − train − 1 test, half of each positive (rounded up), drawn without
replacement from one MT19937 stream: train positives, train negatives, test positives, test negatives, two shuffles.

pyarrow decompresses (`cosae[lm]`); neither pandas, scikit-learn nor xgboost is needed.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cosae.errors import CosaeError
from cosae.io.fetched.packages import fetched

PACKAGE = "sae_probes"
MASTER = "probing_datasets_MASTER.csv.zst"
TRAIN_ROWS, TEST_ROWS, USED_ROWS = 1024, 100, 5000
LARGEST_FILE = 1 << 30
"""Bytes a data file may decompress to: the wheel's largest stays far below."""

Rows = NDArray[np.int64]


class ProbeDataset(NamedTuple):
    """One question about texts. `labels` (N,) int64 are 0 and 1, in sorted order of the file's two targets."""

    name: str
    texts: list[str]
    labels: NDArray[np.int64]


def data_folder(path: str | os.PathLike[str] | None = None) -> Path:
    """The folder with `cleaned_data/`: `path` itself, its `data/`, that of the installed package, never imported, or
    what `cosae fetch sae-probes` brought.

    Raises CosaeError where there is none.
    """
    if path is not None:
        given = Path(path)
        for folder in (given, given / "data", given / PACKAGE / "data"):
            if (folder / MASTER).is_file():
                return folder
        raise CosaeError(f"path must be sae-probes' data folder (its wheel's), with {MASTER} in it. Got {given}.")
    spec = importlib.util.find_spec(PACKAGE)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / "data" / MASTER).is_file():
            return Path(place) / "data"
    return fetched("sae-probes")


def names(path: str | os.PathLike[str] | None = None) -> list[str]:
    """The numbered names of the binary data sets, in the order of the master list: `5_hist_fig_ismale` …"""
    return list(_files(data_folder(path)))


def datasets(
    path: str | os.PathLike[str] | None = None, only: Iterable[str] | None = None, n_rows: int | None = None
) -> list[ProbeDataset]:
    """Texts and labels of the binary data sets.

    path    folder of the data; None finds the installed sae-probes package without importing it
    only    names to read, in this order; all by default
    n_rows  read at most the first n_rows of each

    Raises CosaeError where the data are absent, a name is unknown or a file is damaged.
    """
    folder = data_folder(path)
    files = _files(folder)
    wanted = list(files) if only is None else [only] if isinstance(only, str) else list(only)
    if unknown := [name for name in wanted if name not in files]:
        some = ", ".join(list(files)[:3])
        raise CosaeError(
            f"only must name data sets of sae-probes, as {some}. Got {unknown[0]!r}: names() lists all {len(files)}."
        )
    return [_dataset(name, folder / files[name], n_rows) for name in wanted]


def split(labels: NDArray[np.int64], n_train: int | None = None, seed: int = 42) -> tuple[Rows, Rows]:
    """Rows for training and for testing, (n_train,) and (n_test,) int64: sae-probes' "normal" setting.

    labels   (N,) of 0 and 1, in the order of the file; rows after the first 5000 are never used
    n_train  default min(N − 100, 1024)

    Raises CosaeError for labels that are not 0 and 1, and where a class has too few rows.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.isin(labels, (0, 1)).all():
        raise CosaeError(f"labels must be a vector of 0 and 1. Got shape {labels.shape} of {labels.dtype} instead.")
    n_train = min(len(labels) - TEST_ROWS, TRAIN_ROWS) if n_train is None else n_train
    labels = labels[:USED_ROWS]
    n_test = len(labels) - n_train - 1
    positives, negatives = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    need_positive, need_negative = -(-n_train // 2) + -(-n_test // 2), n_train // 2 + n_test // 2
    if n_train < 2 or n_test < 2 or len(positives) < need_positive or len(negatives) < need_negative:
        needs, got = f"{need_positive} positive and {need_negative} negative", f"{len(positives)} and {len(negatives)}"
        raise CosaeError(f"a split of {n_train} + {n_test} rows needs {needs} labels. Got {got}: change n_train.")
    stream = np.random.RandomState(seed)  # the generator that sae-probes' splits come from
    sides: list[list[Rows]] = []
    for n in (n_train, n_test):
        sizes = ((positives, -(-n // 2)), (negatives, n // 2))
        drawn = [stream.choice(rows, size, replace=False) for rows, size in sizes]
        positives, negatives = np.setdiff1d(positives, drawn[0]), np.setdiff1d(negatives, drawn[1])
        sides.append(drawn)
    train, test = (stream.permutation(np.concatenate(side)) for side in sides)
    return train, test


def _files(folder: Path) -> dict[str, str]:
    binary = [row for row in _rows(folder / MASTER) if row.get("Data type") == "Binary Classification"]
    saved = [row["Dataset save name"] for row in binary]
    files = {Path(name).name.removesuffix(".csv"): f"{name}.zst" for name in saved}
    outside = [name for name in files.values() if Path(name).is_absolute() or ".." in Path(name).parts]
    if not files or outside:
        raise CosaeError(f"{folder / MASTER} is not sae-probes' list of data sets: unpack the wheel again.")
    return files


def _dataset(name: str, file: Path, n_rows: int | None) -> ProbeDataset:
    rows = _rows(file)
    if not rows or not {"prompt", "target"} <= set(rows[0]) or any(row["target"] is None for row in rows):
        raise CosaeError(f"{file} must have rows with the columns prompt and target: unpack the wheel again.")
    targets = [row["target"] for row in rows]
    try:  # numbers by size, anything else as text: how the labels of a parsed column sort
        kinds = sorted(set(targets), key=float)
    except ValueError:
        kinds = sorted(set(targets))
    if len(kinds) != 2:
        raise CosaeError(f"{file} must have two targets. Got {len(kinds)} instead: unpack the wheel again.")
    labels = np.array([kinds.index(target) for target in targets], dtype=np.int64)
    return ProbeDataset(name, [row["prompt"] for row in rows][:n_rows], labels[:n_rows])


def _rows(file: Path) -> list[dict[str, str]]:
    """Rows of a zstd-compressed CSV. Raises CosaeError for a missing or damaged file, and one that is too large."""
    try:
        import pyarrow
    except ImportError:
        raise CosaeError("reading sae-probes' data needs pyarrow: pip install 'cosae[lm]'.") from None
    if not file.is_file():
        raise CosaeError(f"{file} is missing: unpack the sae-probes wheel again.")
    limit = csv.field_size_limit(LARGEST_FILE)
    try:
        with pyarrow.input_stream(str(file), compression="zstd") as stream:
            content = stream.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise CosaeError(f"{file} decompresses to more than {LARGEST_FILE} bytes: it is no data set of sae-probes.")
        return list(csv.DictReader(io.StringIO(content.decode("utf-8"), newline="")))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CosaeError(f"{file} cannot be read ({error}): unpack the sae-probes wheel again.") from None
    finally:
        csv.field_size_limit(limit)
