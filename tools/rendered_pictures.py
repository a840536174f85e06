"""Pictures for the training of nano decoders, rendered from code: text, windows, line art, noise, spheres.

python -m tools.rendered_pictures FOLDER --count 160
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIDE: Final = 1024
WORDS: Final = (  # noqa: SIM905 forty quotes would hide the words
    "latent decode sampler noise picture stream daemon frame gradient tensor colour light shadow river stone leaf "
    "window table morning quiet copper violet harbour engine paper 0123 4567 $89 {x} <y> == != ( ) ; # & @ ÄÖÜ éàç"
).split()

Array = NDArray[np.float64]


def _colour(random: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in random.integers(0, 256, 3))
    return red, green, blue


def _font(random: np.random.Generator, low: int = 12, high: int = 96) -> Any:
    return ImageFont.load_default(size=int(np.exp(random.uniform(math.log(low), math.log(high)))))


def field(random: np.random.Generator, roughness: float) -> Array:
    """Noise with a 1/f^roughness spectrum, (SIDE, SIDE) in [0, 1]."""
    frequencies = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None])
    frequencies[0, 0] = 1
    spectrum = np.fft.rfft2(random.standard_normal((SIDE, SIDE))) / frequencies**roughness
    spectrum[0, 0] = 0
    values = np.fft.irfft2(spectrum, s=(SIDE, SIDE))
    low, high = np.percentile(values, (0.5, 99.5))
    return np.clip((values - low) / (high - low), 0, 1)


def _palette(random: np.random.Generator, values: Array) -> Image.Image:
    """Values in [0, 1] through a palette of a few colours."""
    stops = random.integers(2, 7)
    colours = random.uniform(0, 255, (stops, 3))
    place = np.linspace(0, 1, stops)
    channels = [np.interp(values, place, colours[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def clouds(random: np.random.Generator) -> Image.Image:
    """A noise field through a palette."""
    return _palette(random, field(random, random.uniform(0.6, 2.2)))


def gradient(random: np.random.Generator) -> Image.Image:
    """A few smooth blobs of colour."""
    y, x = np.mgrid[0 : 1 : SIDE * 1j, 0 : 1 : SIDE * 1j]
    picture = np.zeros((SIDE, SIDE, 3)) + random.uniform(0, 1, 3)
    for _ in range(random.integers(1, 6)):
        at, width = random.uniform(-0.2, 1.2, 2), random.uniform(0.1, 0.9)
        weight = np.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / width**2)[..., None]
        picture = picture * (1 - weight) + weight * random.uniform(0, 1, 3)
    return Image.fromarray((picture * 255).astype(np.uint8))


def page(random: np.random.Generator) -> Image.Image:
    """Lines of words in many sizes."""
    is_dark = random.random() < 0.4
    image = Image.new("RGB", (SIDE, SIDE), _shade(random, dark=is_dark))
    draw = ImageDraw.Draw(image)
    y = int(random.integers(0, 40))
    while y < SIDE:
        font = _font(random)
        words = " ".join(random.choice(WORDS, 20))
        ink = _shade(random, dark=not is_dark) if random.random() < 0.7 else _colour(random)
        draw.text((int(random.integers(-20, 80)), y), words, fill=ink, font=font)
        y += int(font.size * random.uniform(1.0, 1.8))
    return image


def _shade(random: np.random.Generator, *, dark: bool) -> tuple[int, int, int]:
    level, tint = (random.integers(0, 60) if dark else random.integers(195, 245)), random.integers(0, 11, 3)
    red, green, blue = (int(level + value) for value in tint)
    return red, green, blue


def windows(random: np.random.Generator) -> Image.Image:
    """Panels, buttons, tables and labels, as of a program."""
    is_dark = random.random() < 0.5
    image = (clouds if random.random() < 0.5 else gradient)(random)
    draw = ImageDraw.Draw(image)
    for _ in range(random.integers(3, 9)):
        x, y = (int(value) for value in random.integers(-50, SIDE - 150, 2))
        width, height = (int(value) for value in random.integers(150, 650, 2))
        draw.rounded_rectangle(
            (x, y, x + width, y + height),
            int(random.integers(0, 24)),
            fill=_shade(random, dark=is_dark),
            outline=_colour(random),
        )
        draw.rectangle((x, y, x + width, y + 28), fill=_colour(random))
        font = _font(random, 11, 26)
        for row in range(y + 40, y + height - 24, int(font.size * 1.6)):
            if random.random() < 0.15:
                draw.rounded_rectangle((x + 10, row, x + width // 2, row + int(font.size) + 4), 5, fill=_colour(random))
            words = " ".join(random.choice(WORDS, max(1, width // 110)))
            draw.text((x + 14, row), words, fill=_shade(random, dark=not is_dark), font=font)
    return image


def shapes(random: np.random.Generator) -> Image.Image:
    """Flat shapes over each other."""
    image = Image.new("RGB", (SIDE, SIDE), _colour(random))
    draw = ImageDraw.Draw(image)
    for _ in range(random.integers(5, 90)):
        at, size = random.uniform(0, SIDE, 2), float(np.exp(random.uniform(2, 6)))
        if random.random() < 0.4:
            draw.ellipse((*(at - size / 2), *(at + size / 2 * random.uniform(0.3, 1, 2))), fill=_colour(random))
        else:
            points = at + random.standard_normal((random.integers(3, 7), 2)) * size / 2
            draw.polygon([tuple(point) for point in points], fill=_colour(random))
    return image.filter(ImageFilter.GaussianBlur(float(random.uniform(0, 1.2))))


def line_art(random: np.random.Generator) -> Image.Image:
    """Curves of a pen."""
    is_dark = random.random() < 0.3
    large = Image.new("RGB", (2 * SIDE, 2 * SIDE), _shade(random, dark=is_dark))
    draw = ImageDraw.Draw(large)
    for _ in range(random.integers(8, 70)):
        steps = int(random.integers(20, 400))
        heading = np.cumsum(random.standard_normal(steps) * random.uniform(0.02, 0.4)) + random.uniform(0, 7)
        stride = random.uniform(4, 16)
        path = np.cumsum(np.stack([np.cos(heading), np.sin(heading)], axis=1) * stride, axis=0)
        points = [tuple(point) for point in path + random.uniform(0, 2 * SIDE, 2)]
        ink = _shade(random, dark=not is_dark) if random.random() < 0.7 else _colour(random)
        draw.line(points, fill=ink, width=int(random.integers(1, 12)), joint="curve")
    return large.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def cells(random: np.random.Generator) -> Image.Image:
    """Voronoi cells with a texture."""
    count = int(np.exp(random.uniform(math.log(8), math.log(400))))
    points, colours = random.uniform(0, SIDE, (count, 2)), random.uniform(0, 255, (count, 3))
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    nearest, distance = np.zeros((SIDE, SIDE), dtype=int), np.full((SIDE, SIDE), np.inf)
    for index, (px, py) in enumerate(points):
        squared = (x - px) ** 2.0 + (y - py) ** 2.0
        closer = squared < distance
        nearest[closer], distance[closer] = index, squared[closer]
    grain = field(random, random.uniform(0.3, 1.8))[..., None]
    picture = colours[nearest] * (1 - random.uniform(0, 0.7) * grain)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def fractal(random: np.random.Generator) -> Image.Image:
    """A Julia set."""
    angle, zoom = random.uniform(0, 2 * math.pi), random.uniform(0.3, 1.6)
    constant = 0.7885 * np.exp(1j * angle)
    y, x = np.mgrid[-zoom : zoom : SIDE * 1j, -zoom : zoom : SIDE * 1j]
    value, count = x + 1j * y, np.zeros((SIDE, SIDE))
    for _ in range(90):
        inside = np.abs(value) < 4
        value[inside] = value[inside] ** 2 + constant
        count += inside
    smooth = count - np.log2(np.log2(np.maximum(np.abs(value), 2)) + 1)
    return _palette(random, (smooth - smooth.min()) / (np.ptp(smooth) + 1e-9))


def stripes(random: np.random.Generator) -> Image.Image:
    """Gratings, rings and checks, from coarse to fine."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    period = np.exp(random.uniform(math.log(4), math.log(200))) / SIDE
    angle = random.uniform(0, math.pi)
    across = x * math.cos(angle) + y * math.sin(angle)
    along = y * math.cos(angle) - x * math.sin(angle)
    kind = random.integers(3)
    if kind == 0:
        waves = np.sin(2 * math.pi * across / period * (1 + random.uniform(0, 1) * along))
    elif kind == 1:
        waves = np.sin(2 * math.pi * np.hypot(x - random.random(), y - random.random()) / period)
    else:
        waves = np.sin(2 * math.pi * across / period) * np.sin(2 * math.pi * along / period)
    values = np.clip(waves * np.exp(random.uniform(-0.5, 3)) / 2 + 0.5, 0, 1)
    return _palette(random, values)


def spheres(random: np.random.Generator) -> Image.Image:
    """Ray-traced spheres on a checked floor under a sky, with shadows, one mirror bounce, and grain on some."""
    y, x = np.mgrid[1 : -1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    rays = np.stack([x, y * 1.0 - 0.15, np.full_like(x, 1.4)], axis=-1)
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    count = int(random.integers(2, 8))
    centres = np.stack([random.uniform(-2.5, 2.5, count), np.zeros(count), random.uniform(2.5, 7, count)], axis=1)
    radii = random.uniform(0.25, 1.0, count)
    centres[:, 1] = radii - 1
    scene = {
        "centres": centres,
        "radii": radii,
        "colours": random.uniform(0.05, 1, (count, 3)),
        "floor": random.uniform(0, 1, (2, 3)),
        "sky": random.uniform(0.1, 1, (2, 3)),
        "light": _unit(np.array([random.uniform(-1, 1), random.uniform(0.5, 1.5), random.uniform(-1, 0.3)])),
        "check": random.uniform(0.5, 3),
        "mirror": random.uniform(0, 0.6, count),
    }
    picture = _trace(scene, np.zeros((SIDE, SIDE, 3)), rays, 2)
    if random.random() < 0.5:
        picture *= 0.7 + 0.6 * field(random, random.uniform(0.2, 1.2))[..., None]
    return Image.fromarray((picture.clip(0, 1) ** 0.6 * 255).astype(np.uint8))


def _unit(vector: Array) -> Array:
    return np.asarray(vector / np.linalg.norm(vector))


def _hit(scene: dict[str, Any], origin: Array, rays: Array) -> tuple[Array, NDArray[np.int64]]:
    """Distance to the nearest sphere along each ray, and which; infinity and -1 where there is none."""
    nearest, which = np.full(rays.shape[:2], np.inf), np.full(rays.shape[:2], -1)
    for index, (centre, radius) in enumerate(zip(scene["centres"], scene["radii"], strict=True)):
        offset = origin - centre
        half = (offset * rays).sum(-1)
        root = half**2 - (offset**2).sum(-1) + radius**2
        distance = -half - np.sqrt(np.maximum(root, 0))
        closer = (root > 0) & (distance > 1e-3) & (distance < nearest)
        nearest[closer], which[closer] = distance[closer], index
    return nearest, which


def _trace(scene: dict[str, Any], origin: Array, rays: Array, bounces: int) -> Array:
    """Colours (SIDE, SIDE, 3) that come along the rays."""
    distance, which = _hit(scene, origin, rays)
    floor = np.where(rays[..., 1] < -1e-4, (-1 - origin[..., 1]) / np.minimum(rays[..., 1], -1e-4), np.inf)
    is_floor = floor < distance
    reach = np.minimum(distance, floor)
    is_sky = ~np.isfinite(reach)
    at = origin + rays * np.where(is_sky, 0, reach)[..., None]
    safe = np.maximum(which, 0)
    normal = np.where(is_floor[..., None], np.array([0.0, 1.0, 0.0]), (at - scene["centres"][safe]))
    normal = normal / np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-6)
    checks = (np.floor(at[..., 0] * scene["check"]) + np.floor(at[..., 2] * scene["check"])) % 2
    base = np.where(is_floor[..., None], scene["floor"][checks.astype(int)], scene["colours"][safe])
    lit, _ = _hit(scene, at, np.broadcast_to(scene["light"], rays.shape))
    diffuse = np.maximum((normal * scene["light"]).sum(-1), 0) * ~np.isfinite(lit)
    colour = base * (0.25 + 0.75 * diffuse[..., None])
    reflected = rays - 2 * (rays * normal).sum(-1, keepdims=True) * normal
    shine = np.maximum((reflected * scene["light"]).sum(-1), 0) ** 40 * (diffuse > 0)
    colour = colour + 0.6 * shine[..., None]
    if bounces > 1:
        share = np.where(is_floor, 0.1, scene["mirror"][safe])[..., None]
        colour = colour * (1 - share) + share * _trace(scene, at, reflected, bounces - 1)
    up = np.clip(rays[..., 1:2] + 0.2, 0, 1)
    sky = scene["sky"][0] * (1 - up) + scene["sky"][1] * up
    return np.asarray(np.where(is_sky[..., None], sky, colour))


KINDS: Final[tuple[Callable[[np.random.Generator], Image.Image], ...]] = (
    page,
    windows,
    shapes,
    line_art,
    cells,
    spheres,
    clouds,
    gradient,
    fractal,
    stripes,
)


def main() -> None:
    """Write the pictures as PNG."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=160)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for index in range(arguments.count):
        kind = KINDS[index % len(KINDS)]
        kind(np.random.default_rng(index)).save(arguments.folder / f"{kind.__name__}_{index:03d}.png")


if __name__ == "__main__":
    main()
