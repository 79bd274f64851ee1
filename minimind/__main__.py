"""Run the command line with `python -m minimind`."""

from minimind.cli.main import main

main()
