"""diffusers: `with preview(pipe):` around a call, or `PreviewCallback(pipe)` in it, shows what a pipeline paints."""

from taesd_stream.integrations.diffusers.pipelines import Preview, PreviewCallback, preview

__all__ = ["Preview", "PreviewCallback", "preview"]
