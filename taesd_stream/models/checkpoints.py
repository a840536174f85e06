"""Find and read weight files. Names come from the table of known decoders alone: none from outside becomes a path."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import platformdirs
import torch
from safetensors.torch import load_file
from torch import Tensor

from taesd_stream.errors import WeightsError
from taesd_stream.latent_formats import TINY_DECODERS
from taesd_stream.models.families import Part
from taesd_stream.models.hub_weights import cached_weights

# Where weights lie below the folder that a user names: a flat folder, ComfyUI's own folder, its `models`,
# or a clone of madebyollin/taehv.
_LAYOUTS: Final = ("", "vae_approx", "models/vae_approx", "safetensors")
_SUFFIXES: Final = (".safetensors", ".pth")
_DIFFUSERS_FILE: Final = "diffusion_pytorch_model.safetensors"  # both parts in one, in a folder of the model's name


def weights_cache() -> Path:
    """Our own folder for weights, beside the user's other caches, for whoever puts some there; it may not exist."""
    return platformdirs.user_cache_path("taesd-stream", appauthor=False) / "weights"


def find_weights(decoder_id: str, folder: Path | None, part: Part = "decoder") -> Path | None:
    """The weight file of a known decoder in `folder`, in our cache or in the Hugging Face cache; None if none has it.

    folder: flat, ComfyUI's (also its `models` or `models/vae_approx`), or one sub-folder a model as diffusers saves.
    Raises: ValueError for an id that is not in TINY_DECODERS; WeightsError if `folder` is given and is no folder.
    """
    if decoder_id not in TINY_DECODERS:
        raise ValueError(f"no decoder {decoder_id!r}; there are: {', '.join(TINY_DECODERS)}")
    if folder is not None and not folder.is_dir():
        raise WeightsError(f"weights.folder: {folder} is not a folder")
    folders = [weights_cache()] if folder is None else [folder, weights_cache()]
    names = list(_file_names(decoder_id, part))
    found = next((path for base in folders for name in names if (path := base / name).is_file()), None)
    return found or cached_weights(decoder_id, part)


def _file_names(decoder_id: str, part: Part) -> Iterator[Path]:
    """Where the weights may lie below a folder, the likeliest first."""
    stems = [f"{decoder_id}_{part}", decoder_id]  # a file of the part alone, or of both
    for place in (*_LAYOUTS, decoder_id):
        yield from (Path(place) / f"{stem}{suffix}" for stem in stems for suffix in _SUFFIXES)
    yield Path(decoder_id) / _DIFFUSERS_FILE


def load_state_dict(path: Path, part: Part = "decoder") -> dict[str, Tensor]:
    """Read one part of an image autoencoder, with the keys of the original files ("1.weight", ...).

    path: `.safetensors`, or a `torch.save` file, which is read with `weights_only`: nothing in it is executed.
    Files of both parts are taken apart: diffusers' "decoder.layers.N" is the original's N + 1, for it keeps the
    clamp outside of the layers; "encoder.layers.N" is N.
    Raises: WeightsError with the path and the reason.
    """
    state = read_tensors(path)
    if not has_parts(state):
        return state
    weights = part_of(state, part)
    if not weights:
        raise WeightsError(f"{path}: has no {part}")
    return weights


def has_parts(state: Mapping[str, Tensor]) -> bool:
    """Whether the keys say which part of an autoencoder they belong to."""
    return any(key.startswith(("decoder.", "encoder.")) for key in state)


def part_of(state: Mapping[str, Tensor], part: Part) -> dict[str, Tensor]:
    """One part of a whole autoencoder's weights, with the keys of the original files; empty if it has none."""
    prefix = f"{part}."
    return {_original_key(key.removeprefix(prefix), part): state[key] for key in state if key.startswith(prefix)}


def _original_key(key: str, part: Part) -> str:
    """A key without its part's prefix, as the original names it."""
    if not key.startswith("layers."):
        return key
    index, _, rest = key.removeprefix("layers.").partition(".")
    if not index.isdecimal():
        return key  # no layout that we know: load_strictly will name it
    return f"{int(index) + (part == 'decoder')}.{rest}"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All that a weight file holds, by its own keys.

    path: `.safetensors`, or a `torch.save` file, which is read with `weights_only`: nothing in it is executed.
    Raises: WeightsError with the path and the reason.
    """
    state = read_saved(path)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path}: holds {type(state).__name__}, not named tensors")
    return {str(key): value for key, value in state.items()}


def read_saved(path: Path) -> Any:
    """Whatever a `.safetensors` or `torch.save` file holds. Nothing in it is executed.

    Raises: WeightsError with the path and the reason; MemoryError.
    """
    try:
        if path.suffix.lower() == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's remarks on pickle versions help no user of ours
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError) as error:
        # torch's own text advises to load it without the check: not what to tell about a file from outside.
        raise WeightsError(f"{path}: not a file of plain tensors, or cut short") from error
    except MemoryError:
        raise
    except Exception as error:  # of a damaged file torch's reader raises whatever it stumbles over
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise WeightsError(f"{path}: cannot be read: {reason[:200]}") from error
