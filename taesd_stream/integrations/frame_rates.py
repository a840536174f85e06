"""Pictures a second that video models are made for, where nobody says it."""

from __future__ import annotations

from typing import Final

_FPS: Final = {"cogvideox": 8.0, "wan2_2": 24.0, "hunyuan_video": 24.0, "hunyuan_video_1_5": 24.0, "mochi": 30.0}
_LTX_FPS: Final = 24.0
_OTHER_FPS: Final = 16.0  # Wan 2.1's


def usual_fps(format_name: str) -> float:
    """Pictures a second of the models that sample in this latent format."""
    return _LTX_FPS if format_name.startswith("ltx") else _FPS.get(format_name, _OTHER_FPS)
