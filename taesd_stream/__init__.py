"""Live previews of what a diffusion sampler is painting: `LatentPublisher` is all that a sampler imports."""

from taesd_stream.publisher import LatentPublisher

__version__ = "0.1.0"
__all__ = ["LatentPublisher", "__version__"]
