"""The same network with less arithmetic: nearest upsampling and the convolution behind it become one layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def fold_upsampling(network: nn.Sequential) -> nn.Sequential:
    """An equal network in which each upsampling by 2 and the 3x3 convolution behind it are one transposed convolution.

    Of the 9 pixels under the kernel only 4 differ, so a folded layer multiplies 4 times where it did 9 times: a tenth
    of a whole decoder. Borders are exact too: beyond them both see zeros. All other layers are shared, not copied, and
    pairs that this does not hold for (another factor, mode or kernel, hooks) stay as they are.
    """
    layers: list[nn.Module] = []
    for layer in network:
        if layers and _can_fold(layers[-1], layer):
            assert isinstance(layer, nn.Conv2d)
            layers[-1] = _folded(layer)
        else:
            layers.append(layer)
    return nn.Sequential(*layers).train(network.training)


def _can_fold(upsampling: nn.Module, convolution: nn.Module) -> bool:
    if type(upsampling) is not nn.Upsample or type(convolution) is not nn.Conv2d:
        return False  # exact types: a subclass may do something else
    is_doubling = upsampling.scale_factor in (2, (2, 2)) and upsampling.mode in ("nearest", "nearest-exact")
    shape = (convolution.kernel_size, convolution.stride, convolution.dilation, convolution.groups)
    is_plain = shape == ((3, 3), (1, 1), (1, 1), 1) and convolution.padding == (1, 1)
    is_hooked = any(module._forward_hooks or module._forward_pre_hooks for module in (upsampling, convolution))
    return is_doubling and is_plain and convolution.padding_mode == "zeros" and not is_hooked


def _folded(convolution: nn.Conv2d) -> nn.ConvTranspose2d:
    """The transposed convolution that equals nearest upsampling by 2 before `convolution`."""
    weight = convolution.weight.detach()
    kernel = folded_weight(weight).to(weight.dtype)  # before the module: least memory at once
    with torch.device("meta"):  # no memory, no random weights: they are replaced
        folded = nn.ConvTranspose2d(
            convolution.in_channels, convolution.out_channels, 4, stride=2, padding=1, bias=False
        )
    folded.weight = nn.Parameter(kernel, requires_grad=False)
    folded.bias = convolution.bias
    return folded


def folded_weight(weight: Tensor) -> Tensor:
    """Weights of a 3x3 convolution (out, in, 3, 3) behind nearest upsampling by 2 -> (in, out, 4, 4) of the folded one.

    Transposed, stride 2, padding 1. Half precision becomes float32, for it to be rounded once, by the caller.
    """
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return _doubled(_doubled(exact, dim=2), dim=3).transpose(0, 1)


def _doubled(weight: Tensor, dim: int) -> Tensor:
    """Three taps over doubled pixels as four taps over the pixels themselves, along one axis.

    An even output sees its pixel twice and the one before (taps 1 and 3 of the result), an odd one its pixel twice and
    the one behind (taps 2 and 0): that is how a transposed convolution of stride 2 counts.
    """
    before, middle, behind = weight.unbind(dim)
    return torch.stack((behind, middle + behind, before + middle, before), dim)
