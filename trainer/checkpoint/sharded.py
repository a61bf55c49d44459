"""Write and read the tensors of a checkpoint in shards with torch.distributed.checkpoint.

Every process writes the parts that it holds and reads the parts that it needs. The index is a
pickle; it is read by an unpickler that runs no code.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from trainer.checkpoint.schema import CheckpointError

# A single process saves without torch.distributed. Set once: threads may not change the filters.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")
FOLDER = "shards"  # inside the checkpoint's folder
PLACEHOLDER = "tensor in shards: "  # followed by a tensor's key, replaces the tensor in a tree
INDEX = ".metadata"
CHUNK_FILE = re.compile(r"__\d+_\d+\.distcp")
ALLOWED = {  # module -> the names that an index may use
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata"),
        *("ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch": (
        "Size",
        "float16",
        "bfloat16",
        "float32",
        "float64",
        "int8",
        "uint8",
        "int32",
        "int64",
        "bool",
    ),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("Path", "PosixPath"),
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a folder of shards that has not been read yet."""

    folder: Path
    key: str
    shape: torch.Size
    dtype: torch.dtype
    index: Any = field(repr=False, compare=False)  # of all tensors in the folder

    def read(self, like: Any = None) -> Tensor:
        """Read the full tensor on the CPU, or only this process's part if `like` is a DTensor.

        Raises CheckpointError if it cannot be read.
        """
        from torch.distributed.checkpoint.state_dict_loader import load

        if hasattr(like, "placements"):
            target = torch.empty_like(like, dtype=self.dtype)
        else:
            target = torch.empty(self.shape, dtype=self.dtype)
        try:
            with _torch_errors_as_oserror():
                reader = _reader(self.folder, self.index)
                load({self.key: target}, storage_reader=reader, no_dist=True)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: {self.key} cannot be read ({error})") from error
        return target


def copy_to_cpu(tree: Any) -> Any:
    """Copy the tensors in nested dicts and lists; a process copies only what it holds."""
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
    )
    stage: Any = stager.stage
    try:
        return tree_map_only(Tensor, lambda x: x if x.is_meta else stage({"": x})[""], tree)
    finally:
        stager.close()


def write(folder: Path, tree: Any, *, is_alone: bool, group: Any = None) -> Any:
    """Write the tensors in nested dicts and lists; return the tree with placeholders for them.

    All processes must call this together, unless a single process `is_alone`. They communicate in
    the process group `group`, by default that of all processes. Raises OSError in all of them if
    one cannot write.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    tensors: dict[str, Tensor] = {}
    tree = _replace_tensors(tree, "", tensors)
    with _torch_errors_as_oserror():
        writer = FileSystemWriter(folder)
        save(tensors, storage_writer=writer, process_group=group, no_dist=is_alone)
    return tree


def check_complete(folder: Path) -> None:
    """Raise OSError if the index, or a file named in it, is not in the folder."""
    try:
        names = {entry.relative_path for entry in _unpickled(folder).storage_data.values()}
    except ValueError as error:
        raise OSError(str(error)) from error
    if absent := sorted(name for name in names if not (folder / name).is_file()):
        raise OSError(
            f"{', '.join(absent)} of other processes is not in {folder}; "
            "out_dir must be a folder that all processes share"
        )


def stored(folder: Path, tree: Any) -> Any:
    """Return the tree with a `StoredTensor` for every placeholder.

    Raises ValueError if the index is damaged or lacks a tensor.
    """
    index = _index(folder)

    def restore(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {key: restore(value) for key, value in tree.items()}
        if isinstance(tree, list):
            return [restore(value) for value in tree]
        if not (isinstance(tree, str) and tree.startswith(PLACEHOLDER)):
            return tree
        key = tree.removeprefix(PLACEHOLDER)
        if key not in index.state_dict_metadata:
            raise ValueError(f"{folder / INDEX} has no tensor {key}")
        entry = index.state_dict_metadata[key]
        return StoredTensor(folder, key, entry.size, entry.properties.dtype, index)

    return restore(tree)


def read_all(tree: Any) -> Any:
    """Return the tree with every `StoredTensor` read in full."""
    if isinstance(tree, StoredTensor):
        return tree.read()
    if isinstance(tree, dict):
        return {key: read_all(value) for key, value in tree.items()}
    return [read_all(value) for value in tree] if isinstance(tree, list) else tree


def _replace_tensors(tree: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    """Return the tree with placeholders for its tensors, which are added to `tensors`."""
    if isinstance(tree, Tensor):
        if not tree.is_meta:  # else another process holds it
            tensors[key] = tree.detach()
        return PLACEHOLDER + key
    if isinstance(tree, dict):
        return {k: _replace_tensors(value, f"{key}/{k}", tensors) for k, value in tree.items()}
    if isinstance(tree, list):
        return [_replace_tensors(value, f"{key}/{i}", tensors) for i, value in enumerate(tree)]
    return tree


class _Unpickler(pickle.Unpickler):
    """Load plain data and the classes in `ALLOWED`; refuse everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise ValueError(f"{INDEX} refused: it uses {module}.{name}, which no index needs")


def _unpickled(folder: Path) -> Any:
    try:
        return _Unpickler(io.BytesIO((folder / INDEX).read_bytes())).load()
    except Exception as error:  # an unpickler raises many types
        raise ValueError(f"{folder / INDEX}: {error}") from error


def _index(folder: Path) -> Any:
    """Return the index. Raises ValueError unless every tensor lies in the files completely."""
    index = _unpickled(folder)
    try:
        for key, entry in index.state_dict_metadata.items():
            _check_entry(folder, key, entry, index.storage_data)
    except (AttributeError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"{folder / INDEX}: it is not an index ({error!r})") from error
    return index


def _check_entry(folder: Path, key: str, entry: Any, storage: dict[Any, Any]) -> None:
    """Raise ValueError unless the chunks of a tensor follow one another and are in the files."""
    from torch.distributed.checkpoint.metadata import MetadataIndex

    shape, dtype = tuple(entry.size), entry.properties.dtype
    if not isinstance(dtype, torch.dtype) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{folder / INDEX}: {key} is {dtype} of shape {shape}")
    end = 0
    for chunk in sorted(entry.chunks, key=lambda chunk: (*chunk.offsets, *chunk.sizes)):
        offset, size = tuple(chunk.offsets), tuple(chunk.sizes)
        place = storage[MetadataIndex(key, chunk.offsets)]
        needed = math.prod(size) * dtype.itemsize
        is_whole = (offset, size[1:]) == ((end, *[0] * (len(shape) - 1))[: len(shape)], shape[1:])
        is_stored = CHUNK_FILE.fullmatch(place.relative_path) and place.offset >= 0
        last = place.offset + place.length
        if not (is_whole and is_stored and place.length >= needed) or (
            last > (folder / place.relative_path).stat().st_size
        ):
            raise ValueError(f"{folder / INDEX}: rows {end} ... of {key} are not in the files")
        end += size[0] if size else 1
    if end != (shape[0] if shape else 1):
        raise ValueError(f"{folder / INDEX}: rows {end} ... of {key} are not in the files")


@contextmanager
def _torch_errors_as_oserror() -> Iterator[None]:
    """Raise torch's CheckpointException, a BaseException, as an OSError."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        causes = [f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items()]
        raise OSError("; ".join(causes)) from error


def _reader(folder: Path, index: Any) -> Any:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return index

    return Reader(folder)
