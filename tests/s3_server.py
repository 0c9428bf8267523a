"""A server of S3 on this machine's loopback, in a process of its own, empty and without a disk."""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request

ENV = {
    "AWS_ACCESS_KEY_ID": "of-no-account",
    "AWS_SECRET_ACCESS_KEY": "a-secret-of-no-account",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
}
SERVE = """
import logging, sys
from werkzeug.serving import make_server
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
logging.getLogger("werkzeug").setLevel(logging.ERROR)
app = DomainDispatcherApplication(create_backend_app)
make_server("127.0.0.1", int(sys.argv[1]), app, threaded=True).serve_forever()
"""


@contextlib.contextmanager
def s3_server():
    """Start it, with a bucket called "bucket"; yield the environment in which clients find it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-c", SERVE, str(port)])
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(server, port)
        put = urllib.request.Request(f"{address}/bucket", method="PUT")
        put.add_header("Authorization", "AWS4-HMAC-SHA256 Credential=a/20200101/us-east-1/s3/x")
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(put).close()
        yield {**ENV, "AWS_ENDPOINT_URL": address}
    finally:
        server.kill()
        server.wait()


def _wait_for(server, port):
    end = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        assert server.poll() is None, "the server ended"
        assert time.monotonic() < end, "the server does not start"
        time.sleep(0.05)
