"""Downloads from a local server that dies, lies, stalls, ignores ranges; archives that must not be trusted."""

import functools
import hashlib
import http.server
import importlib
import io
import os
import tarfile
import threading
import time
import types
import zipfile

import pytest

from detcore.data.fetch import DownloadError, fetch
from detcore.data.unpack import unpack

# the package's attribute of this name is the function
download_module = importlib.import_module("detcore.data.archives")

CONTENT = bytes(range(256)) * 1000  # 256,000 bytes
SHA256 = "sha256:" + hashlib.sha256(CONTENT).hexdigest()
quick = functools.partial(fetch, progress=False, timeout=0.5, attempts=3, wait=0.0)


class Handler(http.server.BaseHTTPRequestHandler):
    """What happens depends on the first part of the path; every request is noted."""

    def do_GET(self):
        behaviour, asked = self.path.split("/")[1], self.headers.get("Range")
        self.server.requests.append((behaviour, asked))
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        getattr(self, behaviour.replace("-", "_"))(start)

    def send(self, content, *, status=200, length=None, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def send_from(self, start, stop=None):
        span = {"Content_Range": f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"} if start else {}
        self.send(CONTENT[start:stop], status=206 if start else 200, length=len(CONTENT) - start, **span)

    def good(self, start):
        self.send_from(start)

    def dies(self, start):
        """Announces everything, closes the connection after 100,000 bytes."""
        self.send_from(start, start + 100_000)

    def dies_at_once(self, start):
        self.send_from(start, start)

    def no_range(self, start):
        """Sends everything whatever was asked; breaks off the first time."""
        first = len(self.server.requests) == 1
        self.send(CONTENT[: 1000 if first else None], length=len(CONTENT))

    def wrong_range(self, start):
        """Answers a range with another one, once."""
        if start == 1000:
            self.send(CONTENT, status=206, Content_Range=f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}")
        else:
            self.send_from(start)

    def garbage(self, start):
        self.send(b"x" * (len(CONTENT) - start), status=206 if start else 200, Content_Range=f"bytes {start}-")

    def page(self, start):
        """A page of apology with status 200."""
        self.send(b"<html>We have moved</html>")

    def stalls(self, start):
        """Half of it, then silence."""
        self.send_from(start, start + (len(CONTENT) - start) // 2)
        self.server.stop.wait(6)

    def drips(self, start):
        """A byte now and then: each comes in time, all of them never do."""
        self.send_from(start, start)
        for _ in range(60):  # 6 s, so that a client that would wait for ever fails its test and not the session
            if self.server.stop.wait(0.1):
                return
            try:
                self.wfile.write(b"x")
            except OSError:
                return

    def missing(self, start):
        self.send_error(404)

    def busy_then_good(self, start):
        if len(self.server.requests) < 3:
            self.send_error(503)
        else:
            self.send_from(start)

    def no_length(self, start):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(CONTENT)

    def shorter(self, start):
        """Has less than was already there."""
        if start:
            self.send_error(416)
        else:
            self.send_from(0)

    def moved(self, start):
        self.send(b"", status=301, Location="/good/x")

    def log_message(self, *args):
        """Tests need no access log."""


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.requests, httpd.stop, httpd.daemon_threads = [], threading.Event(), True
        httpd.handle_error = lambda *args: None  # clients that hang up are part of the tests
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield httpd
        httpd.stop.set()
        httpd.shutdown()
        thread.join()


@pytest.fixture
def url(server):
    return lambda behaviour: f"http://127.0.0.1:{server.server_port}/{behaviour}/x"


def no_part_is_taken_for_whole(folder):
    return not (folder / "x.tar").exists()


@pytest.mark.parametrize(
    "behaviour",
    ["good", "dies", "no_range", "wrong_range", "no_length", "busy_then_good", "moved", "shorter"],
)
@pytest.mark.parametrize("size", [None, len(CONTENT)])
def test_fetch_gets_the_file_from_a_server_that(behaviour, size, url, tmp_path):
    if behaviour in ("wrong_range", "shorter"):
        (tmp_path / "x.tar.part").write_bytes(CONTENT[:1000])
    assert quick([url(behaviour)], tmp_path / "x.tar", SHA256, size=size) == tmp_path / "x.tar"
    assert (tmp_path / "x.tar").read_bytes() == CONTENT
    assert os.listdir(tmp_path) == ["x.tar"]


def test_fetch_asks_a_server_that_died_for_the_rest_only(server, url, tmp_path):
    quick([url("dies")], tmp_path / "x.tar", SHA256)
    assert [asked for _, asked in server.requests] == [None, "bytes=100000-", "bytes=200000-"]


def test_fetch_goes_on_with_what_a_killed_process_left(server, url, tmp_path):
    (tmp_path / "x.tar.part").write_bytes(CONTENT[:255_000])
    quick([url("good")], tmp_path / "x.tar", SHA256, size=len(CONTENT))
    assert server.requests == [("good", "bytes=255000-")]
    assert (tmp_path / "x.tar").read_bytes() == CONTENT


def test_fetch_asks_for_nothing_if_all_had_arrived(server, url, tmp_path):
    (tmp_path / "x.tar.part").write_bytes(CONTENT)
    quick([url("missing")], tmp_path / "x.tar", SHA256, size=len(CONTENT))
    quick([url("missing")], tmp_path / "x.tar", SHA256)  # whole and checked: left alone
    assert server.requests == []


def test_fetch_survives_a_dead_first_mirror(server, url, tmp_path):
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as unused:
        dead = f"http://127.0.0.1:{unused.server_port}/x"  # closed below: nobody listens there
    quick([dead, url("missing"), url("good")], tmp_path / "x.tar", SHA256)
    # 404 is final: that mirror was asked once
    assert [behaviour for behaviour, _ in server.requests] == ["missing", "good"]
    assert (tmp_path / "x.tar").read_bytes() == CONTENT


def test_fetch_resumes_from_another_mirror(server, url, tmp_path):
    quick([url("stalls"), url("good")], tmp_path / "x.tar", SHA256, attempts=1)
    assert server.requests == [("stalls", None), ("good", "bytes=128000-")]
    assert (tmp_path / "x.tar").read_bytes() == CONTENT


@pytest.mark.parametrize("behaviour", ["stalls", "drips"])
def test_fetch_does_not_wait_for_ever(behaviour, url, tmp_path):
    before = time.monotonic()
    with pytest.raises(DownloadError, match=rf"{behaviour}/x: .*(timed out|stalled)"):
        quick([url(behaviour)], tmp_path / "x.tar", SHA256, attempts=1)
    assert time.monotonic() - before < 5
    assert no_part_is_taken_for_whole(tmp_path)


def test_fetch_names_both_checksums_of_garbage_and_goes_on(server, url, tmp_path):
    found = hashlib.sha256(b"x" * len(CONTENT)).hexdigest()
    with pytest.raises(DownloadError, match=rf"garbage/x: sha256 must be {SHA256[7:]}; got {found}"):
        quick([url("garbage")], tmp_path / "x.tar", SHA256)
    assert os.listdir(tmp_path) == []  # nothing of it is kept to resume from
    quick([url("garbage"), url("good")], tmp_path / "x.tar", SHA256)
    assert (tmp_path / "x.tar").read_bytes() == CONTENT


def test_fetch_starts_again_when_the_first_part_was_garbage(server, url, tmp_path):
    (tmp_path / "x.tar.part").write_bytes(b"x" * 1000)
    quick([url("good")], tmp_path / "x.tar", SHA256)
    assert [asked for _, asked in server.requests] == ["bytes=1000-", None]
    assert (tmp_path / "x.tar").read_bytes() == CONTENT


def test_fetch_does_not_read_what_announces_another_size(server, url, tmp_path):
    with pytest.raises(DownloadError, match=r"page/x: size must be 256000 bytes; the server announces 26"):
        quick([url("page")], tmp_path / "x.tar", SHA256, size=len(CONTENT))
    assert len(server.requests) == 1


def test_fetch_tells_what_each_mirror_did(server, url, tmp_path):
    with pytest.raises(DownloadError) as caught:
        quick([url("missing"), url("dies_at_once"), url("garbage")], tmp_path / "x.tar", SHA256)
    for part in (
        "one of 3 mirrors must give x.tar",
        "missing/x: HTTP 404",
        "dies_at_once/x: the connection ended after 0 of 256000 bytes (after 3 tries)",
        "garbage/x: sha256 must be",
        f"put it at {tmp_path / 'x.tar'}",
    ):
        assert part in str(caught.value)
    assert no_part_is_taken_for_whole(tmp_path)


def test_fetch_does_not_trust_a_file_of_that_name(url, tmp_path):
    (tmp_path / "x.tar").write_bytes(CONTENT[:-1])
    with pytest.raises(DownloadError, match=r"x.tar must have sha256 .*; got .*another or a half file: remove it"):
        quick([url("good")], tmp_path / "x.tar", SHA256)
    assert (tmp_path / "x.tar").read_bytes() == CONTENT[:-1]  # a user's file is not ours to delete


def test_fetch_checks_md5(url, tmp_path):
    quick([url("good")], tmp_path / "x.tar", "md5:" + hashlib.md5(CONTENT).hexdigest())
    with pytest.raises(DownloadError, match="md5 must be 0; got"):
        quick([url("good")], tmp_path / "y.tar", "md5:0")


def test_fetch_refuses_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="urls must hold at least one"):
        quick([], tmp_path / "x.tar", SHA256)


# --- archives


def make_tar(file, members, *, end=None):
    """Members: name -> bytes, or a TarInfo. ``end`` cuts the file after so many bytes."""
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            member = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.name = name
            if isinstance(content, bytes):
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    file.write_bytes(file.read_bytes()[:end])
    return file


def make_zip(file, members):
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file


def link(kind, target):
    member = tarfile.TarInfo()
    member.type, member.linkname = kind, target
    return member


def everything_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_unpack_fills_up_folders_that_are_there(make, tmp_path):
    file = make(tmp_path / "a", {"VOC/JPEGImages/1.jpg": b"one", "VOC/ImageSets/test.txt": b"1", "top": b""})
    (tmp_path / "out/VOC/JPEGImages").mkdir(parents=True)
    (tmp_path / "out/VOC/JPEGImages/2.jpg").write_bytes(b"two")
    assert unpack(file, tmp_path / "out", progress=False) == 3
    names = ["VOC/ImageSets/test.txt", "VOC/JPEGImages/1.jpg", "VOC/JPEGImages/2.jpg", "top"]
    assert everything_below(tmp_path / "out") == names
    assert (tmp_path / "out/VOC/JPEGImages/1.jpg").read_bytes() == b"one"


@pytest.mark.parametrize("name", ["/evil", "../evil", "a/../../evil", "C:\\evil", "..\\evil", "C:/evil"])
@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_unpack_refuses_paths_out_of_its_folder(make, name, tmp_path):
    file = make(tmp_path / "a", {"good": b"1", name: b"2"})
    with pytest.raises(DownloadError, match=r"member '.*evil' leads out of the folder"):
        unpack(file, tmp_path / "out", progress=False)
    assert everything_below(tmp_path) == ["a"]  # not even the good member


@pytest.mark.parametrize("target", ["/etc/passwd", "../../evil", "good"])
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_unpack_refuses_links(kind, target, tmp_path):
    file = make_tar(tmp_path / "a", {"good": b"1", "trap": link(kind, target)})
    with pytest.raises(DownloadError, match="member 'trap' is a link or a device"):
        unpack(file, tmp_path / "out", progress=False)
    assert everything_below(tmp_path) == ["a"]


def test_unpack_refuses_links_in_a_zip(tmp_path):
    info = zipfile.ZipInfo("trap")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(DownloadError, match="member 'trap' is a link"):
        unpack(tmp_path / "a", tmp_path / "out", progress=False)


# two members of 512 + 1024 bytes, then two empty blocks: cut between members, in a header, in a member, in the end
@pytest.mark.parametrize("end", [1536, 1536 + 100, 1000, 512 + 1024 + 512 + 300, 3072])
def test_unpack_refuses_half_a_tar(end, tmp_path):
    file = make_tar(tmp_path / "a", {"first": b"1" * 1024, "second": b"2" * 1024}, end=end)
    with pytest.raises(DownloadError, match=r"(cut short|whole archive|neither)"):
        unpack(file, tmp_path / "out", progress=False)
    assert everything_below(tmp_path) == ["a"]


def test_unpack_refuses_half_and_damaged_zips(tmp_path):
    file = make_zip(tmp_path / "a", {"first": b"1" * 1000, "second": b"2" * 1000})
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(DownloadError, match="must be a tar or zip file"):
        unpack(file, tmp_path / "out", progress=False)
    file.write_bytes(content.replace(b"1111", b"1011", 1))
    with pytest.raises(DownloadError, match="must be a whole archive; got: Bad CRC-32 for file 'first'"):
        unpack(file, tmp_path / "out", progress=False)
    assert everything_below(tmp_path) == ["a"]


def test_unpack_clears_what_a_killed_run_left(tmp_path):
    file = make_tar(tmp_path / "a", {"new": b"1"})
    (tmp_path / "out/.unpacking-a/half").mkdir(parents=True)
    unpack(file, tmp_path / "out", progress=False)
    assert os.listdir(tmp_path / "out") == ["new"]


# --- the whole way


@pytest.fixture
def archives(tmp_path, server, monkeypatch):
    """A registry of two small archives that share a folder, as VOC2007's do; the first mirror is dead."""
    known = {}
    for name in ("trainval", "test"):
        file = make_tar(tmp_path / f"{name}.tar", {f"VOCdevkit/VOC2007/ImageSets/Main/{name}.txt": name.encode()})
        content = file.read_bytes()
        setattr(Handler, name, lambda self, start, content=content: self.send(content))
        known[name] = download_module.Archive(
            filename=f"{name}.tar",
            urls=tuple(f"http://127.0.0.1:{server.server_port}/{way}/x" for way in ("missing", name)),
            checksum="sha256:" + hashlib.sha256(content).hexdigest(),
            size=len(content),
            folder=".",
            provides=(f"VOCdevkit/VOC2007/ImageSets/Main/{name}.txt",),
        )
    monkeypatch.setattr(download_module, "ARCHIVES", known)
    monkeypatch.setattr(download_module, "COLLECTIONS", {"voc": ("trainval", "test")})
    yield known
    for name in known:
        delattr(Handler, name)


def test_download_installs_a_collection_once(archives, server, tmp_path):
    for _ in range(2):
        assert download_module.download("voc", tmp_path / "root", progress=False) == tmp_path / "root"
        assert [behaviour for behaviour, _ in server.requests] == ["missing", "trainval", "missing", "test"]
    lists = tmp_path / "root/VOCdevkit/VOC2007/ImageSets/Main"
    assert sorted(os.listdir(lists)) == ["test.txt", "trainval.txt"]
    assert not list((tmp_path / "root").glob("*.tar*"))


def test_download_installs_again_what_was_removed(archives, server, tmp_path):
    root = tmp_path / "root"
    download_module.download("test", root, progress=False, keep_archive=True)
    (root / "VOCdevkit/VOC2007/ImageSets/Main/test.txt").unlink()
    download_module.download("test", root, progress=False)
    assert (root / "VOCdevkit/VOC2007/ImageSets/Main/test.txt").read_text() == "test"
    assert len(server.requests) == 2  # from the archive that was kept


def test_download_trusts_its_marker_and_not_what_lies_there(archives, tmp_path):
    root = tmp_path / "root"
    file = root / "VOCdevkit/VOC2007/ImageSets/Main/test.txt"
    file.parent.mkdir(parents=True)
    file.write_text("half of it")  # as a killed move might leave it
    download_module.download("test", root, progress=False)
    assert file.read_text() == "test"


def test_download_does_not_take_half_an_unpacking_for_whole(archives, tmp_path, monkeypatch):
    root = tmp_path / "root"

    def interrupted(source, folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("detcore.data.unpack._move_into", interrupted)
        with pytest.raises(KeyboardInterrupt):
            download_module.download("test", root, progress=False)
    assert not (root / ".detcore").exists()
    download_module.download("test", root, progress=False)
    assert (root / ".detcore/test.tar.json").exists()


def test_download_says_when_the_disk_is_too_small(archives, tmp_path, monkeypatch):
    monkeypatch.setattr(download_module.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
    with pytest.raises(DownloadError, match=r"must have 0.0 GB free for test.tar .*Pass another root"):
        download_module.download("test", tmp_path / "root", progress=False)


def test_registry_is_complete():
    for name, archive in download_module.ARCHIVES.items():
        kind, digest = archive.checksum.split(":")
        assert (kind, len(digest)) == ("sha256", 64), name
        assert len(archive.urls) >= 2, name
        assert all(url.endswith(archive.filename) for url in archive.urls), name
        assert archive.provides, name
    assert {part for parts in download_module.COLLECTIONS.values() for part in parts} == set(download_module.ARCHIVES)
