"""Fonts for words in any script: matplotlib's own font has no Chinese, for one."""

import sys

from matplotlib import font_manager

OWN = "DejaVu Sans"  # comes with matplotlib


def families_for(text):
    """
    Give the fonts that together have all characters of a text; say in one line if some are in no font.

    :return: list of font families, as matplotlib takes them: the first that has a character draws it
    """
    families, missing = [OWN], without(text, font_manager.findfont(OWN))
    if not missing:
        return families
    for font in font_manager.fontManager.ttflist:
        if not missing:
            break
        if font.name in families:
            continue
        left = without(missing, font.fname)
        if left != missing:
            families.append(font.name)
            missing = left
    if missing:
        print(
            f"warning: no font on this computer has {missing[:20]}; install one that does, such as Noto Sans CJK",
            file=sys.stderr,
        )
    return families


def without(text, font_file):
    """:return: the printable characters of a text that a font lacks, each once"""
    try:
        known = font_manager.get_font(font_file).get_charmap()
    except (OSError, RuntimeError):  # a font that matplotlib cannot read has none of them
        return text
    return "".join(sorted({c for c in text if c.isprintable() and not c.isspace() and ord(c) not in known}))
