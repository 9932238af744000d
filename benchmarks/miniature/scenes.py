"""Procedural scenes with captions in six GenEval-like categories, drawn with numpy.

A caption names one to four objects: `a ring`, `a circle and a square`, `three red crosses`, `a red circle`, `a ring
above a square`, `a red circle and a blue square`. What the caption leaves open (colours, heights) is drawn at random.
Some combinations of attributes are held out: no training caption has them. Held-out pairs of colour and shape, and
triples of number, colour and shape, are in no training picture either; held-out pairs of shapes are seen together only
where the caption names their colours and not their places.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

CATEGORIES = ("single", "two", "counting", "colours", "position", "binding")
SHAPES = ("circle", "square", "triangle", "cross", "ring")
PALETTE = {
    "red": (214, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (240, 215, 40),
    "green": (40, 150, 60),
    "cyan": (60, 195, 215),
    "blue": (40, 80, 210),
    "purple": (140, 50, 180),
    "black": (25, 25, 30),
}
COLOURS = tuple(PALETTE)
BACKGROUND = np.array((236, 233, 228), np.float32) / 255
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
COUNTS = {"two": 2, "three": 3, "four": 4}
PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}

_WITHOUT = ("cross", "circle", "square", "triangle", "ring", "square", "triangle", "circle")
HELD_OUT_COLOURS = frozenset(zip(COLOURS, _WITHOUT, strict=True))
HELD_OUT_PAIRS = frozenset({frozenset({"circle", "cross"}), frozenset({"triangle", "ring"})})
# A quarter of them: every number and shape lacks two colours.
HELD_OUT_COUNTS = frozenset(
    (number, colour, shape)
    for number, (i, colour), (j, shape) in product(COUNTS.values(), enumerate(COLOURS), enumerate(SHAPES))
    if (number + i - j) % 4 == 0
)

_RGB = np.array([PALETTE[colour] for colour in COLOURS], np.float32) / 255
# How often each category is drawn for training: the ones that are hard to learn more often.
TRAINING_SHARE = {"single": 0.06, "two": 0.20, "counting": 0.22, "colours": 0.09, "position": 0.18, "binding": 0.25}
# Radius in pixels of a 64-pixel picture, by number of objects.
_RADIUS = {1: 16.0, 2: 12.0, 3: 10.0, 4: 10.0}


@dataclass(frozen=True)
class Thing:
    shape: str
    colour: str | None = None


@dataclass(frozen=True)
class Prompt:
    """What a caption asks for; `relation` places the first thing relative to the second."""

    category: str
    things: tuple[Thing, ...]
    relation: str | None = None

    @property
    def text(self) -> str:
        first = self.things[0]
        if self.category == "counting":
            number = next(word for word, count in COUNTS.items() if count == len(self.things))
            return " ".join(filter(None, (number, first.colour, PLURALS[first.shape])))
        names = [" ".join(filter(None, (_article(thing), thing.colour, thing.shape))) for thing in self.things]
        return f" {self.relation or 'and'} ".join(names)

    @property
    def held_out(self) -> bool:
        """Whether the caption combines attributes that no training caption combines."""
        first, shapes = self.things[0], frozenset(thing.shape for thing in self.things)
        return (
            any((thing.colour, thing.shape) in HELD_OUT_COLOURS for thing in self.things)
            or (self.category in ("two", "position") and shapes in HELD_OUT_PAIRS)
            or (self.category == "counting" and (len(self.things), first.colour, first.shape) in HELD_OUT_COUNTS)
        )


@dataclass(frozen=True)
class Scene:
    prompt: Prompt
    shapes: np.ndarray  # int [n] into SHAPES
    colours: np.ndarray  # int [n] into COLOURS
    places: np.ndarray  # float [n, 3]: x, y, radius in units of the picture's side


def _article(thing: Thing) -> str:
    return "an" if (thing.colour or thing.shape)[0] in "aeiou" else "a"


def parse(text: str) -> Prompt:
    """The prompt a caption stands for. Raises ValueError for a caption outside the grammar."""
    words = text.lower().replace(",", " ").replace(".", " ").split()
    rest = " ".join(word for word in words if word not in ("to", "the"))
    if match := re.fullmatch(r"(two|three|four) (?:(\w+) )?(\w+)", rest):
        number, colour, plural = match.groups()
        shape = next((shape for shape, many in PLURALS.items() if many == plural), plural)
        return Prompt("counting", (_thing(colour, shape, text),) * COUNTS[number])
    one = r"(?:an?|one) (?:(\w+) )?(\w+)"
    if match := re.fullmatch(one, rest):
        colour, shape = match.groups()
        thing = _thing(colour, shape, text)
        return Prompt("colours" if thing.colour else "single", (thing,))
    if match := re.fullmatch(f"{one} (and|{'|'.join(RELATIONS)}) {one}", rest):
        colour, shape, relation, colour2, shape2 = match.groups()
        things = (_thing(colour, shape, text), _thing(colour2, shape2, text))
        if relation != "and":
            return Prompt("position", things, relation)
        return Prompt("binding" if colour or colour2 else "two", things)
    raise ValueError(f"{text!r} is not a caption of the miniature; an example: 'a red circle and a blue square'")


def _thing(colour: str | None, shape: str, text: str) -> Thing:
    if shape not in SHAPES or (colour is not None and colour not in COLOURS):
        raise ValueError(f"{text!r}: shapes are {', '.join(SHAPES)}; colours are {', '.join(COLOURS)}")
    return Thing(shape, colour)


def all_prompts(category: str) -> list[Prompt]:
    """Every caption of a category, seen and held out, in a fixed order; colours where they are held out."""
    pairs = [(a, b) for a, b in product(SHAPES, SHAPES) if a != b]
    if category == "single":
        return [Prompt(category, (Thing(shape),)) for shape in SHAPES]
    if category == "two":
        return [Prompt(category, (Thing(a), Thing(b))) for a, b in pairs]
    if category == "counting":
        kinds = product(COUNTS.values(), SHAPES, (None, *COLOURS))
        return [Prompt(category, (Thing(shape, colour),) * count) for count, shape, colour in kinds]
    if category == "colours":
        return [Prompt(category, (Thing(shape, colour),)) for colour in COLOURS for shape in SHAPES]
    if category == "position":
        return [Prompt(category, (Thing(a), Thing(b)), relation) for relation in RELATIONS for a, b in pairs]
    if category == "binding":
        colours = [(a, b) for a, b in product(COLOURS, COLOURS) if a != b]
        return [Prompt(category, (Thing(a, c), Thing(b, d))) for (a, b), (c, d) in product(pairs, colours)]
    raise ValueError(f"category {category!r}: expected one of {', '.join(CATEGORIES)}")


def prompts(split: str, category: str, count: int, seed: int = 0) -> list[str]:
    """`count` captions of a category from the "train" or the "held_out" split, every one used before any repeats.

    The category `single` has no attributes to hold out: both splits share its five captions.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split {split!r}: expected 'train' or 'held_out'")
    pool = [p.text for p in all_prompts(category) if category == "single" or p.held_out == (split == "held_out")]
    rng = np.random.default_rng((seed, CATEGORIES.index(category), len(split)))
    order = np.concatenate([rng.permutation(len(pool)) for _ in range(-(-count // len(pool)))])
    return [pool[i] for i in order[:count]]


def draw(prompt: Prompt, rng: np.random.Generator) -> Scene:
    """A scene that the caption describes; open colours avoid the held-out combinations."""
    count = len(prompt.things)
    avoided = HELD_OUT_COUNTS if prompt.category == "counting" else ()
    shapes = np.array([SHAPES.index(thing.shape) for thing in prompt.things])
    colours = []
    for thing in prompt.things:
        allowed = [c for c in COLOURS if (c, thing.shape) not in HELD_OUT_COLOURS]
        allowed = [c for c in allowed if (count, c, thing.shape) not in avoided]
        colours.append(COLOURS.index(thing.colour or allowed[rng.integers(len(allowed))]))
    if prompt.category == "counting":
        colours = colours[:1] * count
    return Scene(prompt, shapes, np.array(colours), _layout(count, prompt.relation, rng) / 64)


def _layout(count: int, relation: str | None, rng: np.random.Generator) -> np.ndarray:
    """Places [n, 3] in 64ths of the side, centres on multiples of 8: every object in its own half or quarter.

    Objects stand in the order of the caption. When their order was drawn too, a model of this size often painted one
    thing twice and forgot the other: each half of the picture chose alone.
    """
    radius = np.full(count, _RADIUS[count])
    if count == 1:
        return np.column_stack((rng.choice((24, 32, 40), (1, 2)), radius))
    if count == 2:
        dx, dy = RELATIONS[relation or "left of"]
        along = np.array((16, 48) if dx + dy < 0 else (48, 16))
        # Nearly level, so that a relation's axis is beyond doubt.
        across = rng.integers(3, 5) * 8 + rng.choice((0, 8), 2)
        return np.column_stack((*((along, across) if dx else (across, along)), radius))
    quarters = np.arange(count)
    return np.column_stack((16 + 32 * (quarters % 2), 16 + 32 * (quarters // 2), radius))


def training_scenes(count: int, seed: int = 0) -> Iterator[Scene]:
    """Scenes with seen captions; a quarter of the position captions name colours too."""
    rng = np.random.default_rng(seed)
    pools = {category: [p for p in all_prompts(category) if not p.held_out] for category in CATEGORIES}
    pairs = [pair for pair in product(COLOURS, SHAPES) if pair not in HELD_OUT_COLOURS]
    shares = [TRAINING_SHARE[category] for category in CATEGORIES]
    for _ in range(count):
        pool = pools[CATEGORIES[rng.choice(len(CATEGORIES), p=shares)]]
        prompt = pool[rng.integers(len(pool))]
        if prompt.category == "position" and rng.random() < 0.25:
            colours = {s: [c for c, shape in pairs if shape == s] for s in SHAPES}
            named = tuple(Thing(thing.shape, rng.choice(colours[thing.shape]).item()) for thing in prompt.things)
            prompt = Prompt(prompt.category, named, prompt.relation)
        yield draw(prompt, rng)


def distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the border of a shape of radius 1 at the origin (y grows downwards), negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.88
    if shape == "triangle":
        slope = np.array((1.85, 0.95)) / np.hypot(1.85, 0.95)
        return np.maximum(y - 0.85, abs(x) * slope[0] - (y + 1) * slope[1])
    if shape == "cross":
        return np.minimum(np.maximum(abs(x) - 1, abs(y) - 0.36), np.maximum(abs(x) - 0.36, abs(y) - 1))
    if shape == "ring":
        return abs(np.hypot(x, y) - 0.72) - 0.28
    raise ValueError(f"shape {shape!r}: expected one of {', '.join(SHAPES)}")


def render(scenes: list[Scene], size: int = 64) -> np.ndarray:
    """Anti-aliased pictures, float32 [B, size, size, 3] in 0..1."""
    images = np.broadcast_to(BACKGROUND, (len(scenes), size, size, 3)).copy()
    owner = np.concatenate([np.full(len(scene.shapes), i) for i, scene in enumerate(scenes)])
    shapes, colours, places = (
        np.concatenate([getattr(scene, name) for scene in scenes]) for name in ("shapes", "colours", "places")
    )
    pixels = (np.arange(size, dtype=np.float32) + 0.5) / size
    for index, shape in enumerate(SHAPES):
        chosen = np.flatnonzero(shapes == index)
        x, y, radius = places[chosen].astype(np.float32).T[..., None, None]
        depth = -distance(shape, (pixels[None, None, :] - x) / radius, (pixels[None, :, None] - y) / radius)
        cover = np.clip(depth * radius * size + 0.5, 0, 1)[..., None]
        # Objects never overlap, so each adds its own colour to the background.
        np.add.at(images, owner[chosen], cover * (_RGB[colours[chosen]][:, None, None] - BACKGROUND))
    return images
