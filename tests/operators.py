"""Watch which of torch's operators run."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its base untyped
    """The names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the operator, and run it."""
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))

    @property
    def fused(self) -> int:
        """How many of them were fused convolutions."""
        return sum("_convolution_pointwise" in name for name in self.names)
