"""Where pictures come from: files, folders, globs, lists of paths, videos and live cameras, named by URI."""

from edge_dsc.sources.files import expand_source

__all__ = ["expand_source"]
