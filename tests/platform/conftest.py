"""A real S3 server on the loopback interface, which can be told to fail."""

import threading
import uuid

import pytest

UNAVAILABLE = "503 Service Unavailable"


class S3:
    """Moto's S3 behind a gate.

    Attributes:
        address: host:port.
        is_open: while False, every request is answered with 503.
        refused: how many were.
        close_at: called with method and path of a request; closes the gate when it returns True.
    """

    def __init__(self):
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self.is_open, self.refused, self.close_at = True, 0, None
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.address = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _answer(self, environ, start_response):
        if self.close_at is not None and self.close_at(environ["REQUEST_METHOD"], environ["PATH_INFO"]):
            self.is_open, self.close_at = False, None
        if self.is_open:
            return self._moto(environ, start_response)
        self.refused += 1
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response(UNAVAILABLE, [("Content-Length", "0")])
        return [b""]

    def uri(self, path="runs", **options):
        """Return the address of a folder in a bucket of its own."""
        query = "&".join(f"{key}={value}" for key, value in options.items())
        return f"s3://{self.new_bucket()}/{path}?endpoint_override={self.address}&scheme=http&region=us-east-1" + (
            f"&{query}" if query else ""
        )

    def new_bucket(self):
        """Make a bucket, as whoever runs a store does."""
        from pyarrow.fs import S3FileSystem

        name = f"bucket-{uuid.uuid4().hex}"
        S3FileSystem(
            endpoint_override=self.address, scheme="http", region="us-east-1", allow_bucket_creation=True
        ).create_dir(name)
        return name

    def stop(self):
        self._server.shutdown()


@pytest.fixture(scope="session")
def s3_server():
    server = S3()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server):
    """The server, working again after the test."""
    yield s3_server
    s3_server.is_open, s3_server.close_at = True, None
