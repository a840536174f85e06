"""Scenes of the demo with things in them, painted in numpy: a city, balloons, poppies, a lighthouse, a boat."""

from __future__ import annotations

import numpy as np

from tools.painting import (
    Field,
    Random,
    below,
    box,
    colour,
    disc,
    glow,
    gradient,
    grid,
    line_noise,
    mirrored,
    noise,
    over,
    smooth,
    stars,
    to_display,
)


def city(height: int, width: int) -> Field:
    """A skyline after sunset, lit windows, and its lights in the water."""
    random = np.random.default_rng(8)
    x, y = grid(height, width)
    wide = width / height
    picture = gradient(y, [(0, "121a42"), (0.25, "37306b"), (0.45, "a3476f"), (0.58, "f2895f"), (0.68, "ffc98a")])
    clouds = noise(random, *x.shape, slope=1.7, stretch=3.0, lowest=1)
    picture = over(picture, 0.55 * smooth(0.2, 2.0, clouds) * smooth(0.65, 0.3, y), colour("e06a7a"))
    picture = picture + stars(random, height, width, 0.0005)[..., None] * smooth(0.35, 0.0, y)[..., None]
    for shade, low, high, broad, lights in (
        ("8a4a68", 0.40, 0.56, (0.03, 0.06), 0.0),
        ("4b2f57", 0.26, 0.52, (0.05, 0.09), 0.16),
        ("1c1a36", 0.22, 0.58, (0.07, 0.13), 0.42),
    ):
        left = -0.02
        while left < wide:
            right = left + random.uniform(*broad)
            middle = 1 - abs((left + right) / wide - 1)
            top = 0.66 - (0.66 - random.uniform(low, high)) * (0.55 + 0.45 * middle)
            picture = _tower(random, picture, x, y, (left, right, top), colour(shade), lights)
            left = right + random.uniform(-0.012, 0.02)
    waves = noise(random, *x.shape, slope=0.8, stretch=12, lowest=8) * smooth(0.64, 0.9, y) * 26
    water = mirrored(picture, 0.67, waves, reach=1.55)
    return to_display(over(water, np.where(y > 0.67, 0.18 + 0.35 * smooth(0.67, 1, y), 0), colour("1a1c40")))


def _tower(
    random: Random, picture: Field, x: Field, y: Field, place: tuple[float, float, float], paint: Field, lights: float
) -> Field:
    left, right, top = place
    body = box(x, y, left, right, top, 0.67)
    if random.random() < 0.5:  # a smaller storey on the roof, and an aerial
        inset = (right - left) * random.uniform(0.15, 0.32)
        body = np.maximum(body, box(x, y, left + inset, right - inset, top - 0.03, top))
        middle = (left + right) / 2
        body = np.maximum(body, box(x, y, middle - 0.0016, middle + 0.0016, top - 0.075, top))
    edge = 1 + 0.35 * smooth(right - 0.25 * (right - left), right, x)[..., None]
    picture = over(picture, body, paint * edge)
    if not lights:
        return picture
    pitch = 0.0135
    columns, rows = ((x - left) / pitch).astype(int), ((y - top) / (pitch * 1.25)).astype(int)
    inside = ((x - left) / pitch % 1 > 0.36) & ((y - top) / (pitch * 1.25) % 1 > 0.42)
    lit = random.random((400, 400)) < lights
    tone = gradient(random.random((400, 400)), [(0, "ffb257"), (0.7, "ffd98f"), (1, "cfe6ff")])
    window = box(x, y, left + 0.003, right - 0.003, top + 0.006, 0.66) * inside * lit[rows % 400, columns % 400]
    return over(picture, window, tone[rows % 400, columns % 400] * 1.15)


def balloons(height: int, width: int) -> Field:
    """Hot-air balloons over a valley in the morning."""
    random = np.random.default_rng(42)
    x, y = grid(height, width)
    picture = gradient(y, [(0, "4b93d8"), (0.4, "a5cdea"), (0.62, "fde7c8"), (0.75, "ffeccf")])
    clouds = noise(random, *x.shape, slope=1.7, stretch=2.2, lowest=1.2)
    picture = over(picture, 0.85 * smooth(0.1, 1.9, clouds) * smooth(0.68, 0.3, y), colour("ffffff"))
    for index, shade in enumerate(("b9c7d6", "93b0b4", "6f9a82", "4f8358", "366b3d")):
        line = 0.66 + 0.062 * index - 0.028 * line_noise(random, x.shape[1], slope=1.7, lowest=0.7)
        fall = smooth(0, 0.16, y - line[None, :])[..., None]
        picture = over(picture, below(y, line), colour(shade) * (1.12 - 0.25 * fall))
        if index >= 2:
            tufts = noise(random, *x.shape, slope=0.75, stretch=1.6, lowest=14)
            picture = over(picture, below(y, line) * 0.35 * smooth(0.1, 1.6, tufts), colour(shade) * 0.55)
    for centre, radius, tones in (
        ((0.135, 0.50), 0.052, ("3a6ea5", "ebebeb")),
        ((0.50, 0.44), 0.040, ("f2cc3f", "3f8f6b")),
        ((0.42, 0.23), 0.115, ("e4572e", "ffc857")),
        ((0.20, 0.335), 0.072, ("8e44ad", "f39ac7")),
        ((0.555, 0.60), 0.026, ("d7263d", "f7f7f2")),
    ):
        picture = _balloon(picture, x, y, centre, radius, tones)
    return to_display(picture)


def _balloon(
    picture: Field, x: Field, y: Field, centre: tuple[float, float], radius: float, tones: tuple[str, str]
) -> Field:
    across, down = (x - centre[0]) / radius, (y - centre[1]) / radius
    taper = np.where(down > 0, np.sqrt(np.clip(1 - (down / 1.45) ** 2, 0, 1)) * (1 - 0.18 * np.clip(down, 0, 1.4)), 1)
    round_top = np.sqrt(np.clip(1 - down**2, 0, 1))
    half = np.where(down > 0, taper, round_top)
    skin = smooth(1.02, 0.98, np.abs(across) / np.maximum(half, 1e-6)) * (down > -1) * (down < 1.28)
    turn = np.arcsin(np.clip(across / np.maximum(half, 1e-6), -1, 1))  # around the envelope
    gore = ((turn / np.pi + 0.5) * 8).astype(int) % 2
    paint = np.where(gore[..., None] == 0, colour(tones[0]), colour(tones[1]))
    light = np.clip(0.62 - 0.45 * np.sin(turn) - 0.30 * down, 0.28, 1.25)[..., None]
    picture = over(picture, skin, paint * light)
    ropes = (np.abs(np.abs(across) - (0.30 - 0.10 * (down - 1.28))) < 0.022) * (down >= 1.28) * (down < 1.75)
    basket = (np.abs(across) < 0.20) * (down >= 1.72) * (down < 2.02)
    return over(over(picture, ropes * 0.8, colour("4a3527")), basket.astype(float), colour("6b4427"))


def meadow(height: int, width: int) -> Field:
    """Poppies and daisies up close, a blurred field behind."""
    random = np.random.default_rng(77)
    x, y = grid(height, width)
    wide = width / height
    picture = gradient(y, [(0, "9fd0ee"), (0.3, "e9f2d0"), (0.42, "b8cf73"), (0.7, "6f9f3f"), (1, "2f5f25")])
    blur = noise(random, *x.shape, slope=1.6, lowest=4)
    picture = over(picture, 0.5 * smooth(0.2, 1.8, blur) * smooth(0.3, 0.6, y), colour("d7e38a"))
    for _ in range(46):  # out of focus
        place = (random.uniform(0, wide), random.uniform(0.36, 0.62))
        tint = colour(str(random.choice(["e8503a", "f2f2e6", "f5c542"])))
        picture = over(picture, 0.55 * smooth(1.0, 0.55, np.hypot(x - place[0], y - place[1]) / 0.022), tint)
    for _ in range(260):  # grass
        foot, tall, lean = random.uniform(-0.05, wide + 0.05), random.uniform(0.15, 0.5), random.uniform(-0.12, 0.12)
        t = np.clip((1.02 - y) / tall, 0, 1)
        blade = (np.abs(x - foot - lean * t**2) < 0.006 * (1 - t)) * (y > 1.02 - tall)
        picture = over(picture, blade * 0.85, colour(str(random.choice(["3f7a2a", "5c9a37", "86b84d"]))) * 0.9)
    for place, radius in (((0.30, 0.44), 0.135), ((0.70, 0.58), 0.155), ((0.52, 0.27), 0.085), ((0.12, 0.70), 0.095)):
        picture = _poppy(random, picture, x, y, place, radius)
    return to_display(picture)


def _poppy(random: Random, picture: Field, x: Field, y: Field, place: tuple[float, float], radius: float) -> Field:
    bend = random.uniform(-0.06, 0.06)
    stem = (np.abs(x - place[0] - bend * (y - place[1])) < 0.0065) * (y > place[1])
    picture = over(picture, stem.astype(float), colour("4c7f34"))
    across, down = (x - place[0]) / radius, (y - place[1]) / (radius * 0.72)
    angle, far = np.arctan2(down, across), np.hypot(across, down)
    for turn in (0.4, 2.1, 3.6, 5.2):  # four petals, one over the other
        off = np.angle(np.exp(1j * (angle - turn)))
        reach = 0.98 * np.cos(np.clip(off * 0.78, -1.5, 1.5)) ** 0.55 * (1 + 0.05 * np.sin(9 * off + turn))
        petal = smooth(1.0, 0.96, far / np.maximum(reach, 1e-6)) * (np.abs(off) < 1.6)
        crease = 0.86 + 0.14 * np.cos(14 * off + 5 * far)
        tone = gradient(np.clip(far, 0, 1), [(0, "7d0f12"), (0.35, "d52b1e"), (0.8, "f2512f"), (1, "ff7a4d")])
        picture = over(picture, petal, tone * (crease * (0.8 + 0.25 * np.cos(off)))[..., None])
    picture = over(picture, smooth(0.30, 0.24, far), colour("20140f"))
    dots = smooth(0.35, 0.33, np.abs(far - 0.30) * 6) * (np.cos(angle * 17) > 0.2)
    return over(picture, dots * 0.9, colour("2b1a12"))


def lighthouse(height: int, width: int, moment: float = 0.0) -> Field:
    """A lighthouse at nightfall; `moment` from 0 to 1 is one turn of its lamp, and the last meets the first."""
    random = np.random.default_rng(3)
    x, y = grid(height, width)
    wide = width / height
    picture = gradient(y, [(0, "10193f"), (0.3, "33417c"), (0.5, "a9688d"), (0.62, "f6a878"), (0.70, "ffd29a")])
    picture = picture + stars(random, height, width, 0.0006)[..., None] * smooth(0.45, 0.05, y)[..., None]
    turn = np.exp(2j * np.pi * moment)
    drift = noise(random, *x.shape, slope=1.9, stretch=3.2, lowest=2)
    clouds = noise(random, *x.shape, slope=1.75, stretch=3.2, lowest=1)
    clouds = clouds + 0.3 * (turn.real * drift + turn.imag * np.roll(drift, x.shape[0] // 4, axis=1))
    picture = over(picture, 0.6 * smooth(0.2, 1.9, clouds) * smooth(0.68, 0.3, y), colour("d9788a"))
    sea = gradient(y, [(0.69, "e79a86"), (0.74, "7d5f8f"), (0.86, "2b3a70"), (1, "131c44")])
    swell = noise(random, *x.shape, slope=0.85, stretch=10, lowest=7)
    swell = turn.real * swell + turn.imag * np.roll(swell, x.shape[0] // 3, axis=1)
    sea = over(sea, 0.5 * smooth(0.2, 1.6, swell) * smooth(0.69, 0.72, y), colour("ffb890"))
    sea = over(sea, 0.45 * smooth(0.3, 1.8, -swell), colour("0f1840"))
    picture = np.where((y > 0.69)[..., None], sea, picture)
    lamp = (wide * 0.30, 0.245)
    picture = picture + _beams(x, y, lamp, moment)[..., None] * colour("ffe9b0")
    return to_display(_tower_and_rock(random, picture, x, y, lamp))


def _beams(x: Field, y: Field, lamp: tuple[float, float], moment: float) -> Field:
    """The light of a lamp that turns about an upright axis: two opposite beams, seen from the side."""
    light = 0.8 * glow(x, y, lamp, 0.028) ** 1.2
    for side in (0.0, 0.5):
        turn = 2 * np.pi * (moment + side)
        reach, towards = np.sin(turn), np.cos(turn)  # along the picture, and to the eye
        along, off = (x - lamp[0]) * np.sign(reach), np.abs(y - lamp[1] + 0.03 * (x - lamp[0]) * np.sign(reach))
        spread = 0.012 + np.maximum(along, 0) * (0.10 + 0.25 * max(towards, 0)) / max(abs(reach), 0.08)
        beam = np.exp(-((off / spread) ** 2)) * (along > 0) * np.exp(-np.maximum(along, 0) / (0.9 * abs(reach) + 0.02))
        light = light + 0.75 * abs(reach) ** 0.5 * beam + 0.5 * max(towards, 0) ** 8 * glow(x, y, lamp, 0.09)
    return np.asarray(light)


def _tower_and_rock(random: Random, picture: Field, x: Field, y: Field, lamp: tuple[float, float]) -> Field:
    wide = x.shape[1] / x.shape[0]
    columns = np.linspace(0, wide, x.shape[1])
    shoulder = 0.62 + 0.42 * smooth(0.10, 0.62 * wide, np.abs(columns - lamp[0] + 0.02)) ** 1.2
    line = shoulder + 0.016 * np.abs(line_noise(random, x.shape[1], slope=1.5, lowest=4))
    rock = np.abs(noise(random, *x.shape, slope=2.0, stretch=0.8, lowest=7))
    slope = np.gradient(rock, axis=1) - 0.6 * np.gradient(rock, axis=0)
    facets = smooth(-0.03, 0.03, slope)[..., None]  # lit from the right, like the sky
    stone = gradient(y - line[None, :], [(0, "8a6f86"), (0.04, "57496b"), (0.16, "2f2d52"), (0.38, "14183a")])
    stone = stone * (0.55 + 0.75 * facets)
    picture = over(picture, below(y, line), stone)
    down = (y - lamp[1]) / (0.64 - lamp[1])
    half = 0.030 + 0.020 * down
    across = (x - lamp[0]) / half
    body = (np.abs(across) < 1) * (down > 0.10) * (y < 0.645)
    band = ((down * 5).astype(int) % 2)[..., None]
    round_light = np.clip(0.62 + 0.42 * across, 0.2, 1.1)[..., None]  # the last light comes from the right
    picture = over(picture, body.astype(float), np.where(band == 0, colour("f5efe6"), colour("c8372d")) * round_light)
    gallery = box(x, y, lamp[0] - 0.046, lamp[0] + 0.046, lamp[1] + 0.032, lamp[1] + 0.044)
    room = box(x, y, lamp[0] - 0.024, lamp[0] + 0.024, lamp[1] - 0.022, lamp[1] + 0.032)
    roof = (np.abs(x - lamp[0]) < (y - lamp[1] + 0.062) * 0.85) * (y > lamp[1] - 0.062) * (y < lamp[1] - 0.022)
    picture = over(picture, np.maximum(gallery, roof.astype(float)), colour("2a2238"))
    bars = np.abs(((x - lamp[0]) / 0.012) % 1 - 0.5) > 0.42
    return over(picture, room, np.where(bars[..., None], colour("3a2c30"), colour("fff0b8") * 1.3))


def moonrise(height: int, width: int) -> Field:
    """A sailing boat before a rising moon."""
    random = np.random.default_rng(19)
    x, y = grid(height, width)
    wide = width / height
    moon = (wide * 0.60, 0.36)
    picture = gradient(y, [(0, "0d1b3d"), (0.35, "1f3f6e"), (0.6, "3f7391"), (0.64, "5d93a3")])
    picture = picture + stars(random, height, width, 0.001)[..., None] * smooth(0.55, 0.1, y)[..., None]
    picture = picture + (glow(x, y, moon, 0.16) ** 1.3)[..., None] * colour("bcd6e8") * 0.5
    craters = noise(random, *x.shape, slope=1.5, lowest=5)
    picture = over(
        picture, disc(x, y, moon, 0.155), colour("fdf3da") * (1 - 0.16 * smooth(0.1, 1.6, craters))[..., None]
    )
    clouds = noise(random, *x.shape, slope=1.7, stretch=4, lowest=1.5)
    picture = over(picture, 0.6 * smooth(0.4, 2.0, clouds) * smooth(0.64, 0.45, y), colour("2f5a80"))
    swell = noise(random, *x.shape, slope=0.8, stretch=9, lowest=7)
    sea = gradient(y, [(0.64, "4a8299"), (0.8, "1b436b"), (1, "0a1c3e")])
    sea = over(sea, 0.5 * smooth(0.3, 1.8, swell), colour("0a1a38"))
    path = np.exp(-(((x - moon[0]) / (0.06 + 0.25 * (y - 0.64))) ** 2)) * smooth(-0.2, 1.3, swell)
    picture = np.where((y > 0.64)[..., None], sea + path[..., None] * colour("ffeecb") * 0.9, picture)
    foot, mast = (wide * 0.36, 0.70), 0.40
    dx, dy = x - foot[0], y - foot[1]
    rise = np.clip(-dy / mast, 0, 1)
    main = (dx > 0.006) * (dx < 0.16 * (1 - rise) ** 0.85 + 0.006) * (rise > 0.08) * (rise < 1)
    jib = (dx < -0.006) * (dx > -0.11 * (1 - rise / 0.86)) * (rise > 0.06) * (rise < 0.86)
    hull = (np.abs(dx - 0.01) < 0.15 - 1.6 * np.maximum(dy, 0)) * (dy > 0) * (dy < 0.038)
    picture = over(picture, main.astype(float), colour("e9e2d2") * (0.75 + 0.6 * dx / 0.16)[..., None])
    picture = over(picture, jib.astype(float), colour("d8574a") * (0.8 - 2.0 * dx)[..., None])
    picture = over(picture, np.maximum(hull, box(dx, dy, -0.003, 0.003, -mast, 0.0)), colour("2a1c1a"))
    return to_display(picture)
