"""Tensors of a checkpoint in shards: every process writes what it holds and reads what it needs.

torch.distributed.checkpoint does it; its index is a pickle, which is read without running code.
"""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = "shards"  # in a checkpoint's folder
MARK = "tensor in shards: "  # stands where a tensor was
INDEX = ".metadata"
ALLOWED = {  # what an index is made of
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata"),
        *("ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": ("Size", "float16", "bfloat16", "float32", "float64", "int32", "int64", "bool"),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("Path", "PosixPath"),
}


@dataclass(frozen=True)
class Stored:
    """A tensor in a folder of shards, not read yet."""

    folder: Path
    key: str
    shape: torch.Size
    dtype: torch.dtype

    def read(self, like: Any = None) -> Tensor:
        """All of it, on the CPU; or what belongs where `like`, a DTensor, lies.

        Raises OSError if it cannot be read.
        """
        from torch.distributed.checkpoint.state_dict_loader import load

        if hasattr(like, "placements"):
            target = torch.empty_like(like, dtype=self.dtype)
        else:
            target = torch.empty(self.shape, dtype=self.dtype)
        with _torchs_own():
            load({self.key: target}, storage_reader=_reader(self.folder), no_dist=True)
        return target


def write(folder: Path, tree: Any, *, is_alone: bool) -> Any:
    """Write all tensors of nested dicts and lists; returns the tree with marks in their places.

    All processes call this together, unless one `is_alone`. Raises OSError in all of them if one
    cannot write.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    tensors: dict[str, Tensor] = {}
    marked = _split(tree, "", tensors)
    with _torchs_own():
        save(tensors, storage_writer=FileSystemWriter(folder), no_dist=is_alone)
    return marked


def check_complete(folder: Path) -> None:
    """OSError if a file that the index names is not in the folder."""
    names = {entry.relative_path for entry in _index(folder).storage_data.values()}
    if absent := sorted(name for name in names if not (folder / name).is_file()):
        raise OSError(
            f"{', '.join(absent)} of other processes is not in {folder}; "
            "out_dir must be a folder that all of them share"
        )


def stored(folder: Path, marked: Any) -> Any:
    """The tree with a `Stored` at every mark. ValueError: the index is none, or lacks a tensor."""
    index = _index(folder)

    def restore(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: restore(value) for key, value in tree.items()}
        if isinstance(tree, list):
            return [restore(value) for value in tree]
        if not (isinstance(tree, str) and tree.startswith(MARK)):
            return tree
        key = tree.removeprefix(MARK)
        if key not in index.state_dict_metadata:
            raise ValueError(f"{folder / INDEX} does not know {key}")
        entry = index.state_dict_metadata[key]
        return Stored(folder, key, entry.size, entry.properties.dtype)

    return restore(marked)


def read_all(tree: Any) -> Any:
    """The tree with every `Stored` read, whole."""
    if isinstance(tree, Stored):
        return tree.read()
    if isinstance(tree, dict):
        return {key: read_all(value) for key, value in tree.items()}
    return [read_all(value) for value in tree] if isinstance(tree, list) else tree


def _split(tree: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        tensors[key] = tree.detach()
        return MARK + key
    if isinstance(tree, dict):
        return {name: _split(value, f"{key}/{name}", tensors) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_split(value, f"{key}/{i}", tensors) for i, value in enumerate(tree)]
    return tree


class _Unpickler(pickle.Unpickler):
    """Loads plain data and the classes of the index; runs nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise ValueError(f"{INDEX} asks for {module}.{name}, which no index needs: refused")


def _index(folder: Path) -> Any:
    try:
        return _Unpickler(io.BytesIO((folder / INDEX).read_bytes())).load()
    except (OSError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{folder / INDEX}: {error}") from error


@contextmanager
def _torchs_own() -> Iterator[None]:
    """OSError for torch's error, which is no Exception; no word that it works alone, as told to."""
    from torch.distributed.checkpoint.api import CheckpointException

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            causes = [f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items()]
            raise OSError("; ".join(causes)) from error


def _reader(folder: Path) -> Any:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return _index(folder)

    return Reader(folder)
