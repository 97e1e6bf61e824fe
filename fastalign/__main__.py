"""`python -m fastalign` is the command line."""

from fastalign.cli import main

main()
