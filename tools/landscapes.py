"""Landscapes of the demo, painted in numpy: hills, peaks, northern lights, dunes. The same pixels each time."""

from __future__ import annotations

import numpy as np

from tools.painting import (
    Field,
    Random,
    View,
    below,
    colour,
    conifers,
    disc,
    glow,
    gradient,
    grid,
    line_noise,
    look,
    mirrored,
    noise,
    over,
    sample,
    smooth,
    stars,
    sunlit,
    to_display,
)


def sunrise(height: int, width: int) -> Field:
    """Misty hills one behind the other, the sun just up, all of it again in a lake."""
    random = np.random.default_rng(11)
    x, y = grid(height, width)
    wide = width / height
    sun = (wide * 0.64, 0.40)
    sky = gradient(y, [(0, "27406b"), (0.18, "5b6ea3"), (0.32, "d9909a"), (0.42, "ffc58a"), (0.5, "ffe6b8")])
    clouds = noise(random, *x.shape, slope=1.7, stretch=3.6, lowest=1)
    lit = gradient(y, [(0.05, "8d86b3"), (0.25, "f59f8b"), (0.42, "ffd9a0")])
    sky = over(sky, 0.75 * smooth(0.15, 1.9, clouds) * smooth(0.47, 0.3, y), lit * 1.05)
    sky = sky + glow(x, y, sun, 0.13)[..., None] * colour("ff9d4d") * 0.85
    sky = over(sky, disc(x, y, sun, 0.042), colour("fff3d0") * 1.7)
    shades = ["c9a3a8", "a98a9f", "7f7394", "575a7f", "37446a", "1f3050"]
    for index, shade in enumerate(shades):
        near = index / (len(shades) - 1)
        line = 0.455 + 0.028 * index - (0.055 - 0.018 * near) * line_noise(random, x.shape[1], slope=1.55, lowest=0.6)
        line = np.minimum(line, 0.60 - 0.004 * (len(shades) - index))
        mist = smooth(0.13, 0.0, y - line[None, :])[..., None]
        hill = colour(shade) * (0.9 + 0.1 * mist) + (1 - mist) * colour("ffd6ae") * (0.30 - 0.22 * near)
        sky = over(sky, below(y, line), hill)
        if index >= 4:
            step = 0.011 if index == 4 else 0.02
            tall = (0.03, 0.05) if index == 4 else (0.05, 0.11)
            places = [
                (px, line[int(px * x.shape[0])] + 0.006, random.uniform(*tall))
                for px in np.arange(0.0, wide, step) + random.uniform(-0.004, 0.004, len(np.arange(0.0, wide, step)))
                if 0 <= px < wide and random.random() < (0.8 if index == 4 else 0.55)
            ]
            sky = over(sky, conifers(random, (x.shape[0], x.shape[1]), places), colour(shade) * 0.85)
    waves = noise(random, *x.shape, slope=0.9, stretch=9, lowest=6) * smooth(0.6, 1.0, y) * 22
    lake = mirrored(sky, 0.615, waves, reach=1.25)
    depth = smooth(0.6, 1.0, y)
    water = over(lake, np.where(y > 0.615, 0.20 + 0.45 * depth, 0), colour("2a3d63") * 0.8)
    spark = np.exp(-(((x - sun[0]) / (0.03 + 0.09 * depth)) ** 2)) * smooth(0.3, 2.2, waves / 11) * (y > 0.615)
    return to_display(water + spark[..., None] * colour("ffc27a") * 0.8)


def alpine(height: int, width: int) -> Field:
    """Snow peaks in the evening: blue shadows, warm light, forest below."""
    random = np.random.default_rng(5)
    size = 1024
    base = noise(random, size, size, slope=3.0, lowest=2)
    crease = -np.abs(noise(random, size, size, slope=2.55, lowest=3))
    heights = 0.022 * base + 0.055 * crease + 0.0026 * noise(random, size, size, slope=2.1, lowest=20)
    heights -= heights.min()
    rise = smooth(0.25, 0.62, np.linspace(0, 1, size))[:, None]
    heights = heights * (0.30 + 0.95 * rise)
    facing, light = sunlit(heights, (-0.85, -0.30, 0.42))
    view = View(x=0.50, y=0.10, altitude=0.122, horizon=0.40, field=0.80, farthest=0.90)
    x, y = grid(height, width)
    rows, columns, distance = look(view, heights, (x.shape[0], x.shape[1]))
    sky = gradient(y, [(0, "2f5d9e"), (0.25, "7fa6d0"), (0.45, "f6d9c0"), (0.6, "ffe9d0")])
    clouds = noise(random, *x.shape, slope=1.6, stretch=2.4, lowest=1.5)
    sky = over(sky, 0.8 * smooth(0.1, 2.0, clouds) * smooth(0.5, 0.1, y), colour("fff1e6"))
    ground = _alpine_ground(random, heights)
    sun = (facing * light)[..., None] * colour("ffc890") * 1.75
    shade = (0.55 + 0.45 * smooth(-2.5, 0.0, crease))[..., None] * colour("86a8e6") * 0.55
    lit = sample(ground * (sun + shade), rows, columns)
    haze = (1 - np.exp(-((np.where(np.isinf(distance), 1, distance) / 1.25) ** 2)))[..., None]
    lit = lit * (1 - haze) + haze * colour("d5cfe0") * 0.95
    return to_display(np.where(np.isinf(distance)[..., None], sky, lit))


def _alpine_ground(random: Random, heights: Field) -> Field:
    size = heights.shape[0]
    dy, dx = np.gradient(heights * size)
    steep = np.hypot(dx, dy)
    patch = noise(random, size, size, slope=0.9, lowest=8)
    snow = smooth(0.074, 0.094, heights + 0.004 * patch) * smooth(2.3, 1.1, steep + 0.10 * patch)
    forest = smooth(0.088, 0.072, heights + 0.004 * patch) * smooth(1.6, 0.9, steep)
    ground = np.broadcast_to(colour("5d5560"), (size, size, 3)) * (1 + 0.18 * patch[..., None])
    crowns = noise(random, size, size, slope=0.5, lowest=40)
    ground = over(ground, forest, colour("25402f") * (0.9 + 0.40 * np.clip(crowns, -1.5, 2))[..., None])
    return over(ground, snow, colour("f6f7fb") * 0.95)


def aurora(height: int, width: int) -> Field:
    """Northern lights over pines and a still lake, with every star that fits."""
    random = np.random.default_rng(23)
    x, y = grid(height, width)
    wide = width / height
    sky = gradient(y, [(0, "050a1f"), (0.35, "0b1f3f"), (0.6, "173a55"), (1, "173a55")])
    sky = sky + stars(random, height, width, 0.0016)[..., None] * colour("dfe9ff")
    rays = line_noise(random, x.shape[1], slope=0.9, lowest=4)
    for foot, tall, wave, tint, strength in (
        (0.30, 0.20, 0.045, ("7dffb0", "c255d0"), 0.30),
        (0.50, 0.34, 0.040, ("2fe0b0", "a04fe0"), 0.45),
        (0.44, 0.40, 0.060, ("46f5a0", "5a3fd6"), 1.0),
    ):
        bend = line_noise(random, x.shape[1], slope=2.4, lowest=0.8)
        rise = (foot + wave * bend[None, :] - y) / tall
        body = np.exp(-3.2 * np.maximum(rise, 0)) * smooth(-0.14, 0.03, rise) * smooth(1.3, 0.4, rise)
        drapery = np.roll(rays, int(foot * 1000))
        veil = smooth(-1.6, 1.4, line_noise(random, x.shape[1], slope=1.9, lowest=1.2))  # not as bright everywhere
        light = strength * body * (np.clip(0.75 + 0.22 * drapery, 0.2, 1.6) * veil)[None, :]
        sky = sky + light[..., None] * gradient(np.clip(rise, 0, 1), [(0, tint[0]), (0.4, tint[0]), (1, tint[1])]) * 0.9
    far = 0.600 - 0.035 * line_noise(random, x.shape[1], slope=1.5, lowest=1)
    sky = over(sky, below(y, np.minimum(far, 0.645)), colour("0d2233"))
    rows: tuple[tuple[float, tuple[float, float], str], ...] = (
        (0.010, (0.03, 0.07), "081722"),
        (0.022, (0.08, 0.20), "040c13"),
    )
    for density, heights, shade in rows:
        edge = np.abs(np.linspace(-1, 1, int(wide / density)))
        places = [
            (px * wide, 0.655, random.uniform(*heights) * (0.45 + 0.75 * e**1.6))
            for px, e in zip(np.linspace(0, 1, len(edge)) + random.uniform(-0.01, 0.01, len(edge)), edge, strict=True)
        ]
        sky = over(sky, conifers(random, (x.shape[0], x.shape[1]), places), colour(shade))
    waves = noise(random, *x.shape, slope=1.0, stretch=8, lowest=5) * smooth(0.64, 1.0, y) * 12
    lake = mirrored(sky, 0.655, waves, reach=1.3)
    return to_display(over(lake, np.where(y > 0.655, 0.22, 0), colour("06131f")))


def dunes(height: int, width: int) -> Field:
    """Sand dunes in low sun, knife-edge crests and long blue shadows."""
    random = np.random.default_rng(31)
    size = 1024
    row, column = np.mgrid[0:size, 0:size] / size
    warp = 0.055 * noise(random, size, size, slope=3.0, lowest=1)
    phase = (row * 4.0 + 0.35 * np.sin(2 * np.pi * column + 1) + warp * 7) % 1.0
    crest = np.where(phase < 0.70, (phase / 0.70) ** 1.6, ((1 - phase) / 0.30) ** 1.1)
    swell = noise(random, size, size, slope=3.0)
    heights = 0.075 * crest * np.clip(0.75 + 0.35 * swell, 0.15, 1.5) + 0.008 * np.roll(swell, 300, axis=1)
    ripples = np.sin(2 * np.pi * (row * 120 + column * 150 + warp * 200))
    heights = heights - heights.min() + 0.00018 * ripples
    facing, light = sunlit(heights, (-0.80, -0.60, 0.34))
    view = View(x=0.42, y=0.06, altitude=0.165, horizon=0.24, field=0.95, farthest=0.92)
    x, y = grid(height, width)
    rows, columns, distance = look(view, heights, (x.shape[0], x.shape[1]))
    sand = over(
        np.broadcast_to(colour("d98a4a"), (size, size, 3)), 0.4 * smooth(-1, 2, ripples + warp * 20), colour("f0b070")
    )
    lit = sample(sand * ((facing * light)[..., None] * colour("ffc07a") * 2.5 + colour("7d8fd0") * 0.36), rows, columns)
    haze = (1 - np.exp(-((np.where(np.isinf(distance), 1, distance) / 1.05) ** 2.2)))[..., None]
    lit = lit * (1 - haze) + haze * colour("f6cfa8")
    sky = gradient(y, [(0, "3f78b8"), (0.2, "9cc0dc"), (0.33, "fbe3c4"), (0.45, "ffe9cf")])
    streaks = noise(random, *x.shape, slope=1.6, stretch=6, lowest=1)
    sky = over(sky, 0.55 * smooth(0.2, 2.2, streaks) * smooth(0.33, 0.1, y), colour("fff6ea"))
    return to_display(np.where(np.isinf(distance)[..., None], sky, lit))
