"""Matrices that several processes train: each is worked on whole, by one process, its owner.

Under DDP every process holds all of every matrix: the owners' results are gathered (all_gather).
Under FSDP2 each holds some rows: they travel to the owner and the result's rows back (all_to_all).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

from .process_group import Collective, ProcessGroup, first_row, owners, row_bounds, row_mesh_dim

Work = Callable[[list[Tensor]], list[Tensor]]  # new matrices from matrices, shape by shape


class Matrices:
    """The parameters (d_out, d_in) of one param group, and who holds and owns what of them.

    Args:
        process_group: the processes that hold the same plain parameters, as under DDP, and share
            the work; None: each does all of it. A DTensor brings its own group.
    """

    def __init__(self, params: list[Tensor], process_group: ProcessGroup | None) -> None:
        self.shapes = [tuple(param.shape) for param in params]  # of the whole matrices
        self.first_rows = [first_row(param) for param in params]
        self._sets: dict[Any, list[int]] = defaultdict(list)  # parameters with the same processes
        for i, param in enumerate(params):
            self._sets[_holders(param, process_group)].append(i)

    def by_owners(self, parts: list[Tensor], work: Work) -> list[Tensor]:
        """`work` on the whole matrices, of which `parts` are here; the same parts of the result.

        `work` may replace what it is given. Its result has the shapes and dtypes of its input.
        """
        results = list(parts)
        for (group, is_spread, _), indices in self._sets.items():
            share = _by_rows if is_spread else _by_copies
            shapes = [self.shapes[i] for i in indices]
            done = share([parts[i] for i in indices], shapes, work, Collective(group))
            for i, result in zip(indices, done, strict=True):
                results[i] = result
        return results

    def block_norms(self, parts: list[Tensor], row_blocks: int) -> list[Tensor]:
        """The Frobenius norm of each of `blocks` equal row blocks of the whole matrices, (blocks,).

        At least in fp32; of a plain matrix, without communication.
        """
        results = list(parts)
        for (group, is_spread, _), indices in self._sets.items():
            if not is_spread:
                for i in indices:
                    results[i] = torch.linalg.vector_norm(parts[i].reshape(row_blocks, -1), dim=1)
                continue
            squares = [self._squares(i, parts[i], row_blocks) for i in indices]
            total = Collective(group).sum_(torch.stack(squares)).sqrt()  # (n, blocks)
            for i, norms in zip(indices, total, strict=True):
                results[i] = norms
        return results

    def block_of_rows(self, i: int, part: Tensor, row_blocks: int) -> Tensor:  # (rows here,)
        """To which row block each row of `part` belongs."""
        rows = torch.arange(part.shape[0], device=part.device) + self.first_rows[i]
        return rows // (self.shapes[i][0] // row_blocks)

    def _squares(self, i: int, part: Tensor, row_blocks: int) -> Tensor:  # (blocks,)
        """Sums of squares over the rows that are here."""
        of_rows = part.square().sum(1)
        return of_rows.new_zeros(row_blocks).index_add_(
            0, self.block_of_rows(i, part, row_blocks), of_rows
        )


def _holders(param: Any, process_group: ProcessGroup | None) -> tuple[Any, bool, torch.dtype]:
    """The processes that share the work on a parameter, whether its rows are spread, its dtype.

    Replicas of a sharded parameter (HSDP) do the same work each.
    """
    dim = row_mesh_dim(param)
    if dim is not None:
        return param.device_mesh.get_group(dim), True, param.dtype
    return process_group, False, param.dtype


def owners_of(shapes: list[tuple[int, ...]], size: int) -> list[int]:
    """Which of `size` processes orthogonalises each matrix."""
    return owners([_cost(shape) for shape in shapes], size)


def _cost(shape: tuple[int, ...]) -> float:
    """Multiplications of an orthogonalisation, up to a factor."""
    return float(shape[0] * shape[1] * min(shape))


def _by_copies(
    matrices: list[Tensor], shapes: list[tuple[int, ...]], work: Work, collective: Collective
) -> list[Tensor]:
    if collective.size == 1:
        return work(matrices)
    owner = owners_of(shapes, collective.size)
    own = [i for i, rank in enumerate(owner) if rank == collective.rank]
    done = work([matrices[i] for i in own])
    sizes = [sum(matrices[i].numel() for i in _of(owner, rank)) for rank in range(collective.size)]
    buffer = matrices[0].new_zeros(max(sizes))  # gathering needs equal sizes
    buffer[: sizes[collective.rank]] = _flat(done, buffer)
    gathered = [torch.empty_like(buffer) for _ in range(collective.size)]
    distributed.all_gather(gathered, buffer, group=collective.group)
    results = list(matrices)
    for rank, row in enumerate(gathered):
        theirs = _of(owner, rank)
        pieces = row[: sizes[rank]].split([matrices[i].numel() for i in theirs])
        for i, piece in zip(theirs, pieces, strict=True):
            results[i] = piece.view(shapes[i])
    return results


def _by_rows(
    parts: list[Tensor], shapes: list[tuple[int, ...]], work: Work, collective: Collective
) -> list[Tensor]:
    owner = owners_of(shapes, collective.size)
    own = _of(owner, collective.rank)
    bounds = [row_bounds(shape[0], collective.size) for shape in shapes]
    theirs = [i for rank in range(collective.size) for i in _of(owner, rank)]  # as they are sent
    to_owner = [sum(parts[i].numel() for i in _of(owner, rank)) for rank in range(collective.size)]
    rows_of = [[b[rank + 1] - b[rank] for b in bounds] for rank in range(collective.size)]
    from_rank = [[rows_of[rank][i] * shapes[i][1] for i in own] for rank in range(collective.size)]
    sent = _exchange(
        _flat([parts[i] for i in theirs], parts[0]), to_owner, list(map(sum, from_rank)), collective
    )
    pieces = sent.split([size for sizes in from_rank for size in sizes])  # by rank, then matrix
    whole = [torch.cat(pieces[k :: len(own)]).view(shapes[i]) for k, i in enumerate(own)]
    done = work(whole)
    rows = [
        result.split([rows_of[rank][i] for rank in range(collective.size)])
        for i, result in zip(own, done, strict=True)
    ]
    back = [rows[k][rank] for rank in range(collective.size) for k in range(len(own))]
    returned = _exchange(_flat(back, parts[0]), list(map(sum, from_rank)), to_owner, collective)
    results = list(parts)
    for i, piece in zip(theirs, returned.split([parts[i].numel() for i in theirs]), strict=True):
        results[i] = piece.view(parts[i].shape)
    return results


def _of(owner: list[int], rank: int) -> list[int]:
    return [i for i, each in enumerate(owner) if each == rank]


def _flat(tensors: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat([each.reshape(-1) for each in tensors]) if tensors else like.new_empty(0)


def _exchange(
    values: Tensor, n_sent: list[int], n_received: list[int], collective: Collective
) -> Tensor:
    """`n_sent[r]` of the values to process r, `n_received[r]` from it."""
    received = values.new_empty(sum(n_received))
    distributed.all_to_all_single(received, values, n_received, n_sent, group=collective.group)
    return received
