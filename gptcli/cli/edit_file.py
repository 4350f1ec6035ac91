"""The file that is edited: read as text, and written back as it was but for the text."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from gptcli.errors import CorruptError, LimitError, NotFoundError, OutputError, UsageError

# Beyond it, a key would take more than some hundredths of a second.
_MOST_BYTES = 1 << 20
_MARK = "\ufeff"  # the byte order mark that some programs begin a file with


class TextFile:
    """A file in UTF-8, or one that is yet to be made.

    The line end at the very end is not part of the text: a file that had one, or is new, has one again.

    Attributes:
        path: as it was named.
        text: as it is on the disk, with line feeds for its line ends.
        line_end: how its lines end; ``\\\\r\\\\n`` where all of them do so.
        exists: whether it is there.
    """

    def __init__(self, path: Path) -> None:
        """Read it.

        Raises CorruptError for what can't be read, or is not UTF-8, LimitError for one that is too large, NotFoundError
        where there is no folder for a new one, OutputError where it could not be written, UsageError for what is no
        file.
        """
        self.path = path
        self.exists = True
        self._mark = ""
        self.line_end, self._ended = "\n", True
        self._data = b""
        try:
            found = path.stat()
        except FileNotFoundError:
            self.exists, self.text = False, ""
            self._check_folder()
            return
        except OSError as error:
            raise CorruptError(f"{path} can't be read: {error.strerror}", "check the path") from None
        if stat.S_ISDIR(found.st_mode):
            raise UsageError(f"{path} is a folder", "name a file")
        if not stat.S_ISREG(found.st_mode):
            raise UsageError(f"{path} is no ordinary file", "name one, or pipe its text in without FILE")
        if found.st_size > _MOST_BYTES:
            raise LimitError(
                f"{path} has {found.st_size:,} bytes, more than {_MOST_BYTES:,}", "split it, or use another editor"
            )
        # Who may do everything may write this one, too; but somebody did not want it.
        if not found.st_mode & 0o222 or not os.access(path, os.W_OK):
            raise OutputError(f"{path} may only be read", "chmod u+w it, or edit a copy")
        self._data = self._read()
        self.text = self._decode(self._data)

    @property
    def changed_on_disk(self) -> bool:
        """Whether somebody else has written it since it was read or written here; one that is gone has not been."""
        try:
            data = self.path.read_bytes()
        except OSError:
            return False
        return not self.exists or data != self._data

    def save(self, text: str) -> int:
        """Write a text; returns the number of bytes. Raises OutputError."""
        from gptcli.core.files import write_whole

        data = self._encode(text)
        write_whole(self.path, data, like_before=True)
        self._data, self.text, self.exists = data, text, True
        return len(data)

    def rescue(self, text: str) -> Path:
        """Write a text that could not be saved beside the file, for its user alone. Raises OSError."""
        number = 0
        while True:
            beside = self.path.with_name(f"{self.path.name}.unsaved{f'-{number}' if number else ''}")
            try:
                handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            except FileExistsError:
                number += 1
                continue
            with os.fdopen(handle, "wb") as stream:
                stream.write(self._encode(text))
            return beside

    def _check_folder(self) -> None:
        target = self.path.resolve()
        if not target.parent.is_dir():
            raise NotFoundError(f"there is no folder {target.parent}", "mkdir -p it, or check the path")
        if not os.access(target.parent, os.W_OK):
            raise OutputError(f"{target.parent} can't be written", "choose another folder")

    def _read(self) -> bytes:
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise CorruptError(f"{self.path} can't be read: {error.strerror}", "check its permissions") from None

    def _decode(self, data: bytes) -> str:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorruptError(
                f"{self.path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start:,}",
                "convert it, for instance with iconv",
            ) from None
        if text.startswith(_MARK):
            self._mark, text = _MARK, text[1:]
        ends = text.count("\r\n")
        if ends and ends == text.count("\n") == text.count("\r"):  # else they stay as they are, and are seen
            self.line_end, text = "\r\n", text.replace("\r\n", "\n")
        if text:
            self._ended = text.endswith("\n")
        return text.removesuffix("\n")

    def _encode(self, text: str) -> bytes:
        if text == self.text and self.exists:
            return self._data
        whole = text + "\n" if text and self._ended else text
        # Half a character, which a terminal in another encoding may send, is no text.
        return (self._mark + whole.replace("\n", self.line_end)).encode("utf-8", "replace")
