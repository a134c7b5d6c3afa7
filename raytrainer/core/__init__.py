"""What every part may use, and what knows none of them: signals, processes, git, streams, proxies and memory."""
