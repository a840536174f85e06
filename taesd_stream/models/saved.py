"""Models saved as diffusers saves them: a folder, or a repository of the Hugging Face hub, of a config and weights."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, NoReturn

from safetensors.torch import save_file
from torch import Tensor

from taesd_stream.errors import WeightsError
from taesd_stream.models.checkpoints import read_tensors

logger = logging.getLogger(__name__)

CONFIG_FILE: Final = "config.json"
_WEIGHTS_STEM: Final = "diffusion_pytorch_model"


class FrozenConfig(dict[str, Any]):
    """The arguments that a model was built with, by key or attribute; a model is what it is, so none can be changed."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the config has no {name!r}; it has: {', '.join(self)}") from None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled whole: key by key would be a change."""
        return type(self), (dict(self),)

    def _refuse(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise TypeError("a model's config cannot be changed: build another model")

    __setitem__ = __delitem__ = __setattr__ = __delattr__ = _refuse
    update = setdefault = pop = popitem = clear = _refuse


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a saved model lies: a folder, or a hub id ("owner/name") with what huggingface_hub wants to know.

    local_files_only: never go to the network. cache_dir, token, revision: as huggingface_hub's.
    """

    place: str
    subfolder: str | None = None
    revision: str | None = None
    cache_dir: Path | str | None = None
    local_files_only: bool = False
    force_download: bool = False
    token: str | bool | None = None

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """The names of all that may be said beside the place."""
        return tuple(field.name for field in fields(cls) if field.name != "place")

    def file(self, name: str) -> Path:
        """The local path of one file, downloaded if need be.

        Raises: WeightsError with the place and the reason if it cannot be had.
        """
        folder = Path(self.place)
        if folder.is_dir():
            path = folder / (self.subfolder or "") / name
            if not path.is_file():
                raise WeightsError(f"{path}: no such file")
            return path
        return self._downloaded(name)

    def first_of(self, names: Sequence[str]) -> Path:
        """The first of the files that can be had. Raises: WeightsError about the first, if none can."""
        errors = []
        for name in names:
            try:
                return self.file(name)
            except WeightsError as error:
                errors.append(error)
        raise errors[0]

    def _downloaded(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download  # here: it takes a third of a second, and folders need none of it

        try:
            path = hf_hub_download(
                self.place,
                name,
                subfolder=self.subfolder,
                revision=self.revision,
                cache_dir=self.cache_dir,
                local_files_only=self.local_files_only,
                force_download=self.force_download,
                token=self.token,
            )
        except (OSError, ValueError) as error:  # all of its errors: refused ids, missing files, no network
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise WeightsError(
                f"{self.place}: no folder here, and from the hub {name} cannot be had: {reason}"
            ) from error
        return Path(path)


def weights_file(variant: str | None, *, safetensors: bool = True) -> str:
    """The weight file's name. variant: as in "diffusion_pytorch_model.fp16.safetensors"."""
    middle = f".{variant}" if variant else ""
    return f"{_WEIGHTS_STEM}{middle}.{'safetensors' if safetensors else 'bin'}"


def read_weights(source: Source, variant: str | None, use_safetensors: bool | None) -> tuple[Path, dict[str, Tensor]]:
    """The saved weights and the file they are of; None tries safetensors first, then `.bin`, which runs no code of it.

    Raises: WeightsError with the place and the reason.
    """
    names = [weights_file(variant, safetensors=safetensors) for safetensors in (True, False)]
    if use_safetensors is not None:
        names = names[:1] if use_safetensors else names[1:]
    path = source.first_of(names)
    return path, read_tensors(path)


def read_config(source: Source, class_name: str) -> dict[str, Any]:
    """The saved arguments, lists as tuples, without what diffusers notes beside them ("_diffusers_version", ...).

    Raises: WeightsError if there is no config, or it is of another class.
    """
    path = source.file(CONFIG_FILE)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path}: expected an object, got {type(config).__name__}")
    saved_class = config.get("_class_name", class_name)
    if saved_class != class_name:
        raise WeightsError(f"{path}: expected a config of {class_name}, got one of {saved_class}")
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in public.items()}


def write_model(
    folder: Path, class_name: str, config: Mapping[str, Any], weights: Mapping[str, Tensor], variant: str | None
) -> None:
    """Write a folder that diffusers loads too; what lies there under the same names is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {key: tensor.detach().contiguous() for key, tensor in weights.items()}
    # The metadata is no ornament: diffusers and transformers refuse a file without it.
    save_file(plain, folder / weights_file(variant), metadata={"format": "pt"})
    text = json.dumps({"_class_name": class_name, **config}, indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
