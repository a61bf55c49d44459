"""Share the work on matrices between processes: each matrix is computed whole by one process.

That process is the owner of the matrix. Under DDP, every process stores all matrices and the
results of the owners are gathered (all_gather). Under FSDP2, every process stores some rows: the
rows are sent to the owner, and the rows of the result are sent back (all_to_all).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from operator import is_not
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

from .process_group import Collective, ProcessGroup, first_row, owners, row_bounds, row_mesh_dim

MESSAGE_BYTES = 128 * 2**20  # of all processes together, in one all_gather
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
        self._block_of_rows: dict[Any, Tensor] = {}
        sets: dict[Any, list[int]] = defaultdict(list)  # indices of params with one layout
        for i, param in enumerate(params):
            sets[_layout(param, process_group)].append(i)
        self._plans: list[tuple[list[int], Rows | Copies]] = []
        for (group, is_sharded, _), indices in sets.items():
            shapes, collective = [self.shapes[i] for i in indices], Collective(group)
            owner = matrix_owners(shapes, collective.size)
            plan = (Rows if is_sharded else Copies)(shapes, collective, owner)
            self._plans.append((indices, plan))

    def by_owners(self, shards: list[Tensor], work: Work) -> list[Tensor]:
        """Apply `work` to the whole matrices; return the local shards of the results.

        Args:
            shards: the local rows of each matrix, which are all rows of a plain one.
            work: returns matrices of the shapes and dtypes of its input, which it may overwrite.
        """
        results = list(shards)
        for indices, plan in self._plans:
            done = plan.apply(work, [shards[i] for i in indices])
            for i, result in zip(indices, done, strict=True):
                results[i] = result
        return results

    def block_norms(self, shards: list[Tensor], row_blocks: int) -> list[Tensor]:
        """Return the Frobenius norms (row_blocks,) of the equal row blocks of each whole matrix.

        Plain matrices need no communication.
        """
        results = list(shards)
        for indices, plan in self._plans:
            if isinstance(plan, Copies):
                for i in indices:
                    results[i] = torch.linalg.vector_norm(shards[i].reshape(row_blocks, -1), dim=1)
                continue
            squares = [self._local_squares(i, shards[i], row_blocks) for i in indices]
            total = plan.collective.sum_(torch.stack(squares)).sqrt()  # (n, row_blocks)
            for i, norms in zip(indices, total, strict=True):
                results[i] = norms
        return results

    def block_of_rows(self, i: int, shard: Tensor, row_blocks: int) -> Tensor:  # (local rows,)
        """Return the index of the row block to which each row of a shard of matrix i belongs."""
        key = i, row_blocks, shard.device
        if key not in self._block_of_rows:
            rows = torch.arange(shard.shape[0], device=shard.device) + self.first_rows[i]
            self._block_of_rows[key] = rows // (self.shapes[i][0] // row_blocks)
        return self._block_of_rows[key]

    def _local_squares(self, i: int, shard: Tensor, row_blocks: int) -> Tensor:  # (row_blocks,)
        """Return the sum of squares of the local rows of each row block."""
        squares = shard.square().sum(1)
        blocks = self.block_of_rows(i, shard, row_blocks)
        return squares.new_zeros(row_blocks).index_add_(0, blocks, squares)


class Layouts:
    """The layouts of lists of parameters, each computed once for as long as its list is the same.

    Lists that begin with the same parameter replace each other. The sharding of a parameter must
    not change.
    """

    def __init__(self) -> None:
        self._known: dict[Tensor, tuple[list[Tensor], Matrices]] = {}  # by the first parameter

    def of(self, params: list[Tensor], process_group: ProcessGroup | None) -> Matrices:
        """Return the layout of `params`, which must not be empty."""
        known, matrices = self._known.get(params[0], ([], None))
        if matrices is None or len(known) != len(params) or any(map(is_not, known, params)):
            matrices = Matrices(params, process_group)
            self._known[params[0]] = params, matrices
        return matrices


def _layout(param: Any, process_group: ProcessGroup | None) -> tuple[Any, bool, torch.dtype]:
    """Return the process group that shares the work, whether rows are sharded, and the dtype.

    Every replica of a sharded parameter (HSDP) does the same work.
    """
    dim = row_mesh_dim(param)
    if dim is not None:
        return param.device_mesh.get_group(dim), True, param.dtype
    return process_group, False, param.dtype


def matrix_owners(shapes: list[tuple[int, ...]], size: int) -> list[int]:
    """Return the rank in [0, size) of the owner that orthogonalizes each matrix."""
    return owners([_cost(shape) for shape in shapes], size)


def _cost(shape: tuple[int, ...]) -> float:
    """Return the number of multiplications of an orthogonalization, up to a factor."""
    return float(shape[0] * shape[1] * min(shape))


class Copies:
    """Work on plain matrices: each in its owner, whose results all processes gather.

    Args:
        owner: the rank in the collective that does the work on each matrix.
    """

    def __init__(
        self, shapes: list[tuple[int, ...]], collective: Collective, owner: list[int]
    ) -> None:
        self.shapes, self.collective = shapes, collective
        numels = [math.prod(shape) for shape in shapes]
        self.owned = [_owned_by(rank, owner) for rank in range(collective.size)]
        self.numels = [[numels[i] for i in owned] for owned in self.owned]  # [rank][matrix]

    def apply(self, work: Work, matrices: list[Tensor]) -> list[Tensor]:
        """Return the results of `work`."""
        if self.collective.size == 1:
            return work(matrices)
        rank, like = self.collective.rank, matrices[0]
        done = _flat(work([matrices[i] for i in self.owned[rank]]), like)
        results = list(matrices)
        for values, owned, numels in zip(
            self._gathered(done), self.owned, self.numels, strict=True
        ):
            for i, piece in zip(owned, values.split(numels), strict=True):
                results[i] = piece.view(self.shapes[i])
        return results

    def _gathered(self, own: Tensor) -> list[Tensor]:
        """Return the values of all processes, which may differ in number, from bounded messages."""
        sizes = [*map(sum, self.numels)]
        whole = [own.new_empty(size) for size in sizes]
        n = max(1, MESSAGE_BYTES // (own.element_size() * len(sizes)))  # values per process
        for first in range(0, max(sizes), n):
            part = own[first : first + n]
            sent = F.pad(part, (0, min(n, max(sizes) - first) - len(part)))  # all of equal size
            received = [torch.empty_like(sent) for _ in sizes]
            distributed.all_gather(received, sent, group=self.collective.group)
            for target, values in zip(whole, received, strict=True):
                piece = target[first : first + n]
                piece.copy_(values[: len(piece)])
        return whole


class Rows:
    """Work on matrices with sharded rows: each in its owner, which gets the rows and returns them.

    `to_owner` and `from_rank` count the elements that this process sends to each process and gets
    from it. See `Copies` for the arguments.
    """

    def __init__(
        self, shapes: list[tuple[int, ...]], collective: Collective, owner: list[int]
    ) -> None:
        self.shapes, self.collective = shapes, collective
        ranks = range(collective.size)
        bounds = [row_bounds(shape[0], collective.size) for shape in shapes]
        n_rows = [[b[rank + 1] - b[rank] for b in bounds] for rank in ranks]  # [rank][matrix]
        owned = [_owned_by(rank, owner) for rank in ranks]
        numels = [n * shape[1] for n, shape in zip(n_rows[collective.rank], shapes, strict=True)]
        self.own = owned[collective.rank]
        self.send_order = [i for indices in owned for i in indices]
        self.sent = [numels[i] for i in self.send_order]
        self.to_owner = [sum(numels[i] for i in indices) for indices in owned]
        self.own_rows = [[n_rows[rank][i] for rank in ranks] for i in self.own]  # [matrix][rank]
        received = [[n_rows[rank][i] * shapes[i][1] for i in self.own] for rank in ranks]
        self.received = [n for sizes in received for n in sizes]  # by rank, then matrix
        self.from_rank = [*map(sum, received)]

    def apply(self, work: Work, shards: list[Tensor]) -> list[Tensor]:
        """Return the local rows of the results of `work`."""
        own, like = self.own, shards[0]
        values = _flat([shards[i] for i in self.send_order], like)
        received = _exchange(values, self.to_owner, self.from_rank, self.collective)
        pieces = received.split(self.received)
        whole = [torch.cat(pieces[k :: len(own)]).view(self.shapes[i]) for k, i in enumerate(own)]
        done = [
            matrix.split(rows) for matrix, rows in zip(work(whole), self.own_rows, strict=True)
        ]  # [matrix][rank]
        values = _flat([rows for of_rank in zip(*done, strict=True) for rows in of_rank], like)
        returned = _exchange(values, self.from_rank, self.to_owner, self.collective)
        results = list(shards)
        for i, piece in zip(self.send_order, returned.split(self.sent), strict=True):
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
