"""The command line: parse, call, print. Each command imports what it needs when it runs."""

from logratio.cli.app import main as main
