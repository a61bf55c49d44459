"""Share the work on matrices between processes: each matrix is computed whole by one process.

That process is the owner of the matrix. Under DDP, every process stores all matrices and the
results of the owners are gathered (all_gather). Under FSDP2, every process stores some rows: the
rows are sent to the owner, and the rows of the result are sent back (all_to_all).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

from .process_group import Collective, ProcessGroup, first_row, owners, row_bounds, row_mesh_dim

Work = Callable[[list[Tensor]], list[Tensor]]  # maps matrices to new matrices of the same shapes


class Matrices:
    """The parameters (d_out, d_in) of one param group, with their layout over processes.

    Args:
        params: plain tensors or DTensors with sharded rows. A DTensor brings its own process group.
        process_group: the processes that store the same plain parameters, as under DDP, and share
            the work. If None, every process does all the work.
    """

    def __init__(self, params: list[Tensor], process_group: ProcessGroup | None) -> None:
        self.shapes = [tuple(param.shape) for param in params]  # of the whole matrices
        self.first_rows = [first_row(param) for param in params]
        self._sets: dict[Any, list[int]] = defaultdict(list)  # indices of params with one layout
        for i, param in enumerate(params):
            self._sets[_layout(param, process_group)].append(i)

    def by_owners(self, shards: list[Tensor], work: Work) -> list[Tensor]:
        """Apply `work` to the whole matrices; return the local shards of the results.

        Args:
            shards: the local rows of each matrix, which are all rows of a plain one.
            work: returns matrices of the shapes and dtypes of its input, which it may overwrite.
        """
        results = list(shards)
        for (group, is_sharded, _), indices in self._sets.items():
            compute = _by_rows if is_sharded else _by_copies
            shapes = [self.shapes[i] for i in indices]
            done = compute([shards[i] for i in indices], shapes, work, Collective(group))
            for i, result in zip(indices, done, strict=True):
                results[i] = result
        return results

    def block_norms(self, shards: list[Tensor], row_blocks: int) -> list[Tensor]:
        """Return the Frobenius norms (row_blocks,) of the equal row blocks of each whole matrix.

        Plain matrices need no communication.
        """
        results = list(shards)
        for (group, is_sharded, _), indices in self._sets.items():
            if not is_sharded:
                for i in indices:
                    results[i] = torch.linalg.vector_norm(shards[i].reshape(row_blocks, -1), dim=1)
                continue
            squares = [self._local_squares(i, shards[i], row_blocks) for i in indices]
            total = Collective(group).sum_(torch.stack(squares)).sqrt()  # (n, row_blocks)
            for i, norms in zip(indices, total, strict=True):
                results[i] = norms
        return results

    def block_of_rows(self, i: int, shard: Tensor, row_blocks: int) -> Tensor:  # (local rows,)
        """Return the index of the row block to which each row of a shard of matrix i belongs."""
        rows = torch.arange(shard.shape[0], device=shard.device) + self.first_rows[i]
        return rows // (self.shapes[i][0] // row_blocks)

    def _local_squares(self, i: int, shard: Tensor, row_blocks: int) -> Tensor:  # (row_blocks,)
        """Return the sum of squares of the local rows of each row block."""
        squares = shard.square().sum(1)
        blocks = self.block_of_rows(i, shard, row_blocks)
        return squares.new_zeros(row_blocks).index_add_(0, blocks, squares)


def _layout(param: Any, process_group: ProcessGroup | None) -> tuple[Any, bool, torch.dtype]:
    """Return the process group that shares the work, whether rows are sharded, and the dtype.

    Every replica of a sharded parameter (HSDP) does the same work.
    """
    dim = row_mesh_dim(param)
    if dim is not None:
        return param.device_mesh.get_group(dim), True, param.dtype
    return process_group, False, param.dtype


def owners_of(shapes: list[tuple[int, ...]], size: int) -> list[int]:
    """Return the rank in [0, size) of the owner that orthogonalizes each matrix."""
    return owners([_cost(shape) for shape in shapes], size)


def _cost(shape: tuple[int, ...]) -> float:
    """Return the number of multiplications of an orthogonalization, up to a factor."""
    return float(shape[0] * shape[1] * min(shape))


def _by_copies(
    matrices: list[Tensor], shapes: list[tuple[int, ...]], work: Work, collective: Collective
) -> list[Tensor]:
    """Apply `work` to plain matrices, each in its owner, and gather the results everywhere."""
    if collective.size == 1:
        return work(matrices)
    owner = owners_of(shapes, collective.size)
    owned = [_owned_by(rank, owner) for rank in range(collective.size)]
    done = work([matrices[i] for i in owned[collective.rank]])
    sizes = [sum(matrices[i].numel() for i in indices) for indices in owned]
    buffer = matrices[0].new_zeros(max(sizes))  # all_gather needs equal sizes
    buffer[: sizes[collective.rank]] = _flat(done, buffer)
    gathered = [torch.empty_like(buffer) for _ in range(collective.size)]
    distributed.all_gather(gathered, buffer, group=collective.group)
    results = list(matrices)
    for indices, size, values in zip(owned, sizes, gathered, strict=True):
        pieces = values[:size].split([matrices[i].numel() for i in indices])
        for i, piece in zip(indices, pieces, strict=True):
            results[i] = piece.view(shapes[i])
    return results


def _by_rows(
    shards: list[Tensor], shapes: list[tuple[int, ...]], work: Work, collective: Collective
) -> list[Tensor]:
    """Apply `work` to matrices with sharded rows, each in its owner; return the local rows."""
    ranks = range(collective.size)
    owner = owners_of(shapes, collective.size)
    own = _owned_by(collective.rank, owner)
    send_order = [i for rank in ranks for i in _owned_by(rank, owner)]
    to_owner = [sum(shards[i].numel() for i in _owned_by(rank, owner)) for rank in ranks]
    bounds = [row_bounds(shape[0], collective.size) for shape in shapes]
    n_rows = [[b[rank + 1] - b[rank] for b in bounds] for rank in ranks]  # [rank][matrix]
    from_rank = [[n_rows[rank][i] * shapes[i][1] for i in own] for rank in ranks]
    n_from_rank = [sum(sizes) for sizes in from_rank]

    values = _flat([shards[i] for i in send_order], shards[0])
    received = _exchange(values, to_owner, n_from_rank, collective)
    pieces = received.split([n for sizes in from_rank for n in sizes])  # by rank, then matrix
    whole = [torch.cat(pieces[k :: len(own)]).view(shapes[i]) for k, i in enumerate(own)]
    done = [
        matrix.split([n_rows[rank][i] for rank in ranks])
        for i, matrix in zip(own, work(whole), strict=True)
    ]  # [matrix][rank]
    values = _flat([rows[rank] for rank in ranks for rows in done], shards[0])
    returned = _exchange(values, n_from_rank, to_owner, collective)

    results = list(shards)
    pieces = returned.split([shards[i].numel() for i in send_order])
    for i, piece in zip(send_order, pieces, strict=True):
        results[i] = piece.view(shards[i].shape)
    return results


def _owned_by(rank: int, owner: list[int]) -> list[int]:
    """Return the indices of the matrices that `rank` owns."""
    return [i for i, owning_rank in enumerate(owner) if owning_rank == rank]


def _flat(tensors: list[Tensor], like: Tensor) -> Tensor:
    """Concatenate the elements of all tensors; an empty list gives an empty tensor."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors]) if tensors else like.new_empty(0)


def _exchange(
    values: Tensor, n_sent: list[int], n_received: list[int], collective: Collective
) -> Tensor:
    """Send n_sent[r] of the values to each process r and receive n_received[r] from it."""
    received = values.new_empty(sum(n_received))
    distributed.all_to_all_single(received, values, n_received, n_sent, group=collective.group)
    return received
