"""The kinds of control that a union ControlNet tells apart."""

MODES = {  # of the published Union nets
    "canny": 0,
    "tile": 1,
    "depth": 2,
    "blur": 3,
    "pose": 4,
    "gray": 5,
    "lq": 6,
}


def mode_number(mode):
    """The number of a kind of control, from a name of `MODES` or a number as it is or as text; None
    for anything else.
    """
    text = str(mode) if isinstance(mode, (str, int)) else ""
    return MODES.get(text, int(text) if len(text) < 10 and text.isdecimal() else None)
