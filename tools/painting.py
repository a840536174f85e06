"""A small painter's box in numpy: noise, gradients, glows, terrain, trees. Pictures are (H, W, 3) in linear light."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Field: TypeAlias = NDArray[np.float64]
Random: TypeAlias = np.random.Generator

OVERSAMPLING: Final = 2  # scenes are painted at twice their size and averaged: soft edges


def colour(code: str) -> Field:
    """A colour as people write it ("f4a261", sRGB) in linear light."""
    values = np.array([int(code[index : index + 2], 16) for index in (0, 2, 4)]) / 255
    linear: Field = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return linear


def to_display(picture: Field) -> Field:
    """Linear light to sRGB in [0, 1], averaged down to the scene's size; highlights roll off instead of burning out."""
    height, width = picture.shape[0] // OVERSAMPLING, picture.shape[1] // OVERSAMPLING
    boxes = picture.reshape(height, OVERSAMPLING, width, OVERSAMPLING, 3).mean((1, 3))
    bright = 0.75 + 0.25 * (1 - np.exp(-(np.maximum(boxes, 0.75) - 0.75) / 0.25))
    linear = np.clip(np.where(boxes > 0.75, bright, boxes), 0, 1)
    encoded: Field = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return encoded


def grid(height: int, width: int) -> tuple[Field, Field]:
    """x from 0 to the aspect ratio, y from 0 (top) to 1, at the oversampled size."""
    rows, columns = height * OVERSAMPLING, width * OVERSAMPLING
    y, x = np.mgrid[0:rows, 0:columns]
    return (x + 0.5) / rows, (y + 0.5) / rows


def smooth(low: float, high: float, values: Field) -> Field:
    """0 below `low`, 1 above `high` (or the reverse), without a kink."""
    t: Field = np.clip((values - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def gradient(positions: Field, stops: Sequence[tuple[float, str]]) -> Field:
    """A colour for each position, between stops of (position, colour)."""
    places = [place for place, _ in stops]
    colours = np.array([colour(code) for _, code in stops])
    return np.stack([np.interp(positions, places, colours[:, channel]) for channel in range(3)], axis=-1)


def over(picture: Field, cover: NDArray[np.floating[Any]], paint: Field) -> Field:
    """Lay paint (a colour or a picture) on a picture where `cover` is 1."""
    covered: Field = picture + cover[..., None] * (paint - picture)
    return covered


def noise(random: Random, height: int, width: int, *, slope: float, stretch: float = 1.0, lowest: float = 1.0) -> Field:
    """Fractal noise: mean 0, deviation 1, amplitude falling as frequency ** -slope; tiles without a seam.

    stretch: above 1 for shapes that are wide and low; lowest: waves over the picture's width that the largest have.
    """
    fy = np.fft.fftfreq(height)[:, None] * width / stretch
    fx = np.fft.rfftfreq(width)[None, :] * width
    frequency = np.hypot(fx, fy)
    amplitude = np.where(frequency < lowest, 0, np.maximum(frequency, 1e-9) ** -slope)
    spectrum = amplitude * np.exp(2j * np.pi * random.random(amplitude.shape))
    field = np.fft.irfft2(spectrum, s=(height, width))
    normal: Field = (field - field.mean()) / field.std()
    return normal


def line_noise(random: Random, length: int, *, slope: float, lowest: float = 1.0) -> Field:
    """Fractal noise along a line, mean 0, deviation 1: the outline of hills."""
    frequency = np.fft.rfftfreq(length) * length
    amplitude = np.where(frequency < lowest, 0, np.maximum(frequency, 1e-9) ** -slope)
    line = np.fft.irfft(amplitude * np.exp(2j * np.pi * random.random(amplitude.shape)), n=length)
    normal: Field = (line - line.mean()) / line.std()
    return normal


def glow(x: Field, y: Field, centre: tuple[float, float], radius: float) -> Field:
    """Light around a point: 1 there, falling off softly."""
    return np.asarray(1 / (1 + ((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / radius**2))


def disc(x: Field, y: Field, centre: tuple[float, float], radius: float) -> Field:
    """1 inside a circle."""
    distance = np.hypot(x - centre[0], y - centre[1])
    return smooth(radius * 1.02, radius * 0.98, distance)


def below(y: Field, line: Field) -> Field:
    """1 below an outline that has a height for each column."""
    pixel = 1 / y.shape[0]
    below_it: Field = np.clip((y - line[None, :]) / pixel + 0.5, 0, 1)
    return below_it


def box(x: Field, y: Field, left: float, right: float, top: float, bottom: float) -> Field:
    """1 inside an upright box."""
    return np.asarray((x >= left) & (x < right) & (y >= top) & (y < bottom), dtype=np.float64)


def stars(random: Random, height: int, width: int, share: float) -> Field:
    """Points of light of many magnitudes on a `share` of the oversampled pixels."""
    field = np.zeros((height * OVERSAMPLING, width * OVERSAMPLING))
    count = int(field.size * share)
    rows, columns = random.integers(0, field.shape[0] - 1, count), random.integers(0, field.shape[1] - 1, count)
    light = random.pareto(2.2, count) * 0.16 + 0.06
    for dy, dx, part in ((0, 0, 1.0), (0, 1, 0.7), (1, 0, 0.7), (1, 1, 0.5)):
        np.maximum.at(field, (rows + dy, columns + dx), np.minimum(light, 1.4) * part)
    return field


def conifers(random: Random, shape: tuple[int, int], places: Sequence[tuple[float, float, float]]) -> Field:
    """Cover of a row of conifers; each place is (x, foot, tallness) in heights of the picture."""
    rows, columns = shape
    cover = np.zeros(shape)
    for x, foot, tall in places:
        top, bottom = int((foot - tall) * rows), min(rows, int((foot + 0.01) * rows))
        centre = int(x * rows)
        for row in range(max(0, top), bottom):
            t = (row - top) / max(1, tall * rows)
            tier = 0.62 + 0.38 * ((t * (5 + tall * 18)) % 1.0)  # branches hang in tiers
            half = tall * rows * 0.19 * t**0.85 * tier * random.uniform(0.82, 1.0)
            left, right = max(0, int(centre - half)), max(0, min(columns, int(centre + half) + 1))
            cover[row, left:right] = 1
    return cover


def mirrored(picture: Field, horizon: float, ripple: Field, reach: float = 1.0) -> Field:
    """What still water shows below `horizon` (a share of the height): the picture above it, upside down.

    ripple: (H, W) displacement in pixels; reach: how much is seen foreshortened.
    """
    rows, columns = picture.shape[:2]
    edge = int(horizon * rows)
    y, x = np.mgrid[edge:rows, 0:columns]
    source_y = edge - 1 - (y - edge) * reach + ripple[edge:] * 0.6
    source_x = x + ripple[edge:] * 0.35
    water = picture.copy()
    picked_y = np.clip(source_y, 0, edge - 1).astype(int)
    water[edge:] = picture[picked_y, np.clip(source_x, 0, columns - 1).astype(int)]
    return water


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Where the eye is above a height map of size 1 x 1 (heights in the same unit), looking along +y."""

    x: float
    y: float
    altitude: float
    horizon: float  # row of the horizon, as a share of the picture's height
    field: float = 0.9  # width of the view at distance 1
    farthest: float = 0.9


def sunlit(heights: Field, sun: tuple[float, float, float], softness: float = 6.0) -> tuple[Field, Field]:
    """How much sun falls on each place of a height map: by its slope, and 0 where something stands in the way.

    sun: direction to it (x, y, up). Returns (slope term in [0, 1], light that arrives in [0, 1]).
    """
    size = heights.shape[0]
    dy, dx = np.gradient(heights * size)
    normal = np.stack([-dx, -dy, np.ones_like(dx)], axis=-1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    direction = np.array(sun) / np.linalg.norm(sun)
    facing = np.clip(normal @ direction, 0, 1)
    light = np.ones_like(heights)
    ground = np.hypot(direction[0], direction[1])
    for distance in np.geomspace(1.5, size * 0.25, 48):
        step = distance * direction[:2] / ground
        blocker = np.roll(heights, (-round(step[1]), -round(step[0])), axis=(0, 1))
        clearance = (heights - blocker) * size + distance * direction[2] / ground
        light = np.minimum(light, np.clip(0.5 + clearance * softness / distance, 0, 1))
    return facing, light


def look(view: View, heights: Field, shape: tuple[int, int]) -> tuple[Field, Field, Field]:
    """Look at a height map: for each pixel the place (row, column of the map) and distance; distance inf is sky.

    Casts each column of the picture front to back, as voxel landscapes were drawn in the 1990s.
    """
    rows, columns = shape
    size = heights.shape[0]
    distances = np.geomspace(0.02, view.farthest, 900)
    across = (np.arange(columns) + 0.5) / columns - 0.5
    map_x = (view.x + across[None, :] * view.field * distances[:, None]) * size
    map_y = np.broadcast_to((view.y + distances[:, None]) * size, map_x.shape)
    ground = sample(heights, map_y, map_x)
    scale = columns / view.field  # pixels that a length of 1 takes at distance 1
    seen = view.horizon * rows + (view.altitude - ground) / distances[:, None] * scale
    skyline = np.minimum.accumulate(seen, axis=0)
    nearest = np.stack([np.searchsorted(-skyline[:, c], -np.arange(rows) - 0.5) for c in range(columns)], axis=1)
    hit = nearest < len(distances)
    index = np.minimum(nearest, len(distances) - 1)
    place_y = np.take_along_axis(map_y, index, axis=0)
    place_x = np.take_along_axis(map_x, index, axis=0)
    return place_y % size, place_x % size, np.where(hit, distances[index], np.inf)


def sample(field: Field, rows: Field, columns: Field) -> Field:
    """A map's values at fractional places, between the four nearest."""
    size = field.shape[0]
    y0, x0 = np.floor(rows).astype(int), np.floor(columns).astype(int)
    fy, fx = (rows - y0), (columns - x0)
    if field.ndim == 3:
        fy, fx = fy[..., None], fx[..., None]
    y0, x0, y1, x1 = y0 % size, x0 % size, (y0 + 1) % size, (x0 + 1) % size
    upper = field[y0, x0] * (1 - fx) + field[y0, x1] * fx
    lower = field[y1, x0] * (1 - fx) + field[y1, x1] * fx
    return np.asarray(upper * (1 - fy) + lower * fy)
