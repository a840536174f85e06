"""Listens to `scheduler.step`: there the model's output, x_t and the timestep are together, after guidance."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, Final

_METHODS: Final = ("set_timesteps", "step")


class StepHook:
    """Between `attach` and `detach` the scheduler tells each set_timesteps() and step(); its results stay its own.

    on_begin(): a run begins. on_step(arguments, result): a step was made; arguments are step()'s own, by name.
    Neither may raise.
    """

    def __init__(
        self, scheduler: Any, *, on_begin: Callable[[], None], on_step: Callable[[dict[str, Any], Any], None]
    ) -> None:
        self._scheduler = scheduler
        self._on_begin = on_begin
        self._on_step = on_step
        self._before: dict[str, Any] = {}  # attributes of the instance that somebody else had put there
        self._ours: dict[str, Any] = {}
        self._is_listening = False

    def attach(self) -> None:
        """Stand before the scheduler's methods."""
        self._is_listening = True
        for name in _METHODS:
            if name in self._scheduler.__dict__:
                self._before[name] = self._scheduler.__dict__[name]
            self._ours[name] = MethodType(self._listening(name), self._scheduler)
            setattr(self._scheduler, name, self._ours[name])

    def detach(self) -> None:
        """Leave the scheduler as it was; once is enough, more do no harm."""
        self._is_listening = False  # where somebody has wrapped our method in turn, it stays and does nothing
        for name, ours in self._ours.items():
            if self._scheduler.__dict__.get(name) is ours:
                delattr(self._scheduler, name)
                if name in self._before:
                    setattr(self._scheduler, name, self._before[name])
        self._ours.clear()

    @property
    def is_listening(self) -> bool:
        """Whether it stands between the calls of attach and detach."""
        return self._is_listening

    def hears(self, scheduler: Any) -> bool:
        """Whether steps of this scheduler are told."""
        return self._is_listening and scheduler is self._scheduler

    def _listening(self, name: str) -> Callable[..., Any]:
        """A function that becomes a bound method: LTX-2's deep copy of the scheduler, for its sound, is then bound to
        the copy, and pipelines that ask for step()'s signature see the true one.
        """
        method = getattr(self._scheduler, name)
        function = getattr(type(self._scheduler), name)
        signature = inspect.signature(method)

        @functools.wraps(function)
        def listening(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            if scheduler is not self._scheduler:
                return function(scheduler, *args, **kwargs)
            result = method(*args, **kwargs)
            if not self._is_listening:
                return result
            if name == "step":
                # not signature.bind: what somebody wrapped step() in may take more
                self._on_step(dict(zip(signature.parameters, args, strict=False)) | kwargs, result)
            else:
                self._on_begin()
            return result

        return listening
