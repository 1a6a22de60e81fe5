"""The attribution that goes with the quickstart data."""

from collections.abc import Sequence

from zoo.tools.quickstart.packages import Package

LICENCE_TEXTS = {
    "Apache-2.0": "https://www.apache.org/licenses/LICENSE-2.0",
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "CC-BY-SA-4.0": "https://creativecommons.org/licenses/by-sa/4.0/",
    "MIT": "https://opensource.org/license/mit",
}

HEAD = """# Where these pictures come from

Every picture here is a drawing of an emoji by one of the projects below, under that project's licence. All were
changed: pictures made of vectors were rasterised, all were cropped to what is visible, scaled to the same extent,
centred on a transparent square, rounded to fewer colours and stored as PNG. Names and groups of the classes come from
emojibase-data; one class stands for all genders and skin tones of a role, and flags, letters and digits were left out.
"""


def attribution(packages: Sequence[Package]) -> str:
    """Returns the text of ATTRIBUTION.md: for every package its version, author, licence and what it is used for."""
    sections = [HEAD]
    for package in packages:
        if not package.style:
            use = "names and groups of the classes"
        elif package.held_out:
            use = f"`test/*/{package.style}.png`, for evaluation only: never trained on"
        else:
            use = f"`train/*/{package.style}.png`"
        sections.append(
            f"## {package.name} {package.version}\n\n"
            f"* Used for: {use}\n"
            f"* By: {package.author}\n"
            f"* Source: <{package.source}>\n"
            f"* Licence: [{package.licence}]({LICENCE_TEXTS[package.licence]})\n"
        )
    return "\n".join(sections)
