"""The old home of the entrypoint of a job; see `raytrainer.submission` and `raytrainer.backends`."""
