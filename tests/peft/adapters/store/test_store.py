"""Stores of adapters: folders, S3 (moto's server over a socket) and a web server give the same files or say why not."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.stores import S3, s3_server, web_server

from quiver_peft.adapters.formats.adapter_files import AdapterFiles, read_files, revision_of
from quiver_peft.adapters.store.files import RemoteFiles
from quiver_peft.adapters.store.store import AdapterStore, publish
from quiver_peft.errors import AdapterError, StoreError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def make(folder: Path, content: str) -> Path:
    """An adapter's folder as far as a store looks at it: what the bytes mean is not its business."""
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(f'{{"peft_type": "{content}"}}')
    (folder / WEIGHTS).write_bytes(content.encode() * 100)
    (folder / "README.md").write_text(content)
    return folder


def same(found: AdapterFiles | None, folder: Path) -> bool:
    expected = read_files(folder)
    return found is not None and found.by_name == expected.by_name and found.revision == expected.revision


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    with s3_server() as s3:
        yield s3


@pytest.fixture
def s3(server: S3) -> Iterator[S3]:
    yield server
    server.clear()


@pytest.fixture(scope="module")
def bucket(server: S3) -> AdapterStore:
    return AdapterStore(server.url)


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, s3: S3, bucket: AdapterStore) -> AdapterStore:
    """Where adapters are published to."""
    return bucket if request.param == "s3" else AdapterStore(str(tmp_path / "store"))


def test_what_was_published_is_fetched(store: AdapterStore, tmp_path: Path) -> None:
    one, two = make(tmp_path / "one", "first"), make(tmp_path / "two", "second")
    assert store.ids() == []
    assert store.etag("support") is None
    with pytest.raises(FileNotFoundError):
        store.fetch("support")
    revision = publish(one, store, "support")
    stamp, files = store.fetch("support")
    assert same(files, one)
    assert files.revision == revision
    assert (store.etag("support"), store.ids(), store.exists("support")) == (stamp, ["support"], True)
    publish(two, store, "support")
    assert store.etag("support") != stamp
    assert same(store.fetch("support")[1], two)
    publish(one, store, "other.id")
    assert store.ids() == ["other.id", "support"]


def test_s3_keeps_old_revisions(s3: S3, bucket: AdapterStore, tmp_path: Path) -> None:
    folders = [make(tmp_path / name, name) for name in ("one", "two")]
    revisions = [publish(folder, bucket, "support") for folder in folders]
    for folder, revision in zip(folders, revisions, strict=True):
        assert same(bucket.fetch_revision("support", revision), folder)
        assert same(bucket.fetch_revision("support", revision[:8]), folder)
    assert bucket.fetch_revision("support", "0" * 64) is None
    assert bucket.fetch_revision("support", "0" * 6) is None
    assert bucket.fetch_revision("nobody", revisions[0]) is None
    with pytest.raises(AdapterError, match="2 revisions begin with"):
        bucket.fetch_revision("support", "")


def test_what_was_merely_copied_to_s3_is_fetched(s3: S3, bucket: AdapterStore, tmp_path: Path) -> None:
    s3.copy_in(make(tmp_path / "one", "first"), "support")
    stamp, files = bucket.fetch("support")
    assert same(files, tmp_path / "one")
    assert bucket.etag("support") == stamp
    s3.put(f"support/{WEIGHTS}", b"other")
    assert bucket.etag("support") != stamp


def test_a_web_server_of_what_was_published(s3: S3, bucket: AdapterStore, tmp_path: Path) -> None:
    """Both forms: a folder as it is, and a copy of a bucket. Its page of the folder lists them."""
    make(tmp_path / "www" / "plain", "first")
    revision = publish(make(tmp_path / "two", "second"), bucket, "listed")
    for key in s3.list_keys():
        (tmp_path / "www" / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "www" / key).write_bytes(s3.get(key))
    with web_server(tmp_path / "www") as url:
        store = AdapterStore(url + "/")
        assert store.ids() == ["listed", "plain"]
        assert same(store.fetch("plain")[1], tmp_path / "www" / "plain")
        assert same(store.fetch("listed")[1], tmp_path / "two")
        assert same(store.fetch_revision("listed", revision[:10]), tmp_path / "two")
        assert store.etag("nobody") is None
        stamp = store.etag("plain")
        (tmp_path / "www" / "plain" / WEIGHTS).write_bytes(b"longer than it was before" * 100)
        assert store.etag("plain") != stamp
        with pytest.raises(StoreError, match="adapters are published to folders, s3:// and gs://"):
            publish(tmp_path / "two", store, "plain")
    with pytest.raises(StoreError, match="the store does not answer as it should"):
        store.etag("plain")


def test_a_half_published_revision_is_not_seen(
    s3: S3, bucket: AdapterStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off before any of its writes, the old one is served, whole; publishing again completes the new one."""
    one, two = make(tmp_path / "one", "first"), make(tmp_path / "two", "second")
    publish(one, bucket, "support")
    assert isinstance(bucket.files, RemoteFiles)
    write = bucket.files.write
    for num_writes in range(5):
        left = iter(range(num_writes))

        def write_some(path: str, content: bytes, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise StoreError("cut off")
            write(path, content)

        monkeypatch.setattr(bucket.files, "write", write_some)
        with pytest.raises(StoreError, match="cut off"):
            publish(two, bucket, "support")
        assert same(bucket.fetch("support")[1], one)
    monkeypatch.undo()
    assert len(s3.list_keys()) == 9
    publish(two, bucket, "support")
    assert same(bucket.fetch("support")[1], two)


def test_a_file_that_is_not_the_listed_one_is_refused(s3: S3, bucket: AdapterStore, tmp_path: Path) -> None:
    revision = publish(make(tmp_path / "one", "first"), bucket, "support")
    s3.put(f"support/{revision}/{WEIGHTS}", b"damaged")
    with pytest.raises(AdapterError, match=rf"{revision}/{WEIGHTS}: is not the file that manifest.json names"):
        bucket.fetch("support")
    for changes, fragment in (
        ({"revision": "0" * 64}, "lacked a file that manifest.json names"),
        ({"revision": "../../etc"}, "must be 64 hexadecimal digits"),
        ({"schema_version": 2}, "schema_version 2 is not known"),
        ({"files": []}, "not a manifest"),
        ({"files": {}}, "no such file; an adapter folder holds"),
    ):
        publish(tmp_path / "one", bucket, "support")
        manifest = {**json.loads(s3.get("support/manifest.json")), **changes}
        s3.put("support/manifest.json", json.dumps(manifest).encode())
        with pytest.raises(AdapterError, match=fragment):
            bucket.fetch("support")
    for name in (CONFIG, WEIGHTS):
        s3.put(f"support/{'0' * 64}/{name}", (tmp_path / "one" / name).read_bytes())
    manifest = json.loads(s3.get(f"support/{revision}/manifest.json"))
    s3.put("support/manifest.json", json.dumps({**manifest, "revision": "0" * 64}).encode())
    with pytest.raises(AdapterError, match="names another revision than its files make"):
        bucket.fetch("support")
    for garbage in (b"", b"[]", b"{", b"null", b"[" * 100_000):
        s3.put("support/manifest.json", garbage)
        with pytest.raises(AdapterError, match="not a manifest"):
            bucket.fetch("support")


def test_readers_never_see_a_mixture(store: AdapterStore, tmp_path: Path) -> None:
    """While one adapter is published again and again, whoever reads gets one revision or the other."""
    folders = [make(tmp_path / name, name * 50) for name in ("one", "two")]
    whole = {publish(folder, store, "support") for folder in folders}
    done = threading.Event()

    def write() -> None:
        for i in range(10):
            publish(folders[i % 2], store, "support")
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    num_read = 0
    while not done.is_set():
        try:
            assert store.fetch("support")[1].revision in whole
        except AdapterError as error:
            assert "it was replaced" in str(error)
            continue
        num_read += 1
    thread.join()
    assert num_read


def test_a_folder_that_is_copied_over_gives_no_mixture(tmp_path: Path) -> None:
    """Between the read of one file and the other, both are replaced: it is read again."""
    store = AdapterStore(str(tmp_path))
    old, new = make(tmp_path / "old", "old"), make(tmp_path / "new", "new")
    shutil.copytree(old, tmp_path / "support")
    read = store.files.read
    replaced: list[str] = []

    def read_slowly(path: str) -> bytes:
        content = read(path)
        if not replaced:
            replaced.append(path)
            for file in new.iterdir():
                shutil.copyfile(file, tmp_path / "support" / file.name)
        return content

    store.files.read = read_slowly  # type: ignore[method-assign]
    assert same(store.fetch("support")[1], new)
    assert replaced == [f"support/{CONFIG}"]


@pytest.mark.parametrize(
    ("url", "fragment"),
    [
        ("ftp://host/x", "stores are folders or URLs of s3://, gs://, http://, https://"),
        ("file:///etc", "stores are folders or URLs of"),
        ("http://me:secret@host/x", "no user, query or '#'"),
        ("https://host/x?signature=secret", "no user, query or '#'"),
        ("gs://bucket/x", r"pip install 'quiver\[gcs\]'"),
    ],
)
def test_urls_that_are_no_store(url: str, fragment: str) -> None:
    with pytest.raises(StoreError, match=fragment) as caught:
        AdapterStore(url)
    assert "secret" not in str(caught.value)


def test_a_store_that_does_not_answer_says_so(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="s3://models/adapters/support/"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        AdapterStore(s3.url).etag("support")
    monkeypatch.undo()
    make(tmp_path / "store" / "support", "x")
    (tmp_path / "store" / "support" / WEIGHTS).unlink()
    (tmp_path / "store" / "support" / WEIGHTS).mkdir()
    with pytest.raises(AdapterError, match="no such file; an adapter folder holds"):
        AdapterStore(str(tmp_path / "store")).fetch("support")


def test_what_cannot_be_published(tmp_path: Path) -> None:
    store = AdapterStore(str(tmp_path / "store"))
    folder = make(tmp_path / "one", "first")
    for adapter_id in ("", ".hidden", "a/b", "..", "a" * 129):
        with pytest.raises(AdapterError, match="must be 1 to 128 letters"):
            publish(folder, store, adapter_id)
    with pytest.raises(AdapterError, match="nowhere: no such folder"):
        publish(tmp_path / "nowhere", store, "support")
    (folder / CONFIG).unlink()
    with pytest.raises(AdapterError, match=f"{CONFIG}: no such file"):
        publish(folder, store, "support")
    assert not (tmp_path / "store").exists()
    assert revision_of(b"a", b"b") != revision_of(b"ab", b"")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
