"""`python -m covft` is the `covft` command."""

from covft.cli import main

if __name__ == "__main__":
    main()
