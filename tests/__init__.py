"""Laws, one file a module."""
