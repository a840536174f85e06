"""What the prompt graph tells of a sampler node: the text that it paints, the checkpoint, pictures a second.

The graph is ComfyUI's own, in the form of its API: {id: {"class_type", "inputs": {name: value or [id, output]}}}.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

MAX_CHARS: Final = 2000  # of the prompt, of a name; a run's meta holds 16 KiB
_TEXTS: Final = ("text", "prompt", "t5xxl", "text_g", "clip_l", "value", "string")
_CHECKPOINTS: Final = ("ckpt_name", "unet_name", "model_name")
_RATES: Final = ("fps", "frame_rate")
# What leads away from the words of a picture: to what it shall not be, to models, to a sampler before this one.
_NOT_TEXT: Final = frozenset(
    [
        "negative",
        "model",
        "clip",
        "vae",
        "control_net",
        "latent",
        "latent_image",
        "samples",
        "image",
        "images",
        "mask",
        "noise",
        "sigmas",
        "sampler",
    ]
)

Graph = Mapping[str, Mapping[str, Any]]


def told(graph: Graph, node_id: str, *, with_prompt: bool) -> dict[str, Any]:
    """What people want to read beside the picture of this node; what the graph does not say is left out."""
    meta: dict[str, Any] = {"node": _title(graph, node_id)}
    if with_prompt:
        text = next((text for text in _values(graph, node_id, _TEXTS, _NOT_TEXT) if text.strip()), None)
        if text is not None:
            meta["prompt"] = text
    meta["checkpoint"] = next(_values(graph, node_id, _CHECKPOINTS), None)
    meta["scheduler"] = next(_values(graph, node_id, ("scheduler",)), None)
    return {name: str(value)[:MAX_CHARS] for name, value in meta.items() if value is not None}


def fps_of(graph: Graph) -> float | None:
    """Pictures a second, where some node of the graph says it and no other says anything else."""
    rates = {
        float(value)
        for node in graph.values()
        for name, value in _inputs(node).items()
        if name in _RATES and isinstance(value, int | float) and value > 0
    }
    return rates.pop() if len(rates) == 1 else None


def _title(graph: Graph, node_id: str) -> str | None:
    node = graph.get(node_id, {})
    title = (node.get("_meta") or {}).get("title")
    return title or node.get("class_type")


def _values(
    graph: Graph, node_id: str, names: tuple[str, ...], left_out: frozenset[str] = frozenset()
) -> Iterator[str]:
    """Texts at inputs of these names, of this node and of those that lead to it; the nearest first."""
    waiting, seen = [node_id], {node_id}
    while waiting:
        inputs = _inputs(graph.get(waiting.pop(0), {}))
        yield from (inputs[name] for name in names if isinstance(inputs.get(name), str))
        for name, value in inputs.items():
            source = str(value[0]) if isinstance(value, list) and len(value) == 2 else ""
            if source in graph and source not in seen and name not in left_out:
                seen.add(source)
                waiting.append(source)


def _inputs(node: Mapping[str, Any]) -> Mapping[str, Any]:
    inputs = node.get("inputs")
    return inputs if isinstance(inputs, Mapping) else {}
