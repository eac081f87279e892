"""``python -m mlalign VERB ...``: the command line, where the script is not on the path."""

from mlalign.cli import main

if __name__ == "__main__":
    main()
