"""Google Cloud Storage: paths with pathlib's methods, and readable errors.

etils, Orbax and jax's compilation cache use the file system that is registered here with fsspec.
"""

from __future__ import annotations

import functools
import logging
import re
import urllib.parse
from typing import Any

import aiohttp
import fsspec
import google.auth.exceptions
import requests
from etils import epath
from fsspec import asyn
from gcsfs import core, retry

from lm import exits

# The errors of gcsfs, besides OSError, after its last retry.
# Source: gcsfs/retry.py, validate_response and retry_request.
REQUEST_ERRORS = (retry.HttpError, retry.ChecksumError, aiohttp.ClientError)
REQUEST_ERRORS += (requests.exceptions.RequestException, google.auth.exceptions.GoogleAuthError)
ACCESS_HINT = (
    "log in with `gcloud auth application-default login`, or grant this machine's account "
    "the roles Storage Object User and Storage Legacy Bucket Reader on the bucket"
)


class UncachedFileSystem(core.GCSFileSystem):
    """gcsfs without a listings cache, that never reports a failed request as a missing file.

    Listings are not cached because other hosts and TensorStore write too.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"use_listings_cache": False} | kwargs)

    async def _call(self, method, path, *args, **kwargs):
        try:
            return await super()._call(method, path, *args, **kwargs)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{_address(path, args)} does not exist.") from error
        except (*REQUEST_ERRORS, OSError) as error:
            if isinstance(error, REQUEST_ERRORS) or str(error).startswith("Forbidden"):
                raise _unreachable_error(path, args, error) from error
            raise

    call = asyn.sync_wrapper(_call)

    async def _isdir(self, path):
        try:
            return (await self._info(path))["type"] == "directory"
        except FileNotFoundError:
            return False

    async def _mkdir(self, path, *args, **kwargs) -> None:
        """Do nothing: a bucket has no folders."""

    _makedirs = _mkdir


def _address(path: str, args: tuple) -> str:
    """Return the gs:// address of a request; path: a URL, or its template for args."""
    match = re.search(r"/b/([^/?]+)/o(?:/([^?]+))?", path)
    names = args or map(urllib.parse.unquote, filter(None, match.groups() if match else ()))
    return "gs://" + "/".join(map(str, names))


def _unreachable_error(path: str, args: tuple, error: Exception) -> OSError:
    reason = exits.one_line(error)
    return OSError(
        f"{_address(path, args)} cannot be reached ({reason}); check the network, or {ACCESS_HINT}."
    )


class GCSPath(type(epath.Path("gs://bucket"))):
    """etils' path with the missing methods of pathlib, for a bucket without links."""

    absolute = resolve = lambda self, strict=False: self
    is_symlink = lambda self: False


def as_gcs_path(address: str) -> GCSPath:
    """Return the path of gs://bucket/... Raises ValueError if the bucket does not exist."""
    bucket = address.removeprefix("gs://").partition("/")[0]
    if not bucket:
        raise ValueError(f"{address} names no bucket; write gs://bucket/folder.")
    check_bucket(bucket)
    return GCSPath(address)


@functools.cache
def check_bucket(bucket: str) -> None:
    """Raise ValueError if the bucket does not exist, OSError if it cannot be read."""
    try:
        filesystem().call("GET", "b/{}/o", bucket, maxResults=1)
    except (FileNotFoundError, ValueError) as error:  # an invalid bucket name is a bad request
        raise ValueError(
            f"there is no bucket gs://{bucket}; create it with `gcloud storage buckets create "
            f"gs://{bucket} --location=...`, in the region of the machines."
        ) from error


@functools.cache
def filesystem() -> UncachedFileSystem:
    """Return the file system, after registering it for all gs:// paths of this process."""
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback for each failure
    for scheme in ("gs", "gcs"):
        fsspec.register_implementation(scheme, UncachedFileSystem, clobber=True)
    return fsspec.filesystem("gcs", finalize_on_close=True)  # the arguments that etils uses
