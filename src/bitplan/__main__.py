"""`python -m bitplan`."""

from bitplan.cli import main

main()
