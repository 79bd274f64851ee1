"""`python -m minimind` is `minimind`."""

from minimind.cli.main import main

main()
