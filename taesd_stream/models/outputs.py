"""What AutoencoderTiny's methods return: fields by attribute, key or index, as diffusers' outputs of the same names."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from torch.utils import _pytree


class ModelOutput(OrderedDict[str, Tensor]):
    """Base of the outputs: a dictionary of the fields that are not None, which are attributes too."""

    def __init_subclass__(cls) -> None:
        """Let torch see the tensors inside: DistributedDataParallel and others look for them in a result."""
        _pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output)),
            lambda values, names: cls(**dict(zip(names, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__name__}",
        )

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = getattr(self, field.name)
            if value is not None:
                super().__setitem__(field.name, value)

    def __getitem__(self, key: str | int | slice) -> Any:
        """One field by its name, or by its place among those that are not None."""
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __setattr__(self, name: str, value: Any) -> None:
        """Attribute and key are one value."""
        if name in self:
            super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __setitem__(self, key: str, value: Tensor) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled by its fields, which its constructor wants."""
        return type(self), tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]

    def to_tuple(self) -> tuple[Tensor, ...]:
        """The fields that are not None, in order."""
        return tuple(self.values())


@dataclass
class AutoencoderTinyOutput(ModelOutput):
    """latents: (N, C, h, w), the model's dtype."""

    latents: Tensor


@dataclass
class DecoderOutput(ModelOutput):
    """sample: (N, 3, H, W) in [-1, 1] but not clamped, the model's dtype. commit_loss: always None here."""

    sample: Tensor
    commit_loss: Tensor | None = None
