"""How samplers hold latents, and the way from there to cells in rows and columns: (N, T, C, h, w).

A layout is an order of axes, written as einops would: "n (h w) (c y x)" is a batch of tokens, row by row, each of 2x2
cells whose channels come slowest. numpy arrays and torch tensors alike; neither is imported.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final, Protocol, Self, TypeVar

Shape = Sequence[int]
_GROUP: Final = re.compile(r"\(([^)]*)\)|(\S+)")


class Reshapeable(Protocol):
    """What numpy arrays and torch tensors have in common here."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def reshape(self, shape: tuple[int, ...], /) -> Self: ...

    def swapaxes(self, axis0: int, axis1: int, /) -> Self: ...

    def __getitem__(self, key: Any, /) -> Self: ...

    def __mul__(self, other: float, /) -> Self: ...

    def __truediv__(self, other: float, /) -> Self: ...


Latents = TypeVar("Latents", bound=Reshapeable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One order of axes.

    held: n batch, t latent frames, c channels, h w cells or patches, y x the 2x2 cells of a patch, p the two frames of
    a pair; tokens are a group with h and w in it.
    is_named_only: never told from the shape: another layout has the same, and is the commoner.
    """

    name: str
    held: str
    is_named_only: bool = False

    @property
    def axes(self) -> tuple[tuple[str, ...], ...]:
        """The groups of letters, one an axis."""
        return _groups(self.held)

    @property
    def patch(self) -> int:
        """Cells along one side of a patch."""
        return 2 if "y" in self.held else 1

    @property
    def token_axis(self) -> int | None:
        """The axis of tokens; None where rows and columns are axes of their own."""
        return next((axis for axis, group in enumerate(self.axes) if {"h", "w"} <= set(group)), None)

    @property
    def channel_axis(self) -> int:
        """The axis that holds the channels."""
        return next(axis for axis, group in enumerate(self.axes) if "c" in group)

    def channel_counts(self, channels: int) -> tuple[int, ...]:
        """How long the channel axis may be in a space of so many channels."""
        if self.name == "channels_last":
            # Kandinsky 5 appends a condition of as many channels, and a mask.
            return channels, 2 * channels + 1
        return (channels * (4 if "y" in self.held else 1) * (2 if "p" in self.held else 1),)


LAYOUTS: Final[dict[str, Layout]] = {
    layout.name: layout
    for layout in (
        Layout(name="spatial", held="n c h w"),
        Layout(name="patchified", held="n (c y x) h w"),  # ERNIE-Image, and FLUX.2 in ComfyUI
        Layout(name="frames_third", held="n c t h w"),
        Layout(name="frames_second", held="n t c h w"),  # CogVideoX, SVD
        Layout(name="channels_last", held="n t h w c"),  # Kandinsky
        Layout(name="items_second", held="n i c t h w"),  # JoyImage-Edit; the last item is the picture
        Layout(name="frame_pairs", held="n (p c) t h w"),  # HunyuanImage's refiner; the first frame is a filler
        Layout(name="tokens", held="n (h w) c"),
        Layout(name="tokens_2x2", held="n (h w) (c y x)"),  # FLUX.1, FLUX.2, Qwen-Image
        Layout(name="tokens_2x2_channels_last", held="n (h w) (y x c)", is_named_only=True),  # Ideogram 4
        Layout(name="layered_tokens_2x2", held="n (t h w) (c y x)", is_named_only=True),  # Qwen-Image-Layered
        Layout(name="video_tokens", held="n (t h w) c"),  # LTX
        Layout(name="video_rows_2x2", held="(t h w) (c y x)"),  # MiniMax H3: no batch axis
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """What must be known of latents to find their cells.

    width, height: pixels of the picture; tokens are counted from them.
    leading_tokens: tokens of conditions before the picture's (LTXConditionPipeline, MiniMax H3).
    latent_frames: T; what comes behind is dropped: LTX2ConditionPipeline's tokens, Kandinsky 6's condition frame.
    """

    name: str
    channels: int
    spatial_factor: float
    width: int
    height: int
    leading_tokens: int = 0
    latent_frames: int | None = None

    def grids(self, layout: Layout) -> list[tuple[int, int]]:
        """Rows and columns that tokens of this picture may come in."""
        side_px = int(self.spatial_factor * layout.patch)
        even_px = int(self.spatial_factor * 2)  # Qwen-Image 2.1 has an even number of rows and columns
        plain = self.height // side_px, self.width // side_px
        even = 2 * (self.height // even_px), 2 * (self.width // even_px)
        return [plain] if layout.patch == 2 or even == plain else [plain, even]

    def tokens_grid(self, layout: Layout, count: int) -> tuple[int, int] | None:
        """The grid that `count` tokens fill, of one frame or of several as the layout has it; None if they do not."""
        count -= self.leading_tokens
        for rows, columns in self.grids(layout):
            cells = rows * columns
            if "t" not in layout.held:
                fits = count == cells
            elif self.latent_frames is None:
                fits = cells > 0 and count > 0 and count % cells == 0
            else:
                fits = count >= self.latent_frames * cells
            if fits and cells:
                return rows, columns
        return None

    def fits(self, layout: Layout, shape: Shape) -> bool:
        """Whether latents of that shape may be held so."""
        if len(shape) != len(layout.axes) or min(shape) < 1:
            return False
        if shape[layout.channel_axis] not in layout.channel_counts(self.channels):
            return False
        axis = layout.token_axis
        return axis is None or self.tokens_grid(layout, shape[axis]) is not None

    def has_its_size(self, layout: Layout, shape: Shape) -> bool:
        """Whether rows and columns are as many as the picture's pixels need; pipelines round to whole patches."""
        if layout.token_axis is not None:
            return True
        cells = [shape[layout.axes.index((letter,))] * layout.patch for letter in "hw"]
        wanted = [size_px / self.spatial_factor for size_px in (self.height, self.width)]
        return all(abs(count - exact) < 2 for count, exact in zip(cells, wanted, strict=True))

    def expected(self, layout: Layout) -> str:
        """The layout as an error names it: "tokens_2x2 (N, 1024, 64)"."""
        words = {"n": "N", "t": "T", "h": "h", "w": "w", "i": "items"}
        sizes = [words.get(group[0], "?") for group in layout.axes]
        sizes[layout.channel_axis] = str(layout.channel_counts(self.channels)[0])
        if layout.token_axis is not None:
            rows, columns = self.grids(layout)[0]
            frames = "T*" if "t" in layout.held else ""
            leading = f"{self.leading_tokens}+" if self.leading_tokens else ""
            sizes[layout.token_axis] = f"{leading}{frames}{rows * columns}"
        return f"{layout.name} ({', '.join(sizes)})"


def find_layout(space: Space, names: Sequence[str], shape: Shape) -> Layout:
    """The one of these layouts that latents of `shape` have.

    Raises: ValueError that names what was expected and what came, or the layouts between which only the caller can
    tell.
    """
    known = [LAYOUTS[name] for name in names]
    fitting = [layout for layout in known if space.fits(layout, shape)]
    told = [layout for layout in fitting if not layout.is_named_only] if len(names) > 1 else fitting
    if len(told) > 1:
        told = [layout for layout in told if space.has_its_size(layout, shape)] or told
    if len(told) == 1:
        return told[0]
    given = f"got shape {tuple(shape)}"
    if told:
        choices = " or ".join(f"layout={layout.name!r}" for layout in told)
        raise ValueError(f"{space.name}: latents of several layouts have this shape: say {choices}; {given}")
    expected = " or ".join(space.expected(layout) for layout in known)
    hint = "".join(f"; if they are {layout.name}, say layout={layout.name!r}" for layout in fitting)
    raise ValueError(f"{space.name}: expected {expected} for {space.width}x{space.height} pixels, {given}{hint}")


def unpack(latents: Latents, layout: Layout, space: Space) -> Latents:
    """Latents as they are held -> (N, T, C, h, w). The shape has been checked by `find_layout`."""
    sizes = {"c": space.channels, "y": 2, "x": 2, "p": 2}
    if layout.name == "items_second":
        latents, layout = latents[:, -1], LAYOUTS["frames_third"]
    elif layout.name == "channels_last":
        latents = latents[..., : space.channels]
    elif layout.token_axis is not None:
        grid = space.tokens_grid(layout, latents.shape[layout.token_axis])
        assert grid is not None
        sizes |= {"h": grid[0], "w": grid[1]}
        first = space.leading_tokens
        last = None if space.latent_frames is None else first + space.latent_frames * prod(grid)
        latents = latents[first:last] if layout.token_axis == 0 else latents[:, first:last]
    frames = "(t p)" if "p" in layout.held else "t" if "t" in layout.held else "1"
    cells = "(h y) (w x)" if layout.patch == 2 else "h w"
    batch = "n" if "n" in layout.held else "1"
    unpacked = rearrange(latents, layout.held, f"{batch} {frames} c {cells}", sizes)
    if layout.name == "frame_pairs":
        unpacked = unpacked[:, 1:]
    return unpacked if space.latent_frames is None else unpacked[:, : space.latent_frames]


def rearrange(latents: Latents, held: str, wanted: str, sizes: dict[str, int]) -> Latents:
    """Another order of axes: the letters of `held` and `wanted` are the same, "1" is a new axis.

    sizes: of letters; in each group one may be left out. Raises: ValueError for an axis that cannot be split so.
    """
    lengths: dict[str, int] = {}
    for axis, (group, length) in enumerate(zip(_groups(held), latents.shape, strict=True)):
        unknown = [letter for letter in group if len(group) == 1 or letter not in sizes]
        known = prod(sizes[letter] for letter in group if letter not in unknown)
        if len(unknown) > 1 or length % known or (not unknown and length != known):
            raise ValueError(f"axis {axis} of shape {tuple(latents.shape)} cannot be split as ({' '.join(group)})")
        lengths |= {letter: sizes[letter] for letter in group if letter not in unknown}
        lengths |= dict.fromkeys(unknown, length // known)
    order = [letter for group in _groups(held) for letter in group]
    target = [letter for group in _groups(wanted) for letter in group if letter != "1"]
    latents = latents.reshape(tuple(lengths[letter] for letter in order))
    for place, letter in enumerate(target):  # swaps: the one move that numpy and torch call by the same name
        where = order.index(letter)
        if where != place:
            latents = latents.swapaxes(place, where)
            order[place], order[where] = order[where], order[place]
    merged = tuple(prod(lengths.get(letter, 1) for letter in group) for group in _groups(wanted))
    return latents.reshape(merged)


def _groups(pattern: str) -> tuple[tuple[str, ...], ...]:
    """ "n (h w) c" -> (("n",), ("h", "w"), ("c",))."""
    return tuple(tuple((inner or single).split()) for inner, single in _GROUP.findall(pattern))
