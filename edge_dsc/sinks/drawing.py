"""An answer drawn on its picture: label, probability, latency."""

from __future__ import annotations

from collections.abc import Sequence

from edge_dsc.loop.answers import Answer
from engines.images import Array
from engines.packages import load

_SMALLEST_WIDTH = 320  # below it the text would not be readable
_BAND = 0.075  # height of the band of text, of the width


def caption_of(answer: Answer, labels: Sequence[str]) -> str:
    """Return the text under a picture: ``focal 98.2 %   0.9 ms``, or the error."""
    if answer.probabilities is None or answer.top is None:
        return str(answer.error)
    text = f"{labels[answer.top]} {answer.probabilities[answer.top]:.1%}   {answer.latency_ms:.1f} ms"
    return text if answer.age_ms is None else f"{text}   age {answer.age_ms:.0f} ms"


def draw_answer(picture: Array, answer: Answer, labels: Sequence[str]) -> Array:
    """Draw the caption in a band below a picture; the picture itself stays as the engine saw it.

    Args:
        picture: ``uint8 [H, W]`` grey or ``uint8 [H, W, 3]`` BGR; not changed.
        answer: What is written.
        labels: Class names; characters outside ASCII become ``?``, OpenCV's fonts have no others.

    Returns:
        ``uint8 [H', W', 3]`` BGR, at least 320 pixels wide, both sides even (video encoders want that).
    """
    cv2 = load("cv2")
    if picture.ndim == 2:
        picture = cv2.cvtColor(picture, cv2.COLOR_GRAY2BGR)
    if picture.shape[1] < _SMALLEST_WIDTH:
        height = round(picture.shape[0] * _SMALLEST_WIDTH / picture.shape[1])
        picture = cv2.resize(picture, (_SMALLEST_WIDTH, height), interpolation=cv2.INTER_LINEAR)
    height, width = picture.shape[:2]
    band = max(24, round(width * _BAND))
    bottom = band + (height + band) % 2
    drawn = cv2.copyMakeBorder(picture, 0, bottom, 0, width % 2, cv2.BORDER_CONSTANT, value=(0, 0, 0))
    text = caption_of(answer, labels).encode("ascii", "replace").decode()
    scale, thickness = band / 34, max(1, round(band / 24))
    wide = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, thickness)[0][0]
    scale *= min(1.0, (width - band) / max(wide, 1))
    at = (band // 4, height + round(band * 0.68))
    cv2.putText(drawn, text, at, cv2.FONT_HERSHEY_SIMPLEX, scale, (255, 255, 255), thickness, cv2.LINE_AA)
    return drawn
