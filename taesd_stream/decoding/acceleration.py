"""The fastest way to run a tiny decoder on its device, and in words why it is this one."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from taesd_stream.decoding.colour import video_planes
from taesd_stream.decoding.cuda_graphs import GraphedBody
from taesd_stream.decoding.decoder_plan import UnsupportedNetworkError
from taesd_stream.decoding.hopper_decoder import HopperDecoder
from taesd_stream.decoding.kernels.cubins import KernelsUnavailableError
from taesd_stream.decoding.kernels.later import KernelsLater
from taesd_stream.decoding.kernels.launching import Kernels
from taesd_stream.decoding.stock_decoder import StockDecoder

# Both round to float16 after each layer, in other orders: measured 1e-3 against each other, a wrong tap is 1e-1.
LARGEST_ERROR: Final = 4e-3
LARGEST_ERROR_8: Final = 6e-2  # float8 has three bits behind the point
_Output: TypeAlias = Literal["rgb", "planes"]
_CHECK_SIZE: Final = (3, 13, 21)  # frames, h, w: odd sizes, and every tile has an edge in it


class _Decoder(Protocol):
    def rgb(self, latents: Tensor) -> Tensor: ...
    def planes(self, latents: Tensor) -> Tensor: ...


class AcceleratedDecoder:
    """A decoder by fused calls and CUDA graphs; on a Hopper GPU by our own kernels, as soon as they are compiled.

    Used by one thread. It decodes at once, by stock calls; the kernels are compiled in a thread behind it, checked
    against the stock calls by the caller's next decode, and take over then.
    """

    def __init__(
        self, network: nn.Module, device: torch.device, *, is_float8: bool = False, cache: Path | None = None
    ) -> None:
        """network: float16, on the device. Raises: UnsupportedNetworkError if no fused call fits it."""
        self._is_float8 = is_float8
        self._network = network
        self._device = device
        self._stock = StockDecoder(network)
        self._channels = latent_channels(network)
        self._bodies = self._bodies_of(self._stock)
        self._kernels = KernelsLater(device, cache, self._use)

    @property
    def reason(self) -> str:
        """What runs, and why."""
        return self._kernels.reason

    def rgb(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) on the device, as the network takes them -> (N, 3, H, W) float16 in [0, 1]."""
        return self._run(latents, "rgb")

    def planes(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) on the device -> I420 planes for video, (N, H*3//2, W) uint8, as `colour.video_planes`."""
        return self._run(latents, "planes")

    def wait(self) -> None:
        """Wait until the kernels are compiled, checked and in use, or refused: for benchmarks and tests."""
        self._kernels.take_over(wait=True)

    @torch.inference_mode()
    def _run(self, latents: Tensor, output: _Output) -> Tensor:
        with torch.cuda.device(self._device):
            self._kernels.take_over()
            return self._bodies[output](latents.to(device=self._device, dtype=torch.float16))

    def _bodies_of(self, decoder: _Decoder) -> dict[_Output, GraphedBody]:
        return {
            "rgb": GraphedBody(decoder.rgb, self._stock.spatial_factor),
            "planes": GraphedBody(decoder.planes, self._stock.spatial_factor),
        }

    def _use(self, kernels: Kernels) -> str:
        """Use them if they give the stock calls' picture. Raises: KernelsUnavailableError if not."""
        decoder = HopperDecoder(self._network, kernels, is_float8=self._is_float8)
        largest_error = LARGEST_ERROR_8 if self._is_float8 else LARGEST_ERROR
        check(decoder, self._stock, self._channels, self._device, largest_error=largest_error)
        self._bodies = self._bodies_of(decoder)
        return "our own kernels, float8" if self._is_float8 else "our own kernels"


def accelerated(
    network: nn.Module, device: torch.device | str, *, is_float8: bool = False
) -> tuple[AcceleratedDecoder | None, str]:
    """A faster decoder for `network` on `device`, or None; and the reason, in words.

    network: a bare decoder of the TAESD family, float16 and on the device where that is a GPU. None means: run the
    network as it is. The decoder's own `reason` says later whether kernels took over. is_float8: for live views that
    want speed: our own kernels compute the largest blocks in float8; without kernels it changes nothing.
    """
    target = torch.device(device)
    if target.type != "cuda" or not torch.cuda.is_available():
        return None, f"the plain network: {target.type} has no fused calls"
    if torch.version.cuda is None or not torch.backends.cudnn.is_available():  # type: ignore[no-untyped-call]
        return None, "the plain network: this torch has no cuDNN"
    if next(network.parameters()).dtype != torch.float16:
        return None, "the plain network: the fused calls are for float16"
    if target.index is None:
        target = torch.device("cuda", torch.cuda.current_device())
    try:
        decoder = AcceleratedDecoder(network, target, is_float8=is_float8)
    except UnsupportedNetworkError as error:
        return None, f"the plain network: {error}"
    return decoder, decoder.reason


def latent_channels(network: nn.Module) -> int:
    """Channels that the network's first convolution takes."""
    return next(layer.in_channels for layer in network.modules() if isinstance(layer, nn.Conv2d))


def check(
    decoder: _Decoder,
    reference: _Decoder,
    channels: int,
    device: torch.device,
    *,
    largest_error: float = LARGEST_ERROR,
) -> None:
    """Decode random latents both ways.

    Raises: KernelsUnavailableError if the pictures differ by more than rounding.
    """
    count, height, width = _CHECK_SIZE
    noise = torch.randn((count, channels, height, width), generator=torch.Generator().manual_seed(0))
    latents = noise.to(device=device, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    expected, given = reference.rgb(latents).float(), decoder.rgb(latents).float()
    error = float((given - expected).norm() / expected.norm())
    if not error <= largest_error:  # also if it is NaN
        raise KernelsUnavailableError(f"our own kernels differ from cuDNN by {error:.1e} of the picture")
    planes = video_planes(given)
    apart = (decoder.planes(latents).int() - planes.int()).abs().max().item()
    if apart > 1:
        raise KernelsUnavailableError(f"our own kernels' planes differ from their picture's by {apart} codes")
