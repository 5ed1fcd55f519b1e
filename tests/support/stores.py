"""Real stores for tests: an S3 server (moto's) and a web server, each on a socket of its own."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from unittest.mock import patch

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "models"


class S3:
    """The server's bucket. environment: what a client finds it by, as a process gets it."""

    def __init__(self, host: str, port: int) -> None:
        self.url = f"s3://{BUCKET}/adapters"
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "a-key",
            "AWS_SECRET_ACCESS_KEY": "a-secret-that-is-in-no-log",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        with patch.dict(os.environ, self.environment):
            self.client: Any = boto3.client("s3")
        self.client.create_bucket(Bucket=BUCKET)

    def put(self, path: str, content: bytes) -> None:
        """A file below the store's root."""
        self.client.put_object(Bucket=BUCKET, Key=f"adapters/{path}", Body=content)

    def get(self, path: str) -> bytes:
        """A file below the store's root."""
        return self.client.get_object(Bucket=BUCKET, Key=f"adapters/{path}")["Body"].read()

    def copy_in(self, folder: Path, adapter_id: str) -> None:
        """What `aws s3 cp --recursive` does."""
        for file in folder.iterdir():
            self.put(f"{adapter_id}/{file.name}", file.read_bytes())

    def list_keys(self) -> list[str]:
        """Below the store's root."""
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix="adapters/").get("Contents", [])
        return [item["Key"].removeprefix("adapters/") for item in found]

    def clear(self) -> None:
        """An empty bucket again."""
        for key in self.list_keys():
            self.client.delete_object(Bucket=BUCKET, Key=f"adapters/{key}")


@contextmanager
def s3_server() -> Generator[S3]:
    """An S3 server with an empty bucket; this process' environment points at it meanwhile."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        s3 = S3(*server.get_host_and_port())
        with patch.dict(os.environ, s3.environment):
            yield s3
    finally:
        server.stop()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


@contextmanager
def web_server(folder: Path) -> Generator[str]:
    """A web server of a folder; gives its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
