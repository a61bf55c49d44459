"""Switch between the weights that an optimizer trains and those that it wants to be evaluated.

Schedule-free optimizers, for example, compute gradients at other weights than they recommend. They
have the methods `eval()` and `train()`, which change the parameters in place. For all other
optimizers, nothing here has an effect.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

TRAIN_WEIGHT = "train_weight"  # key in an optimizer's state, while the other weights are in place


@contextmanager
def evaluation_weights(optimizers: Iterable[Optimizer]) -> Iterator[None]:
    """Within the block, the parameters are the weights to evaluate and to save.

    Afterwards the weights to train have the same bits as before. A checkpoint that is written in
    the block has both, because the optimizer's state contains the other ones.
    """
    switched = [each for each in optimizers if hasattr(each, "eval") and each.state]
    for optimizer in switched:
        for param in _params(optimizer):
            optimizer.state[param][TRAIN_WEIGHT] = param.detach().clone()
        optimizer.eval()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        train_weights(switched)


@torch.no_grad()
def train_weights(optimizers: Iterable[Optimizer]) -> None:
    """Put the weights to train in place, also after a checkpoint was loaded."""
    for optimizer in optimizers:
        if any(TRAIN_WEIGHT in values for values in optimizer.state.values()):
            optimizer.train()  # pyright: ignore[reportAttributeAccessIssue]
            for param in _params(optimizer):
                param.copy_(optimizer.state[param].pop(TRAIN_WEIGHT))


def _params(optimizer: Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
