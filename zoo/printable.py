"""Text from elsewhere that is safe to print."""

import re

# Control characters, which a terminal obeys, and the stand-ins for bytes of file names that are not UTF-8.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
    """One line in which line breaks, other control characters and bytes that are not UTF-8 are written as escapes."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
