"""``python -m segfit`` is the command ``segfit``."""

from segfit.cli.main import main

if __name__ == "__main__":
    main()
