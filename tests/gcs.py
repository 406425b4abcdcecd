"""A fake Google Cloud Storage server: the parts of the JSON API that gcsfs, TensorStore and
Google's client use here, including generations and preconditions.

Source: cloud.google.com/storage/docs/json_api/v1/objects and .../request-preconditions.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import pathlib
import re
import sys
import threading
import urllib.parse
from collections.abc import Callable

from lm.storage.gcs import filesystem

Objects = dict[str, tuple[bytes, int]]  # name: (content, generation)


def download(address: str, folder: pathlib.Path) -> pathlib.Path:
    """Copy everything below an address to a folder on disk."""
    for name in filesystem().find(address):
        path = folder / f"gs://{name}".removeprefix(f"{address}/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(filesystem().cat_file(name))
    return folder


class Store(http.server.ThreadingHTTPServer):
    """A server on 127.0.0.1 with empty buckets, running between `start` and `stop`.

    refused: (whether it is a write, the object's name; b/<bucket> for bucket metadata, "" for a
    listing) -> whether to answer 403.
    """

    daemon_threads = True

    def __init__(self, *buckets: str):
        super().__init__(("127.0.0.1", 0), _Request)
        self.buckets: dict[str, Objects] = {name: {} for name in buckets}
        self.lock, self.generation, self.uploads = threading.RLock(), 1_700_000_000_000_000, {}
        self.refused: Callable[[bool, str], bool] = lambda write, name: False
        self.address = f"http://127.0.0.1:{self.server_port}"

    def start(self) -> None:
        """Serve in a thread."""
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Stop serving."""
        self.shutdown()
        self.server_close()

    def handle_error(self, request, address) -> None:
        """Ignore clients that disconnect."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, address)

    def put(self, bucket: str, name: str, data: bytes) -> dict:
        """Write an object and return its metadata."""
        with self.lock:
            self.generation += 1
            self.buckets[bucket][name] = data, self.generation
        return self.metadata(bucket, name)

    def metadata(self, bucket: str, name: str) -> dict:
        """The metadata of an object."""
        data, generation = self.buckets[bucket][name]
        digest = base64.b64encode(hashlib.md5(data).digest()).decode()
        now = "2026-01-01T00:00:00.000Z"
        fields = {"name": name, "bucket": bucket, "size": str(len(data)), "md5Hash": digest}
        fields |= {"generation": str(generation), "metageneration": "1", "timeCreated": now}
        return {"kind": "storage#object", "id": f"{bucket}/{name}", "updated": now} | fields


class _Request(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        """Print nothing."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urllib.parse.urlsplit(self.path)
        query = {key: value[0] for key, value in urllib.parse.parse_qs(url.query).items()}
        with self.server.lock:
            if url.path == "/batch/storage/v1":
                self._batch(body)
                return
            self._send(*self._do(self.command, url.path, query, body))

    do_GET = do_POST = do_PUT = do_DELETE = _answer

    def _send(self, status: int, answer: dict | bytes = b"", headers: dict | None = None) -> None:
        data = json.dumps(answer).encode() if isinstance(answer, dict) else answer
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if status not in (204, 304):
            self.wfile.write(data)

    def _do(self, method: str, path: str, query: dict, body: bytes):
        """(status, body, headers) of one request."""
        match = re.fullmatch(r"/(upload/|download/|)storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", path)
        kind, bucket, name = match.groups()
        bucket, listing = urllib.parse.unquote(bucket), path.endswith("/o")
        if bucket not in self.server.buckets:
            return 404, {"error": {"code": 404, "message": "The bucket does not exist."}}
        if name and "/rewriteTo/" in name:
            source, target = map(urllib.parse.unquote, re.split(r"/rewriteTo/b/[^/]+/o/", name))
            if source not in self.server.buckets[bucket]:
                return 404, {"error": {"code": 404, "message": f"No such object: {source}"}}
            copied = self.server.put(bucket, target, self.server.buckets[bucket][source][0])
            return 200, {"done": True, "resource": copied}
        name = urllib.parse.unquote(name or query.get("name", ""))
        name = name if name or listing else f"b/{bucket}"
        write = bool(kind == "upload/" or method == "DELETE")
        if self.server.refused(write, name):
            message = "nobody@example.com does not have storage.objects access"
            return 403, {"error": {"code": 403, "message": message}}
        if kind == "upload/":
            return self._upload(bucket, name, query, body)
        if listing:
            return 200, self._list(bucket, query)
        if name == f"b/{bucket}":
            return 200, {"kind": "storage#bucket", "name": bucket, "id": bucket}
        return self._object(method, bucket, name, query, kind)

    def _object(self, method: str, bucket: str, name: str, query: dict, kind: str):
        objects = self.server.buckets[bucket]
        if name not in objects:
            return 404, {"error": {"code": 404, "message": f"No such object: {bucket}/{name}"}}
        data, generation = objects[name]
        if query.get("ifGenerationNotMatch") == str(generation):
            return 304, b""
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            return 412, {"error": {"code": 412, "message": "Precondition failed"}}
        if method == "DELETE":
            del objects[name]
            return 204, b""
        if kind != "download/" and query.get("alt") != "media":
            return 200, self.server.metadata(bucket, name)
        headers = {"x-goog-generation": str(generation), "Content-Type": "application/octet-stream"}
        byte_range = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not byte_range:
            return 200, data, headers
        first, last = byte_range.groups()
        start = int(first) if first else max(0, len(data) - int(last))
        stop = min(len(data), int(last) + 1) if first and last else len(data)
        if start >= len(data):
            return 416, b"", headers
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return 206, data[start:stop], headers

    def _upload(self, bucket: str, name: str, query: dict, body: bytes):
        if upload_id := query.get("upload_id"):
            self.server.uploads[upload_id] += body
            content_range = re.fullmatch(
                r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", self.headers["Content-Range"]
            )
            if content_range[3] == "*" or len(self.server.uploads[upload_id]) < int(
                content_range[3]
            ):
                return 308, b"", {"Range": f"bytes=0-{len(self.server.uploads[upload_id]) - 1}"}
            return 200, self.server.put(bucket, name, bytes(self.server.uploads.pop(upload_id)))
        kind = query["uploadType"]
        if kind == "resumable":
            self.server.generation += 1
            upload_id = str(self.server.generation)
            self.server.uploads[upload_id] = bytearray()
            parameters = urllib.parse.urlencode({"name": name, "upload_id": upload_id})
            address = f"{self.server.address}/upload/storage/v1/b/{bucket}/o?{parameters}"
            return 200, {}, {"Location": address}
        if kind == "multipart":
            line = (
                b"--" + re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            )
            _, metadata, data = body.split(line, 2)
            name = json.loads(metadata.split(b"\n\n", 1)[1])["name"]
            body = data.split(b"\n\n", 1)[1].removesuffix(line + b"--").removesuffix(b"\n")
            if self.server.refused(True, name):
                return 403, {"error": {"code": 403, "message": "not allowed"}}
        generation = self.server.buckets[bucket].get(name, (b"", 0))[1]
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            return 412, {"error": {"code": 412, "message": "Precondition failed"}}
        return 200, self.server.put(bucket, name, body)

    def _list(self, bucket: str, query: dict) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first, end = query.get("startOffset", ""), query.get("endOffset", "")
        items, folders = [], set()
        for name in sorted(self.server.buckets[bucket]):
            if not name.startswith(prefix) or name < first or (end and name >= end):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                items.append(self.server.metadata(bucket, name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)}

    def _batch(self, body: bytes) -> None:
        """Handle a batch request; gcsfs uses it for deletions."""
        answers = []
        for line in re.findall(rb"^DELETE (\S+) HTTP", body, re.M):
            url = urllib.parse.urlsplit(line.decode())
            status, *_ = self._do("DELETE", url.path, {}, b"")
            answers.append(
                f"--part\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status} -\r\n"
            )
        data = "".join(answers).encode() + b"--part--"
        self._send(200, data, {"Content-Type": "multipart/mixed; boundary=part"})
