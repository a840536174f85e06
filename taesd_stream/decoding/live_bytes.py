"""Counts the bytes of tensors that are alive while a network runs, to know its worst moment instead of guessing it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its base untyped
    """Sees every operation in its `with`; `peak` is the most bytes that results took at once.

    beside: tensors whose memory is the caller's and is not counted, nor are views of them. What a library takes
    beside tensors (cuDNN's workspaces) is not seen.
    """

    def __init__(self, beside: Sequence[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._live: dict[int, int] = {}  # storage -> bytes
        self._now = 0
        self._beside = {tensor.untyped_storage()._cdata for tensor in beside}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._see(value.untyped_storage())
        self.peak = max(self.peak, self._now)
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._live and key not in self._beside:
            self._live[key] = storage.nbytes()
            self._now += storage.nbytes()
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now -= self._live.pop(key)
