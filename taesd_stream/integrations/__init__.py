"""Previews for samplers that people have already: diffusers, k-diffusion, trainers."""
