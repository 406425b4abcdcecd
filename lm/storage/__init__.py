"""Files on local disks and in Google Cloud Storage (gs://), through one path interface.

paths    as_path, and operations on both kinds of paths: append, copy, move, remove
staging  directories that appear complete or not at all
gcs      gs:// paths, and readable errors
"""

from lm.storage.paths import (
    CACHE_DIR,
    COPY_CHUNK_BYTES,
    SCHEME,
    as_path,
    check_deletable,
    copy_dir,
    glob_paths,
    is_remote,
    local_copy,
    move_dir,
    open_append,
    remove_dir,
    write_atomic,
)
