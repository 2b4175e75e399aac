"""What was told while something was measured, as it may be kept: heard along the way, without this machine's folders."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

from compress.events import Forwarding, Progress


class Heard(Forwarding):
    """A `Progress` that passes everything on and keeps the warnings."""

    def __init__(self, progress: Progress, warnings: list[str]) -> None:
        """Pass on to `progress`; add to `warnings`."""
        super().__init__(progress)
        self._warnings = warnings

    def warn(self, text: str) -> None:
        """Passes it on and keeps it."""
        self._warnings.append(text)
        super().warn(text)


def without_folders(text: str, places: Iterable[Path] = ()) -> str:
    """A message in which files have no folders of this machine before them: 'x.onnx: …' for '/home/me/x.onnx: …'.

    Args:
        text: the message.
        places: folders and files that it may name, as they were given. A file under one of these folders keeps what
            follows the folder; so does one under the working directory, the home or the temporary folder.
    """
    folders: set[str] = set()
    for place in places:
        folders |= {str(found) for path in (place.absolute(), place.resolve()) for found in (path, path.parent)}
        if not place.is_absolute() and len(place.parts) > 1:
            text = re.sub(rf"(?<![\w./-]){re.escape(str(place))}(?![\w-])", place.name, text)
    for place in (Path.cwd(), Path.home(), Path(tempfile.gettempdir())):
        folders |= {str(place), str(place.resolve())}
    # The longest first: one may lie in another. Not after a name: the folder would be part of another's.
    for folder in sorted(folders - {"/"}, key=len, reverse=True):
        text = re.sub(rf"(?<![\w./-]){re.escape(folder.rstrip('/'))}/", "", text)
    return text
