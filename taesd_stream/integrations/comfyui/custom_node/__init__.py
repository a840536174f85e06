"""A custom node of ComfyUI: loading it shows every sampler node, and adds the node `Preview stream`.

What it does is in the package taesd_stream, which ComfyUI's own Python needs: this file is all that lies in ComfyUI.
"""

import logging
import sys
from typing import Any

NODE_CLASS_MAPPINGS: dict[str, Any] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}

if "comfy" in sys.modules:  # it is ComfyUI that loads us
    try:
        from taesd_stream.integrations.comfyui.hook import attach
        from taesd_stream.integrations.comfyui.nodes import PreviewStream

        attach()
        NODE_CLASS_MAPPINGS["TaesdPreviewStream"] = PreviewStream
        NODE_DISPLAY_NAME_MAPPINGS["TaesdPreviewStream"] = "Preview stream"
    except Exception as error:  # noqa: BLE001 ComfyUI's start is worth more than its preview
        logging.getLogger("taesd_stream").warning(
            "taesd-stream: samplers are not shown (%s). Is the package in ComfyUI's own Python? "
            "%s -m pip install -U taesd-stream",
            error,
            sys.executable,
        )
