"""The command line. Each command imports its heavy dependencies when it runs, not at import."""

from logratio.cli.app import main as main
