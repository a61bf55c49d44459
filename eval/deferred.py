"""Read and convert the tensors of a model one at a time."""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor


class DeferredTensors(Mapping[str, Tensor]):
    """The tensors change(name, tensor), computed when they are asked for: nobody holds all."""

    def __init__(
        self, tensors: Mapping[str, Tensor], change: Callable[[str, Tensor], Tensor]
    ) -> None:
        self._tensors, self._change = tensors, change

    def __getitem__(self, key: str) -> Tensor:
        return self._change(key, self._tensors[key])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
