"""ComfyUI: every sampler node is shown, as `comfy/PROMPT/NODE`; `custom_node` is the folder that ComfyUI loads."""
