"""``python -m edge_dsc``: the command line, where no ``edge-dsc`` is on the path."""

from edge_dsc.cli import main

if __name__ == "__main__":
    main()
