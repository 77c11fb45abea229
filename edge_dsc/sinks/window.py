"""A window with the annotated picture, where OpenCV has windows."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from edge_dsc.loop.answers import Answer
from edge_dsc.loop.stopping import Stop
from edge_dsc.sinks.drawing import draw_answer
from engines.errors import EnvironmentProblem
from engines.packages import load

_TITLE = "edge-dsc"
_KEYS = (ord("q"), 27)  # 27: Escape


class Window:
    """Shows each annotated picture; q or Escape ends the run."""

    def __init__(self, labels: Sequence[str], stop: Stop) -> None:
        """Open it.

        Raises:
            EnvironmentProblem: No screen, or an OpenCV without windows.
        """
        cv2 = load("cv2")
        remedy = "use --serve PORT and a browser, or JetPack's OpenCV on a desktop"
        # Qt would end the process where it finds no screen: it is looked for before.
        if sys.platform.startswith("linux") and not (
            os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
        ):
            raise EnvironmentProblem("--show needs a screen, and DISPLAY is not set", remedy=remedy)
        try:
            cv2.namedWindow(_TITLE, cv2.WINDOW_NORMAL)
        except (cv2.error, AttributeError) as error:
            raise EnvironmentProblem(
                f"OpenCV {cv2.__version__} here has no windows", remedy=remedy
            ) from error
        self._cv2, self._labels, self._stop = cv2, labels, stop

    def write(self, answer: Answer) -> None:
        """Show one picture."""
        if answer.picture is not None:
            self._cv2.imshow(_TITLE, draw_answer(answer.picture, answer, self._labels))
        if self._cv2.waitKey(1) & 0xFF in _KEYS:
            self._stop.ask()

    def close(self) -> None:
        """Close the window."""
        self._cv2.destroyWindow(_TITLE)
