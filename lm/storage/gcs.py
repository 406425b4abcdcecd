"""Buckets of Google Cloud Storage: paths with pathlib's methods, and errors that are sentences.

etils, Orbax and jax's compilation cache reach gs:// through fsspec, so through the one file system
that is made known to it here.
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

# What gcsfs raises once it has tried again in vain, beside OSError.
# Source: gcsfs/retry.py, validate_response and retry_request.
REQUEST_ERRORS = (retry.HttpError, retry.ChecksumError, aiohttp.ClientError)
REQUEST_ERRORS += (requests.exceptions.RequestException, google.auth.exceptions.GoogleAuthError)
ACCESS_HINT = (
    "log in with `gcloud auth application-default login`, or grant the account of this machine "
    "the roles Storage Object User and Storage Legacy Bucket Reader on the bucket"
)


class UncachedFileSystem(core.GCSFileSystem):
    """gcsfs, but each request is asked anew, and no failure means that a file is absent.

    Other hosts and TensorStore write as well, so that no listing is kept.
    """

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **{"use_listings_cache": False} | named)

    async def _call(self, method, path, *arguments, **named):
        try:
            return await super()._call(method, path, *arguments, **named)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{_address(path, arguments)} is not there.") from error
        except REQUEST_ERRORS as error:
            raise _unreachable_error(path, arguments, error) from error
        except OSError as error:
            if not str(error).startswith("Forbidden"):
                raise
            raise _unreachable_error(path, arguments, error) from error

    call = asyn.sync_wrapper(_call)

    async def _isdir(self, path):
        try:
            return (await self._info(path))["type"] == "directory"
        except FileNotFoundError:
            return False

    async def _mkdir(self, path, *arguments, **named) -> None:
        """Nothing: a bucket has no folders, and none is made by writing to it."""

    async def _makedirs(self, path, exist_ok=False) -> None:
        """Nothing, as _mkdir."""


def _address(path: str, arguments: tuple) -> str:
    """The address that a request is about, whose path is a form for the arguments or a URL."""
    found = re.search(r"/b/([^/?]+)/o(?:/([^?]+))?", path)
    parts = arguments or map(urllib.parse.unquote, filter(None, found.groups() if found else ()))
    return "gs://" + "/".join(map(str, parts))


def _unreachable_error(path: str, arguments: tuple, error: Exception) -> OSError:
    said = " ".join(str(error).split())[:200] or type(error).__name__
    return OSError(
        f"{_address(path, arguments)} cannot be reached ({said}); see to the network, or {ACCESS_HINT}."
    )


class GCSPath(type(epath.Path("gs://bucket"))):
    """etils' path, with what it lacks of pathlib's where there is no working folder and no link."""

    def absolute(self) -> GCSPath:
        """Itself."""
        return self

    def resolve(self, strict: bool = False) -> GCSPath:
        """Itself."""
        return self

    def is_symlink(self) -> bool:
        """Never."""
        return False


def as_gcs_path(address: str) -> GCSPath:
    """The path of gs://bucket/...; ValueError where there is no such bucket."""
    bucket = address.removeprefix("gs://").partition("/")[0]
    if not bucket:
        raise ValueError(f"{address} names no bucket; write gs://bucket/folder.")
    check_bucket(bucket)
    return GCSPath(address)


@functools.cache
def check_bucket(bucket: str) -> None:
    """Raise ValueError where there is no such bucket, OSError where it may not be read."""
    try:
        filesystem().call("GET", "b/{}/o", bucket, maxResults=1)
    except (FileNotFoundError, ValueError) as error:  # a name that none may have is a bad request
        raise ValueError(
            f"there is no bucket gs://{bucket}; make it with `gcloud storage buckets create "
            f"gs://{bucket} --location=...`, in the region of the machines."
        ) from error


@functools.cache
def filesystem() -> UncachedFileSystem:
    """The file system, from now on that of every gs:// in this process."""
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it prints a trace for each failure
    for scheme in ("gs", "gcs"):
        fsspec.register_implementation(scheme, UncachedFileSystem, clobber=True)
    return fsspec.filesystem("gcs", finalize_on_close=True)  # as etils asks for it
