"""Which emoji become classes of the quickstart data, and what they are called.

The rules, in order:

* No flags, no components (skin tones, hair), no skin-toned variants.
* No letters and digits: keycaps, squared words, Japanese-character buttons and the signs in ``LETTERS`` below. Things
  that happen to carry a mark (a medal, a billiard ball, a calendar) stay, as do religious and zodiac symbols,
  punctuation, mathematical and currency signs.
* One class per role, not per gender: a sequence that ends in a male or female sign, or is built on a man or a woman,
  is a variant of the neutral emoji and is left out, and so are the pairs in ``GENDERED`` and the ``GENDERED_NAMES``.
* No variants that a crop or a mirror makes equal: squares and diamonds that differ only in size, people facing right.
* At least three training styles and the held-out style draw it.
"""

import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

MIN_STYLES = 3
DROPPED_GROUPS = {"component", "flags"}
DROPPED_SUBGROUPS = {"keycap", "alphanum"}

# Signs outside the dropped subgroups whose drawing is a letter, a number or a word.
LETTERS = {
    "1F3E7": "ATM sign",
    "1F6BE": "water closet (WC)",
    "1F51E": "no one under eighteen (18)",
    "1F519": "BACK arrow",
    "1F51A": "END arrow",
    "1F51B": "ON! arrow",
    "1F51C": "SOON arrow",
    "1F51D": "TOP arrow",
    "00A9": "copyright",
    "00AE": "registered",
    "2122": "trade mark",
    "1F4AF": "hundred points (100)",
    "1F4A4": "ZZZ",
    "1F502": "repeat single button (1)",
    "1F4F4": "mobile phone off (OFF)",
}

# Gendered originals, and the emoji of the same role that stands for them.
GENDERED = {
    "1F468": "1F9D1",  # man: person
    "1F469": "1F9D1",  # woman: person
    "1F466": "1F9D2",  # boy: child
    "1F467": "1F9D2",  # girl: child
    "1F474": "1F9D3",  # old man: older person
    "1F475": "1F9D3",  # old woman: older person
    "1F934": "1FAC5",  # prince: person with crown
    "1F478": "1FAC5",  # princess: person with crown
    "1F930": "1FAC4",  # pregnant woman: pregnant person
    "1FAC3": "1FAC4",  # pregnant man: pregnant person
    "1F46B": "1F9D1-200D-1F91D-200D-1F9D1",  # woman and man holding hands: people holding hands
    "1F46C": "1F9D1-200D-1F91D-200D-1F9D1",  # men holding hands
    "1F46D": "1F9D1-200D-1F91D-200D-1F9D1",  # women holding hands
    "1F57A": "1F483",  # man dancing: no neutral emoji exists, the older one of the pair stays
    "1F936": "1F385",  # Mrs. Claus: Santa Claus, by far the best known of the three
    "1F9D1-200D-1F384": "1F385",  # Mx Claus
}

# Of the pairs without a neutral emoji, the one that stays gets Unicode's name for it.
NAMES = {"1F483": "dancer"}

SIZE_VARIANTS = {"25FC", "25FB", "25FE", "25FD", "25AA", "25AB", "1F538", "1F539"}

_GENDERED_SEQUENCE = re.compile(r"(^|-)(1F468|1F469)-200D|-200D-(1F468|1F469|2640|2642)(-|$)|-200D-27A1$")


@dataclass(frozen=True)
class EmojiClass:
    """One class: folder name, human name, group of the emoji and its code points without variation selectors."""

    slug: str
    name: str
    group: str
    hexcode: str

    def json(self) -> dict[str, str]:
        """Returns the class as a plain dictionary."""
        return asdict(self)


def key(hexcode: str) -> str:
    """Returns code points in the spelling that all packages can be compared by: upper case, no variation selector."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def slug(name: str) -> str:
    """Returns a name as lower-case ASCII words joined by hyphens, fit for a folder on any system."""
    plain = unicodedata.normalize("NFKD", name.replace("\u2019", "")).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def plain(name: str) -> str:
    """Returns the slug without hyphens: some packages write the words of a name together."""
    return slug(name).replace("-", "")


def choose(
    records: Sequence[Mapping[str, Any]],
    messages: Mapping[str, Any],
    drawn: Mapping[str, Collection[str]],
    held_out: str,
) -> list[EmojiClass]:
    """Chooses the classes by the rules of this module.

    Args:
        records: emojibase's ``data.json``.
        messages: emojibase's ``messages.json``, which names groups and subgroups.
        drawn: For each style, the keys (see :func:`key`) that it has a picture of.
        held_out: The style for evaluation; the others are for training.

    Returns:
        The classes in emojibase's order.

    Raises:
        ValueError: Two classes would share a slug.
    """
    groups = {group["order"]: group["key"] for group in messages["groups"]}
    # An order can be shared by several subgroups; none of those is one that is dropped.
    subgroups = {subgroup["order"]: subgroup["key"] for subgroup in messages["subgroups"]}
    classes: dict[str, EmojiClass] = {}
    for record in records:
        code = key(record["hexcode"])
        group = groups.get(record.get("group"))
        if group is None or group in DROPPED_GROUPS or subgroups.get(record.get("subgroup")) in DROPPED_SUBGROUPS:
            continue
        if code in LETTERS or code in GENDERED or code in SIZE_VARIANTS or _GENDERED_SEQUENCE.search(code):
            continue
        styles = [style for style, codes in drawn.items() if style != held_out and code in codes]
        if len(styles) < MIN_STYLES or code not in drawn[held_out]:
            continue
        name = NAMES.get(code, record["label"])
        chosen = EmojiClass(slug(name), name, group, code)
        if chosen.slug in classes:
            raise ValueError(f"{classes[chosen.slug]} and {chosen} share a folder name: give one of them another name.")
        classes[chosen.slug] = chosen
    return list(classes.values())
