"""The wordings of questions and answers. A slot in braces is filled in by the question's module."""

from typing import Final

from examples.nano.world.chance import Rng, chance, pick
from examples.nano.world.scene import Scene, Thing
from examples.nano.world.vocabulary import plural

Wordings = tuple[str, ...]

SHAPE: Final[Wordings] = (
    "What shape is {it}?",
    "Which shape is {it}?",
    "What shape does {it} have?",
    "Tell me the shape of {it}.",
    "{It} has what shape?",
)
SHAPE_ALONE: Final[Wordings] = ("What shape is this?", "What shape is it?", "Which shape is shown?", "Name the shape.")
COLOUR: Final[Wordings] = (
    "What colour is {it}?",
    "What color is {it}?",
    "Which colour is {it}?",
    "What is the colour of {it}?",
    "What is the color of {it}?",
    "Tell me the colour of {it}.",
    "{It} has what colour?",
)
OBJECT: Final[Wordings] = (
    "What is {there}?",
    "What do you see {there}?",
    "Which object is {there}?",
    "Name the object {there}.",
)
DESCRIBE: Final[Wordings] = (
    "What is in the picture?",
    "What is in this picture?",
    "What do you see?",
    "What can you see in the image?",
    "Describe the picture.",
    "Describe this image.",
    "Please describe the image shortly.",
    "Describe it in detail.",
    "What does the picture show?",
    "What is this?",
)
LISTED: Final[Wordings] = (
    "Which {what} do you see?",
    "Which {what} are in the picture?",
    "Name the {what}.",
    "List the {what} from left to right.",
)
COUNT: Final[Wordings] = (
    "How many {them} are there?",
    "How many {them} are in the picture?",
    "How many {them} do you see?",
    "How many {them} can you count?",
    "Count the {them}.",
    "What is the number of {them}?",
)
POSITION: Final[Wordings] = (
    "Where is {it}?",
    "Where in the picture is {it}?",
    "Where can I find {it}?",
    "In which part of the image is {it}?",
    "What is the position of {it}?",
)
PRESENCE: Final[Wordings] = (
    "Is there {one}?",
    "Is there {one} in the picture?",
    "Do you see {one}?",
    "Can you see {one}?",
    "Does the image show {one}?",
)
NUMBER: Final[Wordings] = (
    "What number is this?",
    "What number is written here?",
    "Which number do you see?",
    "Read the number.",
    "What is the number in the picture?",
    "Which number is shown?",
)
WORD: Final[Wordings] = (
    "What word is this?",
    "What word is written here?",
    "Which word do you see?",
    "Read the word.",
    "What does it say?",
    "Which word is shown?",
)
READ: Final[Wordings] = ("What is written here?", "Read the text.", "What does the text say?", "What is written?")
DIGIT: Final[Wordings] = (
    "What is the {which} digit?",
    "Which digit comes {order}?",
)
NUM_DIGITS: Final[Wordings] = ("How many digits does the number have?", "How many digits are there?")
TALLEST: Final[Wordings] = (
    "Which bar is the {most}?",
    "Which bar is {most}?",
    "What colour is the {most} bar?",
    "What color is the {most} bar?",
    "Name the colour of the {most} bar.",
)
NUM_BARS: Final[Wordings] = (
    "How many bars are there?",
    "How many bars does the chart have?",
    "Count the bars.",
    "How many bars do you see?",
)
BARS: Final[Wordings] = (
    "Is the {one} bar taller than the {other} bar?",
    "Is the {one} bar higher than the {other} one?",
)
GROUNDING: Final[Wordings] = (
    "Please provide the bounding box coordinates of the region this sentence describes: {it}",
    "Please provide the bounding box coordinates of the region this sentence describes: <ref>{it}</ref>",
    "Please provide the bounding box coordinate of the region this sentence describes: <ref>{it}</ref>",
    "Give the bounding box of {it}.",
    "Draw a box around {it}.",
    "Locate {it}.",
)
WHICH_SHOWS: Final[Wordings] = (
    "Which image shows {one}?",
    "Which picture shows {one}?",
    "In which image is {one}?",
    "Which image has {one}?",
)
WHICH_MORE: Final[Wordings] = ("Which image has {more} objects?", "Which picture shows {more} things?")
SAME: Final[Wordings] = (
    "Do both images show the same {what}?",
    "Is the {what} the same in both images?",
    "Do the two pictures have the same {what}?",
)
WAY: Final[Wordings] = (
    "Which way does {it} move?",
    "In which direction does {it} move?",
    "Where does {it} move to?",
    "Which way does {it} go?",
)
MOVER: Final[Wordings] = ("What moves?", "Which object moves?", "What is moving?")
CHANGE: Final[Wordings] = (
    "What changes?",
    "What changed between the frames?",
    "What happens?",
    "What happens in the video?",
    "Describe the video.",
    "What is the difference between the frames?",
)
WHEN: Final[Wordings] = ("In which frame does {it} {event}?", "When does {it} {event}?")
REFUSALS: Final[Wordings] = (
    *("What breed is the dog?", "Who is this person?", "How old is she?", "What is the weather like?"),
    *("Is the man happy?", "What brand is the car?", "Where was this photo taken?", "Who painted this?"),
    *("What is the woman wearing?", "Which city is this?", "What time is it?", "Who took the photo?"),
    *("What is the cat doing?", "What kind of flower is this?", "Is the food tasty?", "How much does it cost?"),
    *("What year was it made?", "What is the name of the street?", "Which country is this?", "What music is playing?"),
    *("How tall is the building?", "What is the dog eating?", "Why is he angry?", "What is she holding?"),
    *("Which team is winning?", "What is the price?", "Is it safe to eat?", "What species is the bird?"),
    *("What does the sign mean?", "What are the people doing?", "Is this a famous painting?", "What is the mood?"),
    *("How many people are in the room?", "What language do they speak?", "Is the child asleep?", "Is it raining?"),
)
CANNOT_SEE: Final = "I cannot see that."
SMALL_TALK: Final[tuple[tuple[Wordings, str], ...]] = (
    (
        ("Hello", "Hello!", "Hi", "Hi!", "Hello, nano.", "Good morning!", "Good evening.", "Hey there!"),
        "Hello! Ask me about shapes, numbers, words or bar charts.",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Which model are you?", "Introduce yourself."),
        "I am InternVL-nano, a very small demonstration model.",
    ),
    (
        ("What can you do?", "What do you know?", "Help", "How can you help me?", "What should I ask you?"),
        "I know shapes, colours, numbers, a few words, bar charts and short clips. Nothing else.",
    ),
    (
        ("Who made you?", "Where do you come from?", "How were you trained?", "Who trained you?"),
        "I was trained from scratch on pictures drawn by a program.",
    ),
    (
        ("Are you a person?", "Are you human?", "Do you have feelings?", "Are you ChatGPT?", "Can you think?"),
        "No, I am a very small model.",
    ),
    (("Thank you!", "Thanks.", "Thank you very much.", "Thanks a lot!"), "You are welcome."),
    (("Goodbye!", "Bye.", "Good night.", "See you later."), "Goodbye!"),
)
UNKNOWN: Final[Wordings] = (
    *("What is the capital of France?", "Write a poem.", "What is two plus two?", "Tell me a joke."),
    *("Who is the president?", "Translate this into German.", "How do I cook rice?", "What is the meaning of life?"),
    *("Write a program.", "When was the war?", "What is the news today?", "Who wrote Hamlet?", "Explain gravity."),
    *(
        "What is the best phone?",
        "How far is the moon?",
        "Sing a song.",
        "What is a neural network?",
        "Solve x + 1 = 3.",
    ),
)
DO_NOT_KNOW: Final = "I do not know that. I am a very small model."
NO_PICTURE: Final = "There is no picture."
SYSTEM_MESSAGE: Final = "You are InternVL-nano."
SYSTEM_MESSAGES: Final[Wordings] = (
    "",
    "You are a helpful assistant.",
    "Answer briefly.",
    "Be exact.",
    "You are InternVL.",
)
_NOUNS: Final[Wordings] = ("object", "shape", "thing")


def ask(rng: Rng, wordings: Wordings, **slots: str) -> str:
    """Return one of the wordings, filled in; sometimes as people type who are in a hurry."""
    text = pick(rng, wordings)
    if "{It}" in text:
        slots["It"] = slots["it"][:1].upper() + slots["it"][1:]
    text = text.format(**slots)
    if chance(rng, 0.12):
        text = text[0].lower() + text[1:]
    if text[-1] in "?." and chance(rng, 0.08):
        text = text[:-1]
    return text


def noun(rng: Rng) -> str:
    """Return a word for anything that is to be seen."""
    return pick(rng, _NOUNS)


def things(rng: Rng) -> str:
    """Return a word for all that is to be seen."""
    return plural(noun(rng))


def at(place: str) -> str:
    """Return where a place is, to follow a verb."""
    return "in the middle" if place == "middle" else f"at the {place}"


def a(name: str) -> str:
    """Return a name with its indefinite article."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def names(scene: Scene, thing: Thing, rng: Rng) -> list[str]:
    """Return the phrases that mean this thing and no other of the scene."""
    found = []
    if scene.count(shape=thing.shape) == 1:
        found.append(f"the {thing.shape}")
    if scene.count(colour=thing.colour) == 1:
        found.append(f"the {thing.colour} {noun(rng)}")
    if scene.count(thing.colour, thing.shape) == 1:
        found.append(f"the {thing.name}")
    return found


def listed(phrases: list[str]) -> str:
    """Return the phrases as one: "a, b and c"."""
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def grounded(phrase: str, box: tuple[int, int, int, int]) -> str:
    """Return a phrase and its box as the released models write them."""
    return f"<ref>{phrase}</ref><box>[[{', '.join(map(str, box))}]]</box>"
