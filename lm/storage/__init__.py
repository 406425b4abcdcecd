"""Files on disks and in buckets of Google Cloud Storage (gs://), through one path interface.

paths  as_path and what both kinds of storage need: append, copy, move, remove
staging  folders that appear whole
gcs    paths in a bucket, with retries and errors that are sentences
"""

from lm.storage.paths import (
    as_path,
    check_deletable,
    copy,
    glob_paths,
    is_remote,
    local_copy,
    move,
    open_append,
    remove,
    write,
)
