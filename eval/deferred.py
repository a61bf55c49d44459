"""Read and convert the tensors of a model one at a time."""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor


class DeferredTensors(Mapping[str, Tensor]):
    """Tensors by name, each made anew whenever it is asked for: nobody holds all of them."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = makers

    def __getitem__(self, key: str) -> Tensor:
        return self._makers[key]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)
