"""Live previews of what a diffusion sampler is painting: `LatentPublisher` is all that a sampler imports."""

__version__ = "0.1.0"
