"""Previews for samplers that people have already: diffusers, ComfyUI, k-diffusion, trainers."""
