"""Tools for every package, which depend on none of them: files, signals, processes, git, HTTP, streams and proxies."""
