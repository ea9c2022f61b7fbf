"""Run the command line as ``python -m logratio``."""

from logratio.cli import main

main()
