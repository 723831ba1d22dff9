"""Reading documents from text files, folders, globs, JSON lines and the standard library."""

import dataclasses
import errno
import glob
import gzip
import hashlib
import io
import json
import os
import stat
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from train.data.manifest import DataError

STDLIB = "stdlib"
_JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
# Tests are left out because many distributions do not ship them: with them the
# corpus would depend on how Python was packaged more than on its version.
_STDLIB_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
)


@dataclasses.dataclass
class ReadCounts:
    """What was met while reading; filled in by `find_files` and `read_documents`."""

    files: int = 0
    not_files: int = 0
    not_files_examples: list[str] = dataclasses.field(default_factory=list)
    not_utf8: int = 0
    not_utf8_examples: list[str] = dataclasses.field(default_factory=list)

    def skip_not_a_file(self, where: str) -> None:
        """Counts a name that leads to neither a folder nor a regular file."""
        self.not_files += 1
        if len(self.not_files_examples) < 5:
            self.not_files_examples.append(where)

    def skip_not_utf8(self, where: str) -> None:
        """Counts a file, or a line of JSON lines, that is not UTF-8."""
        self.not_utf8 += 1
        if len(self.not_utf8_examples) < 5:
            self.not_utf8_examples.append(where)


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What files are known by without reading them.

    Folders do not enter, so that what is moved as a whole stays the same.

    Attributes:
      files: how many they are.
      size: their bytes.
      names_and_sizes: SHA-256 of each file's name and size.
      newest: when the last of them was modified, in nanoseconds.
    """

    files: int
    size: int
    names_and_sizes: str
    newest: int

    @classmethod
    def of(cls, files: Sequence[Path]) -> "Fingerprint":
        """The fingerprint of existing files.

        Raises:
          OSError: one is not there.
        """
        found = [path.stat() for path in files]
        listed = sorted((path.name, info.st_size) for path, info in zip(files, found, strict=True))
        return cls(
            files=len(files),
            size=sum(info.st_size for info in found),
            names_and_sizes=hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
            newest=max((info.st_mtime_ns for info in found), default=0),
        )

    def __str__(self) -> str:
        return f"{self.files:,} files of {self.size:,} bytes"


def find_files(
    inputs: Sequence[str],
    *,
    counts: ReadCounts | None = None,
    leave_out: Path | None = None,
) -> list[Path]:
    """The files behind the inputs: sorted, each once, whatever the inputs' order.

    Links are followed, to files and to folders, each folder once.

    Args:
      inputs: each a file, a folder (read recursively, hidden files left out), a glob
        (`**` recurses), or `"stdlib"`: the running interpreter's standard library.
      counts: counts the names that are skipped: pipes, sockets, devices, and links to nothing.
      leave_out: a folder whose files are never input.

    Raises:
      DataError: an input that matches no file, a folder that cannot be read.
    """
    counts = ReadCounts() if counts is None else counts
    # By what a link leads to, so that no file is read twice; the link's own name tells its kind.
    files: dict[Path, Path] = {}
    for item in inputs:
        if item == STDLIB:
            found = _stdlib_files(counts)
        elif os.path.exists(item):
            found = list(_files_at(Path(item), counts))
        elif glob.has_magic(item):
            matches = sorted(glob.glob(os.path.expanduser(item), recursive=True))
            found = [path for match in matches for path in _files_at(Path(match), counts)]
        else:
            raise DataError(f"data: input {item!r} does not exist")
        if not found:
            raise DataError(f"data: input {item!r} matches no file")
        for path in map(Path.absolute, found):
            target = path.resolve()
            if leave_out is None or not target.is_relative_to(leave_out.resolve()):
                files[target] = min(path, files.get(target, path))
    return sorted(files.values())


def read_documents(
    files: Sequence[Path],
    *,
    text_key: str,
    counts: ReadCounts,
    advance: Callable[[int], object] = lambda size: None,
) -> Iterator[str]:
    """Yields the documents of the files in order: a text file is one, a JSON line is one.

    Args:
      files: from `find_files`.
      text_key: the key of a JSON line's object that holds the text.
      counts: counts what is met, and what is skipped because it is not UTF-8.
      advance: called with the number of bytes read from disk since its last call.

    Raises:
      DataError: a damaged or truncated file, a line that is not JSON or has no text.
    """
    for path in files:
        counts.files += 1
        if path.name.lower().endswith(_JSON_LINES):
            yield from _read_json_lines(path, text_key, counts, advance)
            continue
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"data: cannot read {path}: {error.strerror}") from None
        advance(len(content))
        try:
            yield content.decode("utf-8")
        except UnicodeDecodeError:
            counts.skip_not_utf8(str(path))


def _files_at(path: Path, counts: ReadCounts) -> Iterator[Path]:
    """The regular files behind a name: those of a folder, the file itself, or none."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):
            _refuse(error)
        mode = 0  # A link to nothing, or to itself.
    if stat.S_ISDIR(mode):
        yield from _walk(path, counts)
    elif stat.S_ISREG(mode):
        yield path
    else:  # Opening a pipe could block for ever.
        counts.skip_not_a_file(str(path))


def _refuse(error: OSError) -> None:
    raise DataError(f"data: cannot read {error.filename}: {error.strerror}") from None


def _walk(
    folder: Path, counts: ReadCounts, skipped: frozenset[str] = frozenset()
) -> Iterator[Path]:
    seen: set[str] = set()  # Links may lead in circles.
    for directory, names, files in os.walk(folder, onerror=_refuse, followlinks=True):
        if (target := os.path.realpath(directory)) in seen:
            names.clear()
            continue
        seen.add(target)
        names[:] = sorted(n for n in names if n not in skipped and not n.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield from _files_at(Path(directory, name), counts)


def _stdlib_files(counts: ReadCounts) -> list[Path]:
    paths = sysconfig.get_paths()
    # Some distributions split the pure and the platform-specific part over two folders.
    folders = dict.fromkeys((Path(paths["stdlib"]), Path(paths["platstdlib"])))
    files = [
        path
        for folder in folders
        if folder.is_dir()
        for path in _walk(folder, counts, _STDLIB_SKIPPED)
        if path.suffix == ".py"
    ]
    if not files:
        raise DataError(
            f"data: the standard library has no .py files at {paths['stdlib']};"
            " give other text with --input"
        )
    return files


def _read_json_lines(
    path: Path, text_key: str, counts: ReadCounts, advance: Callable[[int], object]
) -> Iterator[str]:
    number = 0
    try:
        with open(path, "rb", buffering=0) as raw, _decompressed(path, raw) as lines:
            done = 0
            for number, line in enumerate(lines, start=1):
                if raw.tell() != done:
                    advance(raw.tell() - done)
                    done = raw.tell()
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    text = _text_of_line(line, text_key, where)
                except UnicodeError:
                    counts.skip_not_utf8(where)
                    continue
                yield text
            advance(raw.tell() - done)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"data: {path} is damaged or truncated after line {number}: {error}"
        ) from None


def _text_of_line(line: bytes, text_key: str, where: str) -> str:
    content = line.decode("utf-8")
    try:
        record = json.loads(content)
    except json.JSONDecodeError as error:
        raise DataError(f"data: {where} is not JSON: {error}") from None
    except (ValueError, RecursionError) as error:  # A number too long, brackets too deep.
        raise DataError(f"data: {where} is JSON that Python cannot read: {error}") from None
    if not isinstance(record, dict) or text_key not in record:
        found = sorted(record)[:8] if isinstance(record, dict) else type(record).__name__
        raise DataError(
            f"data: {where} has no key {text_key!r} (found {found}); name the text's key"
            " with --text_key"
        )
    text = record[text_key]
    if not isinstance(text, str):
        raise DataError(
            f"data: {where} has {text_key!r} of type {type(text).__name__}, expected a string"
        )
    text.encode("utf-8")  # JSON can spell a lone surrogate, which UTF-8 cannot.
    return text


def _decompressed(path: Path, raw: io.FileIO) -> io.BufferedIOBase:
    name = path.name.lower()
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    if name.endswith(".zst"):
        return io.BufferedReader(_ZstdReader(raw), 1 << 20)
    return io.BufferedReader(raw, 1 << 20)


class _ZstdReader(io.RawIOBase):
    """Decompresses all frames of a zstd file, and notices when the last one is cut short.

    The library's own stream reader ends quietly in the middle of a frame.
    """

    def __init__(self, raw: io.FileIO):
        import zstandard

        self._raw = raw
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._error = zstandard.ZstdError
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._output:
            chunk = self._input or self._raw.read(1 << 16)
            self._input = b""
            if not chunk:
                if self._frame is not None:
                    raise EOFError("the last zstd frame is incomplete")
                return 0
            if self._frame is None:
                self._frame = self._new_frame()
            try:
                self._output = memoryview(self._frame.decompress(chunk))
            except self._error as error:
                raise OSError(str(error)) from None
            if self._frame.eof:
                self._input = self._frame.unused_data
                self._frame = None
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size
