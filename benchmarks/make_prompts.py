"""Writes the pack's own calibration prompts, the same every time: `python -m benchmarks.make_prompts`.

Prompts are composed from word lists, in the kinds of task on which quantized models fail first: counts, colours bound
to objects, positions, lettering, people, styles. Kinds alternate, so any prefix of the file is as varied as the whole.
"""

import random
from collections.abc import Callable, Iterator

from ternary_flux.quantizer.pictures.encode import PROMPTS

PER_KIND = 160


def phrases(text: str) -> list[str]:
    """Split at `|` and join broken lines."""
    return [" ".join(phrase.split()) for phrase in text.split("|")]


COLOURS = """red orange yellow green blue purple pink brown black white grey turquoise golden silver crimson navy
cream teal""".split()
MATERIALS = """wooden glass ceramic leather copper marble paper woollen stone plastic bamboo velvet rusty knitted
porcelain concrete""".split()
SIZES = "tiny small large huge tall narrow round old brand-new miniature".split()
THINGS = """apple teapot bicycle umbrella suitcase lantern guitar clock chair book kite candle vase boot backpack piano
telescope ladder bench kettle mug typewriter drum sailboat tractor scooter camera pillow basket hat key mirror violin
globe helmet rocking-horse hourglass wheelbarrow accordion skateboard toaster lamp cupcake pumpkin mushroom cactus
sunflower snow-globe""".split()
ANIMALS = """cat dog fox owl horse rabbit elephant penguin tortoise heron hedgehog otter squirrel goat parrot bear lynx
frog whale giraffe camel badger peacock donkey flamingo lizard moth octopus crab swan""".split()
PLURALS = """apples books birds candles balloons mugs chairs bicycles kites umbrellas stones shells lemons spoons cats
dogs ducks fish butterflies lanterns pencils boats buttons tulips keys clocks penguins pumpkins windows drums""".split()
NUMBERS = "two three four five six seven eight nine ten".split()
PLACES = phrases(
    """
    on a cobbled street | in a sunlit kitchen | beside a frozen lake | in a dense pine forest | on a rooftop at
    dusk | in an empty museum hall | at a busy harbour | in a meadow of poppies | under a railway bridge | in a
    greenhouse | on a rocky beach | in a narrow alley | inside a lighthouse | in a library with tall shelves |
    on a snowy mountain pass | at a desert petrol station | in a bamboo grove | on a wooden pier | in a crowded
    night market | inside a workshop full of tools | on a windy cliff | in a small village square | beside a
    canal | in a field of wheat | at the edge of a waterfall | in a train compartment
    """
)
LIGHTS = phrases(
    """
    soft morning light | golden hour | harsh midday sun | overcast sky | candlelight | neon light | moonlight |
    dappled shade | stage lighting | fog and backlight | light from a single window | a thunderstorm overhead |
    light snow falling | the blue hour | firelight
    """
)
STYLES = phrases(
    """
    an oil painting | a watercolour | a charcoal drawing | a linocut print | a photograph on 35mm film | a
    pencil sketch | a woodblock print | a low-poly 3D render | a pixel-art picture | a stained-glass window | a
    clay stop-motion still | a botanical illustration | a comic-book panel | a mosaic of small tiles | a
    paper-cut collage | an embroidered patch | an architectural blueprint | a poster from the 1930s | an
    isometric illustration | a chalk drawing on slate | an impressionist painting | an ink drawing with wash | a
    cubist painting | a children's-book illustration | a gouache landscape | a technical cutaway drawing
    """
)
PEOPLE = phrases(
    """
    an elderly fisherman | a young violinist | a baker covered in flour | a firefighter | a woman with curly
    hair | a boy with freckles | a grandmother knitting | a mechanic | a ballet dancer | a scientist in a lab
    coat | a shepherd | a cyclist in the rain | a chess player | a street musician | a nurse | a carpenter | a
    girl with a red scarf | a man with a grey beard | a diver | a beekeeper | a teacher at a blackboard | a
    potter at the wheel | twin sisters | a father carrying his daughter | an astronaut | a monk | a skateboarder
    | a farmer | a tailor | a watchmaker
    """
)
ACTIONS = phrases(
    """
    laughing | reading a letter | drinking tea | looking over one shoulder | waiting for a bus | holding a
    lantern | pointing at the sky | sleeping in an armchair | feeding pigeons | repairing a clock | writing in a
    notebook | dancing | peeling an orange | tying a shoelace | playing the accordion | watering plants |
    carrying a tall stack of books | listening with closed eyes | walking against the wind | painting a fence
    """
)
RELATIONS = phrases(
    """
    to the left of | to the right of | on top of | under | behind | in front of | inside | next to | leaning
    against | hanging above
    """
)
LANDSCAPES = phrases(
    """
    a fjord | rolling hills with vineyards | a volcanic island | a salt flat | terraced rice fields | a canyon |
    a birch forest in autumn | a tundra with reindeer | a coral reef | a mangrove swamp | sand dunes | a glacier
    tongue | a lavender field | an old orchard | a river delta seen from the air | moorland | a mountain lake |
    a tropical beach | an oasis | cliffs with seabirds
    """
)
BUILDINGS = phrases(
    """
    a cathedral | a suspension bridge | a brutalist tower block | a thatched cottage | a railway station | a
    windmill | an observatory | a castle ruin | a glass office tower | a treehouse | a lighthouse | a temple
    gate | an abandoned factory | a Victorian greenhouse | a row of narrow town houses | a water tower | a
    wooden church | a spiral staircase | a covered market | a desert fort
    """
)
FOODS = phrases(
    """
    a bowl of ramen | a plum tart | a stack of pancakes with syrup | a cheese board | a loaf of sourdough |
    grilled sardines | a fruit salad in a melon | dumplings in a steamer | a chocolate cake with cherries |
    tomato soup with basil | a plate of oysters | a burger with pickles | saffron rice with prawns | a jar of
    honey with its comb | roasted vegetables on a tray | a glass of iced coffee | sushi on a slate | an omelette
    with chives | a pizza with olives | a basket of croissants
    """
)
WORDS = phrases(
    """
    OPEN | HELLO | North Station | Fresh Bread | CAFE LUNA | Do Not Enter | 1984 | Library | Welcome Home | SALE
    50% | Mind the Gap | Room 12 | The End | HAPPY BIRTHDAY | Exit | Tea & Cake | Bus 42 | Good Morning | WINTER
    | Lost Cat | Ferry | Book Club | JAZZ | Slow Down | Route 7 | Bakery | Please Knock | Tomorrow | STOP |
    Garden Party | Chapter One | Museum | Fragile | No Fishing | Level 3 | Harbour View | DREAM | Quiet Please
    """
)
SURFACES = phrases(
    """
    a shop sign | a neon sign | a chalkboard | a book cover | a road sign | a banner across the street | a
    T-shirt | a birthday cake | a wooden plank | a ticket | a shipping crate | an enamel mug | a poster on a
    brick wall | a train's destination board | a handwritten note | a shop window
    """
)
CAMERAS = phrases(
    """
    close-up | wide-angle view | seen from above | seen from below | macro photograph | long exposure | shallow
    depth of field | silhouette | telephoto view | symmetrical composition | tilt-shift photograph | seen
    through a rain-covered window
    """
)
TEXTURES = phrases(
    """
    cracked desert mud | tree bark with moss | rusted iron plates | frost on a window | peeling paint | fish
    scales | knitted wool | wet cobblestones | marble veins | butterfly wing scales | rain on a car bonnet |
    dried leaves | soap bubbles | crumpled paper | woven straw | lichen on granite | sea foam | circuit boards |
    feathers | honey dripping
    """
)
FANTASY = phrases(
    """
    a dragon curled around a clock tower | a city on the back of a giant turtle | a whale swimming through
    clouds | a forest of giant mushrooms with lit windows | a robot gardener watering roses | a ship sailing on
    sand | an owl wearing a crown and spectacles | a staircase leading into the moon | a knight made of stained
    glass | floating islands joined by rope bridges | a teapot pouring a river | a fox in a tailcoat conducting
    an orchestra | a train that runs along the sea floor | a tree whose leaves are letters | a library inside a
    hollow mountain | a phoenix asleep on a radiator | a snail carrying a lighthouse | two moons over a quiet
    village | a mechanical hummingbird drinking from a flower | a door standing alone in a field
    """
)
Random = random.Random


def a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def noun(r: Random) -> str:
    return r.choice(THINGS if r.random() < 0.6 else ANIMALS)


def single(r: Random) -> str:
    return r.choice(("{}", "a photo of {}", "{} on a plain background", "{}, studio photograph")).format(
        a(r.choice((f"{r.choice(SIZES)} {noun(r)}", f"{r.choice(MATERIALS)} {r.choice(THINGS)}")))
    )


def pair(r: Random) -> str:
    first, second = r.sample(THINGS, 2) if r.random() < 0.5 else (r.choice(ANIMALS), r.choice(THINGS))
    return f"{r.choice(('', 'a photo of '))}{a(first)} and {a(second)} {r.choice(PLACES)}"


def count(r: Random) -> str:
    number, plural = r.choice(NUMBERS), r.choice(PLURALS)
    if r.random() < 0.5:
        return f"{number} {plural} {r.choice(PLACES)}"
    return f"exactly {number} {r.choice(COLOURS)} {plural} in a row"


def colour(r: Random) -> str:
    return f"{a(r.choice(COLOURS) + ' ' + noun(r))} {r.choice(PLACES)}"


def binding(r: Random) -> str:
    (first, second), (one, other) = r.sample(COLOURS, 2), r.sample(THINGS + ANIMALS, 2)
    return f"{a(f'{first} {one}')} and {a(f'{second} {other}')}"


def position(r: Random) -> str:
    one, other = r.sample(THINGS + ANIMALS, 2)
    return f"{a(one)} {r.choice(RELATIONS)} {a(f'{r.choice(COLOURS)} {other}')}"


def text(r: Random) -> str:
    return f'{r.choice(SURFACES)} with the words "{r.choice(WORDS)}" in {r.choice(COLOURS)} letters, {r.choice(LIGHTS)}'


def person(r: Random) -> str:
    return f"{r.choice(CAMERAS)} of {r.choice(PEOPLE)} {r.choice(ACTIONS)} {r.choice(PLACES)}, {r.choice(LIGHTS)}"


def group(r: Random) -> str:
    one, other = r.sample(PEOPLE, 2)
    return f"{one} and {other}, both {r.choice(ACTIONS)}, {r.choice(PLACES)}"


def style(r: Random) -> str:
    subject = r.choice((a(noun(r)), r.choice(BUILDINGS), r.choice(LANDSCAPES), r.choice(PEOPLE)))
    return f"{r.choice(STYLES)} of {subject}"


def landscape(r: Random) -> str:
    return f"{r.choice(LANDSCAPES)}, {r.choice(LIGHTS)}, {r.choice(CAMERAS)}"


def building(r: Random) -> str:
    return f"{r.choice(BUILDINGS)} {r.choice(PLACES)}, {r.choice(CAMERAS)}, {r.choice(LIGHTS)}"


def food(r: Random) -> str:
    return f"{r.choice(FOODS)} on {a(f'{r.choice(COLOURS)} table')}, {r.choice(LIGHTS)}, {r.choice(CAMERAS)}"


def texture(r: Random) -> str:
    return f"{r.choice(CAMERAS)} of {r.choice(TEXTURES)}, {r.choice(LIGHTS)}, mostly {r.choice(COLOURS)}"


def fantasy(r: Random) -> str:
    return f"{r.choice(FANTASY)}, {r.choice(STYLES)}, {r.choice(LIGHTS)}"


def scene(r: Random) -> str:
    """A long prompt, as people write for FLUX."""
    return (
        f"{r.choice(PEOPLE).capitalize()} {r.choice(ACTIONS)} {r.choice(PLACES)}. {a(r.choice(ANIMALS)).capitalize()} "
        f"sits {r.choice(RELATIONS)} {a(f'{r.choice(COLOURS)} {r.choice(THINGS)}')}, and in the distance there "
        f"is {r.choice(BUILDINGS)}. {r.choice(LIGHTS).capitalize()}, {r.choice(CAMERAS)}, "
        f"in the style of {r.choice(STYLES)}."
    )


KINDS: tuple[Callable[[Random], str], ...] = (
    single, pair, count, colour, binding, position, text, person,
    group, style, landscape, building, food, texture, fantasy, scene,
)  # fmt: skip


def generate() -> list[str]:
    """All prompts, without repeats."""
    columns = [list(_distinct(kind)) for kind in KINDS]
    return [prompt for row in zip(*columns, strict=True) for prompt in row]


def _distinct(kind: Callable[[Random], str]) -> Iterator[str]:
    r = Random(kind.__name__)
    seen = set()
    while len(seen) < PER_KIND:
        prompt = kind(r)
        if prompt not in seen:
            seen.add(prompt)
            yield prompt


if __name__ == "__main__":
    PROMPTS.write_text("\n".join(generate()) + "\n", encoding="utf-8")
