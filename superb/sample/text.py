"""Texts of the sample corpus: word lists and small grammars, all written for this project.

Text is lower case, letters and spaces only. Every function draws from the given generator. One
seed determines the whole corpus.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
"""The ten classes of Speech Commands; `_unknown_` and `_silence_` complete the twelve."""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

OTHER_WORDS = ("bird", "house", "happy", "water", "paper", "green", "window", "letter", "nothing", "garden")
"""Words that are neither keywords nor digits: with some digits they make `_unknown_`."""

STYLES = ("neutral", "happy", "angry", "sad")

STYLE_SENTENCES = (
    "the parcel is lying on the kitchen table",
    "they have moved the meeting to tuesday",
    "in seven hours it will be morning",
    "she left her umbrella in the car",
    "we are going to the station together",
    "the letter came with the early post",
    "he told me that the shop is closed",
    "my brother is coming back this weekend",
    "somebody put the bags under the stairs",
    "tonight i could tell him about it",
)
"""Texts spoken in all four styles, which therefore do not reveal the style."""

QUERY_TERMS = (
    "library", "mountain", "harbour", "museum", "bakery", "village", "doctor", "teacher",
    "captain", "musician", "engineer", "saturday", "umbrella", "elephant", "telephone", "blanket",
)  # fmt: skip
"""The terms of query by example. All of them occur in the grammar of `sentence`."""

PEOPLE = (
    "doctor",
    "teacher",
    "captain",
    "musician",
    "engineer",
    "farmer",
    "neighbour",
    "children",
    "painter",
)
PLACES = ("library", "mountain", "harbour", "museum", "bakery", "village", "river", "school", "market")
THINGS = ("umbrella", "elephant", "telephone", "blanket", "basket", "ladder", "picture", "bicycle", "candle")
ADJECTIVES = (
    "old",
    "quiet",
    "yellow",
    "heavy",
    "young",
    "broken",
    "purple",
    "curious",
    "tall",
    "famous",
    "tiny",
)
VERBS = ("found", "carried", "painted", "lost", "sold", "watched", "borrowed", "washed", "needed", "forgot")
TIMES = (
    "on saturday",
    "on thursday",
    "last week",
    "at noon",
    "this morning",
    "before dinner",
    "every winter",
)


@dataclass(frozen=True, kw_only=True)
class Intent:
    """One spoken command: its three slots (the contract of Fluent Speech Commands) and ways to say it."""

    action: str
    object: str
    location: str
    phrases: tuple[str, ...]

    @property
    def slots(self) -> dict[str, str]:
        return {"action": self.action, "object": self.object, "location": self.location}


def _switch(action: str, object_: str, location: str) -> Intent:
    word = {"activate": "on", "deactivate": "off"}[action]
    where = "" if location == "none" else f" in the {location}"
    phrases = (
        f"turn {word} the {object_}{where}",
        f"switch the {object_} {word}{where}",
        f"{object_} {word}{where}",
    )
    return Intent(action=action, object=object_, location=location, phrases=phrases)


def _change(action: str, object_: str, location: str) -> Intent:
    verb, more = {"increase": ("turn up", "more"), "decrease": ("turn down", "less")}[action]
    where = "" if location == "none" else f" in the {location}"
    phrases = (
        f"{verb} the {object_}{where}",
        f"i want {more} {object_}{where}",
        f"please {verb} the {object_}{where}",
    )
    return Intent(action=action, object=object_, location=location, phrases=phrases)


def _bring(object_: str) -> Intent:
    phrases = (f"bring me the {object_}", f"get the {object_} for me", f"i need my {object_}")
    return Intent(action="bring", object=object_, location="none", phrases=phrases)


INTENTS = (
    *(_switch(a, "lights", where) for a in ("activate", "deactivate") for where in ("kitchen", "bedroom", "none")),
    *(_switch(a, "music", "none") for a in ("activate", "deactivate")),
    *(_change(a, "heat", where) for a in ("increase", "decrease") for where in ("kitchen", "bedroom")),
    *(_change(a, "volume", "none") for a in ("increase", "decrease")),
    _bring("newspaper"),
    _bring("shoes"),
)
"""16 intents: 5 actions, 6 objects, 3 locations."""

SLOT_VALUES: dict[str, tuple[str, ...]] = {
    "artist": ("mary stone", "the silver foxes", "john river", "nina gold", "blue harbour", "peter lane"),
    "track": ("morning rain", "paper moon", "the long road", "summer letters", "dancing shadows"),
    "playlist": ("road trip", "quiet evening", "running", "sunday kitchen", "old favourites"),
    "city": ("london", "paris", "boston", "sydney", "dublin", "new york"),
    "day": ("monday", "tuesday", "friday", "saturday", "tomorrow", "next week"),
    "cuisine": ("italian", "indian", "greek", "mexican", "japanese"),
    "party": ("two", "three", "four", "six", "nine"),
    "book": ("the hidden lake", "seven keys", "a winter garden", "the last train"),
    "rating": ("one", "two", "three", "four", "five"),
    "film": ("silent mountain", "the blue door", "night market", "a simple life"),
}

SLOT_TEMPLATES = (
    "play {track} by {artist}",
    "play some music by {artist} on my {playlist} playlist",
    "add {track} to my {playlist} playlist",
    "put {artist} on the {playlist} list",
    "book a table for {party} people in {city}",
    "find me a {cuisine} restaurant for {day} in {city}",
    "what will the weather be like in {city} on {day}",
    "is it going to rain in {city} {day}",
    "give {book} {rating} stars",
    "i would rate {book} {rating} out of six",
    "where can i see {film} on {day}",
    "when does {film} start in {city}",
)
"""Shaped like the requests of SNIPS: music, playlists, restaurants, weather, books, cinemas."""


def pick(rng: np.random.Generator, values: tuple[str, ...]) -> str:
    """Draw one of `values` uniformly."""
    return values[int(rng.integers(len(values)))]


def sentence(rng: np.random.Generator) -> str:
    """Draw a sentence of 8 to 13 words from the grammar of people, places, things and times."""
    person, place, thing = pick(rng, PEOPLE), pick(rng, PLACES), pick(rng, THINGS)
    verb, time = pick(rng, VERBS), pick(rng, TIMES)
    one, two = pick(rng, ADJECTIVES), pick(rng, ADJECTIVES)
    templates = (
        f"the {one} {person} {verb} the {thing} near the {place} {time}",
        f"{time} the {person} {verb} my {one} {thing}",
        f"behind the {place} our {one} {person} {verb} the {two} {thing}",
        f"did the {person} from the {one} {place} say who {verb} the {thing}",
        f"my {one} {person} has never seen the {thing} in the {two} {place}",
    )
    return pick(rng, templates)


def slot_sentence(rng: np.random.Generator) -> tuple[str, str]:
    """Draw a request and its IOB tags, one per word: ("play paper moon", "O B-track I-track")."""
    words: list[str] = []
    tags: list[str] = []
    for token in pick(rng, SLOT_TEMPLATES).split():
        if not token.startswith("{"):
            words.append(token)
            tags.append("O")
            continue
        slot = token.strip("{}")
        value = pick(rng, SLOT_VALUES[slot]).split()
        words += value
        tags += [f"B-{slot}"] + [f"I-{slot}"] * (len(value) - 1)
    return " ".join(words), " ".join(tags)


def query_terms_in(text: str) -> list[str]:
    """Return the query terms that `text` contains as whole words, in the order of `QUERY_TERMS`."""
    words = set(text.split())
    return [term for term in QUERY_TERMS if term in words]
