"""`python -m raytrainer`: the command line."""

from raytrainer.cli import entry

if __name__ == "__main__":
    entry()
