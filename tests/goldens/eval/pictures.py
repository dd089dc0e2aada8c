"""Pictures and clips by formula, numpy only (integers, so the same on every machine)."""

import numpy as np

#: name -> (width, height, mode)
PICTURES = {
    "landscape": (640, 480, "RGB"),
    "portrait": (333, 500, "RGB"),
    "square": (336, 336, "RGB"),
    "odd": (337, 335, "RGB"),
    "wide": (901, 260, "RGB"),
    "tiny": (37, 101, "RGB"),
    "large": (1024, 1024, "RGB"),
    "small": (50, 50, "RGB"),
    "grey": (300, 200, "L"),
    "alpha": (240, 320, "RGBA"),
}
#: name -> (width, height); 8 frames each
CLIPS = {
    "clip_landscape": (320, 240),
    "clip_portrait": (180, 320),
    "clip_square": (224, 224),
    "clip_wide": (640, 272),
    "clip_small": (96, 72),
    "clip_hd": (854, 480),
}
LENGTHS = (*range(1, 41), 100, 301)


def _noise(n, seed):
    x = (np.arange(n, dtype=np.uint64) + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(29)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(32)
    return (x & np.uint64(63)).astype(np.int64)


def array(w, h, channels=3, seed=0):
    """[h, w, channels] uint8: ramps, a checkerboard, rings, and 6 bits of noise."""
    y, x = np.mgrid[0:h, 0:w].astype(np.int64)
    parts = [
        x * 190 // max(w - 1, 1),
        y * 190 // max(h - 1, 1),
        ((x // 7 + y // 5) % 2) * 150 + ((x - w // 3) ** 2 + (y - h // 2) ** 2) // 97 % 41,
        (x + 2 * y) % 192,
    ]
    base = np.stack(parts[:channels], -1)
    return (base + _noise(h * w * channels, 1 + seed * 1000003).reshape(h, w, channels)).astype(np.uint8)


def picture(name):
    from PIL import Image

    w, h, mode = PICTURES[name]
    a = array(w, h, len(mode), seed=sorted(PICTURES).index(name))
    return Image.fromarray(a[..., 0] if mode == "L" else a, mode if mode != "RGB" else None)


def clip(name):
    """[8, h, w, 3] uint8."""
    w, h = CLIPS[name]
    k = sorted(CLIPS).index(name)
    return np.stack([np.roll(array(w, h, 3, seed=50 + k), (5 * t, 11 * t), (0, 1)) for t in range(8)])


def counted(length, side=16):
    """[length, side, side, 3] uint8: frame i is one colour, (i % 16 * 16, i // 16 * 8, 128)."""
    i = np.arange(length)
    c = np.stack([i % 16 * 16, i // 16 * 8, np.full(length, 128)], -1).astype(np.uint8)
    return np.broadcast_to(c[:, None, None], (length, side, side, 3)).copy()
