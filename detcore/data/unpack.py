"""Unpacks tar and zip archives that need not be trusted, whole or not at all."""

import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from detcore.data.fetch import DownloadError

__all__ = ["unpack"]


def unpack(archive: str | Path, folder: str | Path, *, progress: bool = True) -> int:
    """Unpacks an archive into a folder.

    Members go to a folder of their own beside the final place first and are moved when the last one is
    out, so a broken archive or a killed process leaves nothing that looks complete. Files of the same name are
    replaced. Only plain files and folders are accepted: names that are absolute or contain ``..``, links
    and devices are refused before anything is written.

    Args:
        archive: a ``.tar`` (also compressed) or ``.zip`` file.
        folder: where its members go; made if missing.
        progress: show a bar.

    Returns:
        Number of files unpacked.

    Raises:
        DownloadError: if the archive is damaged, ends early, is of no known kind, or is refused; names the member.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with zipfile.ZipFile(f"{folder}/a.zip", "w") as file:
        ...         file.writestr("pictures/list.txt", "000001")
        ...     unpack(f"{folder}/a.zip", folder, progress=False), os.listdir(f"{folder}/pictures")
        (1, ['list.txt'])
    """
    archive, folder = Path(archive), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / f".unpacking-{archive.name}"
    if scratch.exists():  # left by a run that was killed
        shutil.rmtree(scratch)
    scratch.mkdir()
    try:
        if zipfile.is_zipfile(archive):
            num_files = _unpack_zip(archive, scratch, progress)
        elif tarfile.is_tarfile(archive):
            num_files = _unpack_tar(archive, scratch, progress)
        else:
            raise DownloadError(f"unpack: {archive} must be a tar or zip file; it is neither. Fetch it again.")
        _move_into(scratch, folder)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise DownloadError(f"unpack: {archive} must be a whole archive; got: {error}. Fetch it again.") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return num_files


def _unpack_tar(archive: Path, scratch: Path, progress: bool) -> int:
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
        for member in members:
            _check_name(archive, member.name)
            if not (member.isreg() or member.isdir()):
                raise DownloadError(_refusal(archive, member.name, "is a link or a device"))
        # tarfile takes an archive that was cut between two members for a whole one: its last block must be zeros
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DownloadError(f"unpack: {archive} must end with an empty block; it is cut short. Fetch it again.")
        for member in _with_bar(members, archive, progress):
            target = scratch / member.name
            if member.isdir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            source = tar.extractfile(member)
            assert source is not None  # a regular file
            _write(source, target, member.size, archive)
    return sum(member.isreg() for member in members)


def _unpack_zip(archive: Path, scratch: Path, progress: bool) -> int:
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        for member in members:
            _check_name(archive, member.filename)
            if stat.S_ISLNK(member.external_attr >> 16):
                raise DownloadError(_refusal(archive, member.filename, "is a link"))
        for member in _with_bar(members, archive, progress):
            target = scratch / member.filename
            if member.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            with file.open(member) as source:  # reading to the end checks the CRC
                _write(source, target, member.file_size, archive)
    return sum(not member.is_dir() for member in members)


def _check_name(archive: Path, name: str) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    drive = bool(path.parts) and ":" in path.parts[0]
    if not name or path.is_absolute() or drive or ".." in path.parts:
        raise DownloadError(_refusal(archive, name, "leads out of the folder"))


def _refusal(archive: Path, name: str, why: str) -> str:
    return (
        f"unpack: {archive}: member {name!r} {why}; only plain files and folders below the archive's own are unpacked. "
        "Do not use this archive."
    )


def _with_bar(members: list, archive: Path, progress: bool) -> Iterator:
    yield from tqdm(members, desc=f"unpack {archive.name}", unit="file", disable=not progress)


def _write(source, target: Path, size: int, archive: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as stream:
        shutil.copyfileobj(source, stream, 1 << 20)
    if target.stat().st_size != size:
        raise DownloadError(
            f"unpack: {archive}: {target.name} must have {size} bytes; it is cut short. Fetch it again."
        )


def _move_into(source: Path, folder: Path) -> None:
    """Moves what is in ``source`` into ``folder``; folders that are there already are filled up.

    A new folder arrives in one step. In one that is filled up, the lists of pictures come last, so that
    an interrupted move leaves pictures without a list and not a list without its pictures.
    """
    for item in sorted(source.iterdir(), key=lambda path: (path.name == "ImageSets", path.name)):
        place = folder / item.name
        if item.is_dir() and place.is_dir():
            _move_into(item, place)
        else:
            os.replace(item, place)
