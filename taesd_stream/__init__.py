"""Live previews of what a diffusion sampler is painting: `LatentPublisher` is all that a sampler imports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taesd_stream.publisher import LatentPublisher

__version__ = "0.1.0"
__all__ = ["LatentPublisher", "__version__"]


def __getattr__(name: str) -> Any:
    """The publisher's modules load with its first use: whoever wants another part of the library has no sockets."""
    if name == "LatentPublisher":
        from taesd_stream.publisher import LatentPublisher

        return LatentPublisher
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
