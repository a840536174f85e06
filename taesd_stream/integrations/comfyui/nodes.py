"""The node `Preview stream`: a model whose samplers are shown under a name of the workflow's own choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, cast

from taesd_stream.fields import quoted
from taesd_stream.frames import NAME_RULE, RECORD_MODES, RecordMode, is_stream_name

OPTIONS_KEY: Final = "taesd_stream"  # of a ModelPatcher's model_options: they follow the model's clones
FOLLOW: Final = "as the daemon says"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a workflow says of its stream.

    name, address: None for those of its own: comfy/PROMPT/NODE, and $TAESD_STREAM_ADDRESS or the default.
    prompt: whether the picture's words are told.
    """

    name: str | None = None
    record: RecordMode | None = None
    address: str | None = None
    prompt: bool = True


class PreviewStream:
    """Model in, model out: between the loader (and its LoRAs) and the sampler."""

    CATEGORY: Final = "sampling"
    DESCRIPTION: Final = (
        "Samplers of this model are shown by taesd-stream under this name. Without it: comfy/PROMPT/NODE."
    )
    RETURN_TYPES: Final = ("MODEL",)
    FUNCTION: Final = "name_stream"

    INPUTS: ClassVar[dict[str, Any]] = {
        "required": {
            "model": ("MODEL",),
            "name": (
                "STRING",
                {"default": "", "tooltip": f"{NAME_RULE[0].upper()}{NAME_RULE[1:]}."},
            ),
            "record": ([FOLLOW, *RECORD_MODES], {"tooltip": "Which steps become a film: off, last (one), all."}),
        },
        "optional": {
            "address": (
                "STRING",
                {"default": "", "tooltip": "The daemon's, as tcp://127.0.0.1:5760; several by commas."},
            ),
            "prompt": ("BOOLEAN", {"default": True, "tooltip": "Tell the prompt's text beside the picture."}),
        },
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI asks for."""
        return cls.INPUTS

    @classmethod
    def VALIDATE_INPUTS(cls, name: str | None) -> Literal[True] | str:
        """Whether the workflow may start: True, or what is wrong with it."""
        text = (name or "").strip()  # None: another node says it, later
        if not text or (is_stream_name(text) and "~" not in text):
            return True
        return f"name: expected {NAME_RULE}, got {quoted(text)}"

    def name_stream(self, model: Any, name: str, record: str, address: str = "", prompt: bool = True) -> tuple[Any]:
        """A clone of the model (no weights are copied) that knows the options."""
        named = model.clone()
        named.model_options[OPTIONS_KEY] = Options(
            name=name.strip() or None,
            record=None if record == FOLLOW else cast(RecordMode, record),
            address=address.strip() or None,
            prompt=prompt,
        )
        return (named,)
