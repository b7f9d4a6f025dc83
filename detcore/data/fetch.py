"""Downloads one file over HTTP: mirrors in order, resumed, never under its own name before its checksum is right."""

import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pooch
from tqdm import tqdm

__all__ = ["DownloadError", "fetch"]

CHUNK = 1 << 16  # bytes
SLOWEST = 1024  # bytes a second, averaged over the time-out; a server slower than this counts as stalled
PROGRESS_MADE = 1 << 20  # bytes; a try that brings as many does not count as failed
WAIT_AT_MOST = 30.0  # seconds between tries


class DownloadError(OSError):
    """A file that could not be had or unpacked; the message says what was tried and what to do."""


class _Refused(Exception):
    """This mirror will not do better if asked again."""


def fetch(
    urls: Sequence[str],
    destination: str | Path,
    checksum: str,
    *,
    size: int | None = None,
    progress: bool = True,
    timeout: float = 30.0,
    attempts: int = 5,
    wait: float = 1.0,
) -> Path:
    """Downloads a file from the first mirror that gives the right one.

    Data are written to ``<destination>.part`` and stay there if the connection breaks or the process is
    killed; the next try, from whichever mirror, asks for the rest only. The file gets its name in one
    step, after its checksum was found right.

    Args:
        urls: the mirrors, best first.
        destination: path of the file.
        checksum: ``"sha256:..."`` or ``"md5:..."``.
        size: bytes, if known; a mirror that announces another size is not read at all.
        progress: show a bar.
        timeout: seconds without data after which a connection counts as stalled, > 0.
        attempts: tries of one mirror that bring less than 1 MiB before the next one is asked, >= 1.
        wait: seconds before the second try, doubled with each; 0 for none.

    Returns:
        ``destination``. A file that is there already is checked and left alone.

    Raises:
        ValueError: for no mirror, or an unknown kind of checksum.
        DownloadError: if no mirror gives the right file: what each of them did; or if
            ``destination`` exists and is another file.

    Example:
        >>> fetch(["http://localhost:1/x.tar"], "/tmp/x.tar", "crc32:1234")
        Traceback (most recent call last):
        ValueError: fetch: checksum must start with sha256: or md5:; got 'crc32:1234'.
    """
    kind, _, expected = checksum.partition(":")
    if kind not in ("sha256", "md5"):
        raise ValueError(f"fetch: checksum must start with sha256: or md5:; got {checksum!r}.")
    if not urls:
        raise ValueError("fetch: urls must hold at least one mirror; got none.")
    destination = Path(destination)
    if destination.exists():
        found = pooch.file_hash(str(destination), alg=kind)
        if found != expected:
            raise DownloadError(
                f"fetch: {destination} must have {kind} {expected}; got {found}. It is another or a half file: remove "
                "it and try again."
            )
        return destination
    destination.parent.mkdir(parents=True, exist_ok=True)
    part = destination.with_name(destination.name + ".part")
    history = []
    for url in urls:
        reason = _from_mirror(url, part, kind, expected, size, progress, timeout, attempts, wait)
        if reason is None:
            os.replace(part, destination)
            return destination
        history.append(f"{url}: {reason}")
    tried = "\n  ".join(history)
    raise DownloadError(
        f"fetch: one of {len(urls)} mirrors must give {destination.name}; none did:\n  {tried}\nTry again later (what "
        f"has arrived is kept in {part.name}), or fetch the file by hand and put it at {destination}."
    )


def _from_mirror(
    url: str,
    part: Path,
    kind: str,
    expected: str,
    size: int | None,
    progress: bool,
    timeout: float,
    attempts: int,
    wait: float,
) -> str | None:
    """Fills ``part`` with the right file and returns ``None``, or gives up and says why."""
    failures, reason = 0, ""
    while failures < attempts:
        before = part.stat().st_size if part.exists() else 0
        if failures:
            time.sleep(min(wait * 2 ** (failures - 1), WAIT_AT_MOST))
        try:
            _read_into(part, url, size, progress, timeout)
        except _Refused as error:
            return str(error)
        except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are OSErrors
            reason = str(error) or type(error).__name__
            gained = (part.stat().st_size if part.exists() else 0) - before
            failures = failures + 1 if gained < PROGRESS_MADE else 0
            continue
        found = pooch.file_hash(str(part), alg=kind)
        if found == expected:
            return None
        part.unlink()
        reason = f"{kind} must be {expected}; got {found}"
        if before == 0:
            return reason  # every byte was this mirror's
        failures += 1  # what was there before may have been the fault: once more, from the start
    return f"{reason} (after {attempts} tries)"


def _read_into(part: Path, url: str, size: int | None, progress: bool, timeout: float) -> None:
    """Appends the missing bytes to ``part``; raises unless it is as long as announced afterwards."""
    have = part.stat().st_size if part.exists() else 0
    if size is not None and have == size:
        return
    if size is not None and have > size:
        part.unlink()
        have = 0
    headers = {"User-Agent": "detcore (data set download)", "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.unlink(missing_ok=True)
            raise OSError("the server has less than had arrived; starting again") from error
        if error.code < 500 and error.code not in (408, 425, 429):
            raise _Refused(f"HTTP {error.code} {error.reason}") from error
        raise
    with response:
        resumed = response.status == http.HTTPStatus.PARTIAL_CONTENT
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink(missing_ok=True)
            raise OSError(f"answered with the range {response.headers.get('Content-Range')!r}; starting again")
        if not resumed:
            have = 0  # the server ignores ranges, or nothing was there
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None else size
        if size is not None and total != size:
            raise _Refused(f"size must be {size} bytes; the server announces {total}")
        with (
            part.open("ab" if resumed else "wb") as stream,
            tqdm(
                desc=part.name.removesuffix(".part"),
                initial=have,
                total=total,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                disable=not progress,
            ) as bar,
        ):
            _copy(response, stream, bar, timeout)
            stream.flush()
            os.fsync(stream.fileno())
        arrived = part.stat().st_size
    if total is not None and arrived < total:
        raise OSError(f"the connection ended after {arrived} of {total} bytes")
    if size is not None and arrived > size:
        part.unlink()
        raise _Refused(f"size must be {size} bytes; the server sent more")


def _copy(response: http.client.HTTPResponse, stream, bar: tqdm, timeout: float) -> None:
    """Copies until the end; raises where less than ``SLOWEST`` bytes a second come during ``timeout`` seconds."""
    since, received = time.monotonic(), 0
    while chunk := response.read1(CHUNK):  # read1 gives what is there; read would wait for all of CHUNK
        stream.write(chunk)
        bar.update(len(chunk))
        received += len(chunk)
        if (passed := time.monotonic() - since) > timeout:
            if received < SLOWEST * passed:
                raise TimeoutError(f"stalled: {received} bytes in {passed:.0f} s")
            since, received = time.monotonic(), 0
