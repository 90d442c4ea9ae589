"""Draws scenes of the `shapes` world: signed distances, analytic anti-aliasing, 64 x 64 RGB.

The six nuisances, uniform in [-1, 1]: shift in x and y (1.5 px), radius (6 %), angle (3 degrees), brightness (0.04), stripe phase (1.2 px).
Light comes from the top left whatever the object's angle. What an attribute does must be visible on every value of the others; where it
cannot be (dots on a thin band), the world gives the combination probability 0.
"""

import numpy as np

import world
from world import IMAGE_SIZE, column, value

NUISANCES = 6
# Object radius and distance from the centre, pixels.
RADIUS = np.array([11.0, 15.0, 19.5], np.float32)
OFFSET = np.array([[0, 0], [-11, 0], [11, 0], [0, -11], [0, 11]], np.float32)
# Tilted by 18 degrees: a five-pointed star on its head is a star turned by 36, and 18 lies between.
ANGLE = np.deg2rad(np.array([0, 18, 180], np.float32))

_Y, _X = np.mgrid[0:IMAGE_SIZE, 0:IMAGE_SIZE].astype(np.float32) + 0.5


def _box(x, y, hx, hy):
    qx, qy = np.abs(x) - hx, np.abs(y) - hy
    return np.hypot(np.maximum(qx, 0), np.maximum(qy, 0)) + np.minimum(np.maximum(qx, qy), 0)


def _polygon(x, y, vertices):
    """Signed distance to a closed polygon, negative inside (winding by edge crossings)."""
    squared = np.full(x.shape, 1e9, np.float32)
    sign = np.ones(x.shape, np.float32)
    for i, (ax, ay) in enumerate(vertices):
        bx, by = vertices[i - 1]
        ex, ey = bx - ax, by - ay
        wx, wy = x - ax, y - ay
        t = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        squared = np.minimum(squared, (wx - ex * t) ** 2 + (wy - ey * t) ** 2)
        above, below, left = y >= ay, y < by, ex * wy > ey * wx
        sign = np.where((above & below & left) | (~above & ~below & ~left), -sign, sign)
    return sign * np.sqrt(squared)


def _star_vertices():
    radii = [1.1 if k % 2 == 0 else 0.46 for k in range(10)]
    return [(np.sin(k * np.pi / 5) * r, 0.05 - np.cos(k * np.pi / 5) * r) for k, r in enumerate(radii)]


def _heart_vertices():
    t = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return list(zip(16 * np.sin(t) ** 3 / 16.5, -y / 15.5 - 0.05))


_STAR = _star_vertices()
_HEART = _heart_vertices()
_TRIANGLE = [(0, -1.05), (1.0, 0.75), (-1.0, 0.75)]
_DIAMOND = [(0, -1.15), (0.72, 0), (0, 1.15), (-0.72, 0)]
_ARROW = [(0, -1.1), (0.9, -0.1), (0.36, -0.1), (0.36, 1.0), (-0.36, 1.0), (-0.36, -0.1), (-0.9, -0.1)]

# Archimedean band of 1.5 turns; at the small radius it is 3.7 px wide with 3 px between: what an f = 4 autoencoder still resolves.
_SPIRAL_TURNS, _SPIRAL_HALF_WIDTH, _SPIRAL_OUTER = 1.5, 0.17, 0.93


def _spiral(x, y):
    r, theta = np.hypot(x, y), np.arctan2(y, x)
    end = 2 * np.pi * _SPIRAL_TURNS
    distance = np.full(x.shape, 9.0, np.float32)
    for k in range(3):
        turn = theta + 2 * np.pi * k
        on_band = (turn >= 0) & (turn <= end)
        distance = np.where(on_band, np.minimum(distance, np.abs(r - turn * (_SPIRAL_OUTER / end))), distance)
    tip = np.hypot(x - _SPIRAL_OUTER * np.cos(end), y - _SPIRAL_OUTER * np.sin(end))
    return np.minimum(np.minimum(distance, tip), r) - _SPIRAL_HALF_WIDTH


# Signed distances in the object's own coordinates: radius about 1, y down.
_DISTANCE = {
    "circle": lambda x, y: np.hypot(x, y) - 0.98,
    "square": lambda x, y: _box(x, y, 0.84, 0.84),
    "triangle": lambda x, y: _polygon(x, y, _TRIANGLE),
    "star": lambda x, y: _polygon(x, y, _STAR),
    "heart": lambda x, y: _polygon(x, y, _HEART),
    "cross": lambda x, y: np.minimum(_box(x, y, 1.0, 0.34), _box(x, y, 0.34, 1.0)),
    "diamond": lambda x, y: _polygon(x, y, _DIAMOND),
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.72) - 0.26,
    "arrow": lambda x, y: _polygon(x, y, _ARROW),
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 1.0, 0.82 - np.hypot(x - 0.48, y)),
    "spiral": _spiral,
    "star with a hole": lambda x, y: np.maximum(_polygon(x, y, _STAR), 0.36 - np.hypot(x, y - 0.05)),
}


def sample_nuisances(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.uniform(-1, 1, (n, NUISANCES)).astype(np.float32)


def render(cells: np.ndarray, nuisances: np.ndarray) -> np.ndarray:
    """Cells `[n, 10]` and nuisances `[n, 6]` -> images `[n, 64, 64, 3]` uint8."""
    out = np.empty((len(cells), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for lo in range(0, len(cells), 128):
        out[lo : lo + 128] = _Scenes(cells[lo : lo + 128], nuisances[lo : lo + 128]).image()
    return out


def _column(v):
    return v.astype(np.float32)[:, None, None]


class _Scenes:
    """One batch being drawn: geometry first, then background, object and frame."""

    def __init__(self, cells, nuisances):
        self.cells, self.nuisances = cells, nuisances
        n = len(cells)
        centre = IMAGE_SIZE / 2 + OFFSET[cells[:, column("position")]] + 1.5 * nuisances[:, 0:2]
        self.radius = _column(RADIUS[cells[:, column("size")]] * (1 + 0.06 * nuisances[:, 2]))
        angle = ANGLE[cells[:, column("tilt")]] + np.deg2rad(3) * nuisances[:, 3]
        # Screen coordinates from the object's centre, then the object's own, both in units of its radius.
        self.sx = (_X[None] - _column(centre[:, 0])) / self.radius
        self.sy = (_Y[None] - _column(centre[:, 1])) / self.radius
        c, s = _column(np.cos(angle)), _column(np.sin(angle))
        self.ox, self.oy = c * self.sx + s * self.sy, c * self.sy - s * self.sx
        self.distance = np.empty((n, IMAGE_SIZE, IMAGE_SIZE), np.float32)
        for i, shape in enumerate(world.SHAPE_NAMES):
            rows = np.flatnonzero(cells[:, column("shape")] == i)
            if len(rows):
                self.distance[rows] = _DISTANCE[shape](self.ox[rows], self.oy[rows])
        self.distance *= self.radius

    def rows(self, name, word):
        return np.flatnonzero(self.cells[:, column(name)] == value(name, word))

    def image(self):
        cover = np.clip(0.5 - self.distance, 0, 1)[..., None]
        image = self.background() * (1 - cover) + self.object() * cover
        self.draw_frame(image)
        return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)

    def background(self):
        colour = world.BACKGROUND_RGB[self.cells[:, column("bg")]]
        self.bright = colour.mean(1) > 0.5
        away = np.where(self.bright, -1.0, 1.0).astype(np.float32)[:, None, None]
        image = np.broadcast_to(colour[:, None, None, :], (*self.distance.shape, 3)).copy()
        rows = self.rows("bgstyle", "gradient")
        image[rows] += (away[rows] * 0.45 * (_Y / IMAGE_SIZE))[..., None]
        rows = self.rows("bgstyle", "vignette")
        image[rows] += (away[rows] * 0.6 * np.clip(np.hypot(_X - 32, _Y - 32) / 45 - 0.25, 0, 1))[..., None]
        # Dots on an 8 px lattice, every other row shifted.
        rows = self.rows("bgstyle", "speckled")
        u, v = (_X + 4 * (np.floor(_Y / 8) % 2)) % 8 - 4, _Y % 8 - 4
        image[rows] += (away[rows] * 0.45 * np.clip(1.9 - np.hypot(u, v), 0, 1))[..., None]
        image = np.clip(image, 0, 1)
        self.cast_shadow(image)
        self.glow(image)
        return image

    def cast_shadow(self, image):
        """A soft copy of the object, 4 px down and right; lighter than the ground where the ground is dark."""
        rows = self.rows("finish", "shadowed")
        if not len(rows):
            return
        moved = np.full_like(self.distance[rows], 8.0)
        moved[:, 4:, 4:] = self.distance[rows][:, :-4, :-4]
        shade = (0.75 * np.clip(0.5 - moved / 3, 0, 1))[..., None]
        dark = (image[rows].mean((1, 2, 3)) < 0.25)[:, None, None, None]
        image[rows] = np.where(dark, image[rows] + 0.4 * shade, image[rows] * (1 - 0.8 * shade))

    def glow(self, image):
        """A halo that fades over 4 px: yellow on dark ground, orange on bright."""
        rows = self.rows("finish", "glowing")
        strength = (0.9 * np.exp(-np.clip(self.distance[rows], 0, None) / 4))[..., None]
        halo = np.where(self.bright[rows, None], [[1.0, 0.7, 0.2]], [[1.0, 0.93, 0.45]]).astype(np.float32)[:, None, None, :]
        image[rows] = image[rows] * (1 - strength) + halo * strength

    def object(self):
        colour = world.COLOUR_RGB[self.cells[:, column("colour")]] + 0.04 * self.nuisances[:, 4:5]
        colour = np.clip(colour, 0, 1)
        luminance = colour @ np.array([0.3, 0.59, 0.11], np.float32)
        marks = np.where(luminance[:, None] > 0.55, colour * 0.45, colour * 0.35 + 0.65).astype(np.float32)
        weight = self.texture()[..., None]
        image = colour[:, None, None, :] * (1 - weight) + marks[:, None, None, :] * weight
        # From the lit top left to the dark bottom right; a dark object shows it by the lit side, a bright one by the dark side.
        rows = self.rows("finish", "shaded")
        across = np.clip((self.sx[rows] + self.sy[rows]) * 0.5 + 0.4, 0, 1)[..., None]
        image[rows] = image[rows] * (1.1 - 0.6 * across) + 0.25 * (1 - across)
        # A diagonal sheen; the rest is dimmed a little, so that it shows on white too.
        rows = self.rows("finish", "glossy")
        along = np.abs(self.sx[rows] + self.sy[rows] + 0.45) / np.sqrt(2) * self.radius[rows]
        sheen = 0.9 * np.clip(0.09 * self.radius[rows] + 0.9 - along, 0, 1)[..., None]
        image[rows] = image[rows] * 0.8 * (1 - sheen) + sheen
        return np.clip(image, 0, 1)

    def texture(self):
        weight = np.zeros(self.distance.shape, np.float32)
        rows = self.rows("texture", "striped")
        py = self.oy[rows] * self.radius[rows] + 1.2 * _column(self.nuisances[rows, 5])
        weight[rows] = np.clip(np.abs(py % 8 - 4) - 1.5, 0, 1)
        rows = self.rows("texture", "dotted")
        px, py = self.ox[rows] * self.radius[rows], self.oy[rows] * self.radius[rows]
        weight[rows] = np.clip(2.6 - np.hypot((px + 4) % 8 - 4, (py + 4) % 8 - 4), 0, 1)
        rows = self.rows("texture", "checkered")
        px, py = self.ox[rows] * self.radius[rows], self.oy[rows] * self.radius[rows]
        weight[rows] = np.clip(0.5 - 0.8 * (np.abs(px % 12 - 6) - 3) * (np.abs(py % 12 - 6) - 3), 0, 1)
        return weight

    def draw_frame(self, image):
        rows = self.rows("frame", "framed")
        edge = np.minimum(np.minimum(_X, IMAGE_SIZE - _X), np.minimum(_Y, IMAGE_SIZE - _Y))
        weight = np.clip(4 - edge, 0, 1)[None, ..., None]
        colour = np.where(self.bright[rows, None], [[0.35, 0.2, 0.1]], [[0.85, 0.7, 0.3]]).astype(np.float32)
        image[rows] = image[rows] * (1 - weight) + colour[:, None, None, :] * weight
