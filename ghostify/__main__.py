"""``python -m ghostify`` is the command ``ghostify``."""

from ghostify.cli import main

if __name__ == "__main__":
    main()
