"""Digits as drawn by hand: lines between points, as shares of width and height."""

from math import cos, radians, sin

from tests.console.browser import Point

Stroke = list[Point]


def arc(x: float, y: float, rx: float, ry: float, start: float, end: float) -> Stroke:
    """Draw a part of an ellipse, clockwise from the right, angles in degrees."""
    angles = [radians(start + (end - start) * i / 16) for i in range(17)]
    return [(x + rx * cos(angle), y + ry * sin(angle)) for angle in angles]


DIGITS: dict[str, list[Stroke]] = {
    "0": [arc(0.5, 0.5, 0.24, 0.34, -90, 270)],
    "1": [[(0.4, 0.28), (0.52, 0.15), (0.52, 0.85)]],
    "2": [[*arc(0.5, 0.32, 0.2, 0.18, -170, 40), (0.3, 0.84), (0.72, 0.84)]],
    "3": [[*arc(0.48, 0.33, 0.18, 0.17, -150, 90), *arc(0.48, 0.67, 0.21, 0.18, -90, 150)]],
    "4": [[(0.42, 0.15), (0.28, 0.58), (0.74, 0.58)], [(0.6, 0.3), (0.6, 0.88)]],
    "5": [[(0.7, 0.16), (0.36, 0.16), (0.34, 0.46), *arc(0.48, 0.64, 0.2, 0.2, -120, 150)]],
    "6": [[(0.5, 0.12), (0.36, 0.4), (0.3, 0.62), *arc(0.5, 0.66, 0.22, 0.2, 180, -180)]],
    "7": [[(0.28, 0.18), (0.72, 0.18), (0.45, 0.86)]],
    "8": [arc(0.5, 0.32, 0.16, 0.2, 90, 450), arc(0.5, 0.7, 0.16, 0.18, -90, 270)],
    "9": [[*arc(0.5, 0.34, 0.18, 0.18, 0, -360), (0.66, 0.5), (0.58, 0.86)]],
}
