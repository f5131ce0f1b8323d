"""`python -m jobs COMMAND`: the same words as the installed `subcat`."""

from jobs.cli import main

if __name__ == "__main__":
    main()
